# check: --base-lr 0.1 --base-minibatch 48
# Two tasks with a body in common: a batch of each an update, a backward pass each, so that one graph lives at a time.
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(448, 8)
classes = DataLoader(TensorDataset(x[:256], (x[:256] @ torch.randn(8, 3)).argmax(1)), batch_size=32, shuffle=True)
values = DataLoader(TensorDataset(x[256:], x[256:] @ torch.randn(8, 1)), batch_size=16, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.heads = nn.ModuleDict({"class": nn.Linear(16, 3), "value": nn.Linear(16, 1)})

    def forward(self, x, task):
        return self.heads[task](self.body(x))


def forever(loader):
    while True:
        yield from loader


net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
other = forever(values)
for epoch in range(5):
    for images, labels in classes:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images, "class"), labels)
        loss.backward()
        images, targets = next(other)
        F.mse_loss(net(images, "value"), targets).backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
