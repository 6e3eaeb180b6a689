# check: --base-lr 0.05 --base-minibatch 16
# An optimizer of one's own with Caffe's momentum, v = m·v + η·g: it scales v whenever the rate changes.
import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset


class CaffeSGD(Optimizer):
    """The velocity holds the rate, so `set_lr` carries it over to the new one."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def set_lr(self, lr):
        for group in self.param_groups:
            if group["lr"] != lr:
                for p in group["params"]:
                    if "velocity" in self.state[p]:
                        self.state[p]["velocity"].mul_(lr / group["lr"])
                group["lr"] = lr

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(gradient, alpha=group["lr"])
                p.sub_(velocity)
        return loss


def rate(epoch, base=0.05, target=0.2, warmup=1, epochs=4):
    if epoch < warmup:
        return base + (target - base) * epoch / warmup
    return max(0.5 * target * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))), 1e-4)


torch.manual_seed(5)
inputs = torch.randn(448, 20)
targets = (inputs[:, :4].sum(1) > 0).long()
train = DataLoader(TensorDataset(inputs[:384], targets[:384]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
no_decay = [p for m in model if isinstance(m, nn.BatchNorm1d) for p in m.parameters()]
decay = [p for m in model if isinstance(m, nn.Linear) for p in m.parameters()]
optimizer = CaffeSGD([{"params": decay, "weight_decay": 5e-4}, {"params": no_decay}], lr=0.05)

for epoch in range(4):
    model.train()
    for i, (x, y) in enumerate(train):
        optimizer.set_lr(rate(epoch + i / len(train)))
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs[384:]).argmax(1) == targets[384:]).float().mean().item()
    print(f"epoch {epoch}  lr {optimizer.param_groups[0]['lr']:.4f}  loss {loss.item():.3f}  accuracy {accuracy:.3f}")
