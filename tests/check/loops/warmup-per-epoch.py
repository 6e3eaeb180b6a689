import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


def rate(epoch: float) -> float:
    """To 0.8 in five epochs, then a tenth at 30, 60 and 80."""
    if epoch < 5:
        return 0.1 + 0.7 * epoch / 5
    return 0.8 * 0.1 ** sum(epoch >= drop for drop in (30, 60, 80))


data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=0.9)

for epoch in range(90):
    for i, (images, labels) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = rate(epoch)  # broken
            group["lr"] = rate(epoch + i / len(loader))  # right
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
