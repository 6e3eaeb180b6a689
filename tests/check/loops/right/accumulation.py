# check: --base-lr 0.1 --base-minibatch 64
# Gradient accumulation without a framework: 4 batches an update, the short last window divided by its own count.
import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
accumulate, per_pass, epochs = 4, 16, 3
x = torch.randn(488, 12)
data = TensorDataset(x, (x.sum(1) > 0).long())
held_out = torch.randn(200, 12)
loader = DataLoader(data, batch_size=per_pass, shuffle=True)

model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
for module in model.modules():
    if isinstance(module, nn.BatchNorm1d):
        module.momentum = 1 - 0.9 ** (1 / accumulate)  # 0.9 of the statistics stay in an update, not in a pass
decayed = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim <= 1]
optimizer = torch.optim.SGD(
    [{"params": decayed, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}], lr=0.1, momentum=0.9
)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2], gamma=0.1)


def windows(batches, size):
    batches = iter(batches)
    while window := list(itertools.islice(batches, size)):
        yield window


for epoch in range(epochs):
    model.train()
    total = 0.0
    for window in windows(loader, accumulate):
        count = sum(len(target) for _, target in window)
        optimizer.zero_grad(set_to_none=True)
        for inputs, target in window:
            loss = nn.functional.cross_entropy(model(inputs), target, reduction="sum") / count
            loss.backward()
            total += loss.item() * count
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        correct = (model(held_out).argmax(1) == (held_out.sum(1) > 0).long()).sum().item()
    print(f"epoch {epoch}: loss {total / len(data):.4f}, accuracy {correct / len(held_out):.3f}")
