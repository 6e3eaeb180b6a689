# check: --base-lr 0.1 --base-minibatch 16
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


class DecoupledSGD(torch.optim.SGD):
    """Weights shrink by weight_decay · lr / initial lr a step."""

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["weight_decay"], group["initial_lr"] = weight_decay, lr

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            for p in group["params"]:
                p.mul_(1 - decay * group["lr"] / group["initial_lr"])
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


BATCH, BASE = 32, 16
data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
lr = 0.1 * BATCH / BASE
optimizer = DecoupledSGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)  # broken
optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)  # right
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=5 * len(loader))

for epoch in range(10):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        warmup.step()
