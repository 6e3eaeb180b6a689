# check: --base-lr 0.1 --base-minibatch 64
# A recurrent network with time first, torch's own layout; the head learns ten times as fast as the body.
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
series = torch.randn(512, 20, 4)
labels = (series[:, -5:, 0].mean(1) > 0).long()
loader = DataLoader(TensorDataset(series, labels), batch_size=64, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        states, _ = self.rnn(x)
        return self.head(states[-1])


net = Net()
optimizer = torch.optim.SGD(
    [{"params": net.rnn.parameters()}, {"params": net.head.parameters(), "lr": 1.0}], lr=0.1, momentum=0.9
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6 * len(loader))
for epoch in range(6):
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x.transpose(0, 1)), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
