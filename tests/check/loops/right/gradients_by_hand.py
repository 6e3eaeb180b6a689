# check: --base-lr 0.1 --base-minibatch 32
# Gradients by torch.autograd.grad, for each of two losses, and put together by hand: no backward(), no zero_grad().
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, (x @ torch.randn(8, 3)).argmax(1)), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
params = list(model.parameters())
optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)


def without_conflict(task, other):
    """PCGrad: what of one gradient points against the other is taken out."""
    dot = sum((a * b).sum() for a, b in zip(task, other, strict=True))
    size = sum((b * b).sum() for b in other)
    return [a - dot.clamp(max=0) / size * b for a, b in zip(task, other, strict=True)]


for epoch in range(4):
    for images, labels in loader:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        task = torch.autograd.grad(loss, params, retain_graph=True)
        other = torch.autograd.grad(0.01 * entropy, params)
        for parameter, a, b in zip(params, without_conflict(task, other), without_conflict(other, task), strict=True):
            parameter.grad = a + b
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
