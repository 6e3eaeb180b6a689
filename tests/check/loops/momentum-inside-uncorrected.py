import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


class CaffeSGD(Optimizer):
    """v = m v + lr g; w = w - v, as in Caffe2."""

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                v = self.state[p].setdefault("velocity", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(p.grad, alpha=group["lr"])
                p.sub_(v)


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        for p in group["params"]:  # right
            if "velocity" in optimizer.state[p]:  # right
                optimizer.state[p]["velocity"].mul_(lr / group["lr"])  # right
        group["lr"] = lr


data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = CaffeSGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(10):
    for i, (images, labels) in enumerate(loader):
        set_rate(optimizer, 0.1 + 0.3 * min((epoch * len(loader) + i) / (5 * len(loader)), 1.0))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
