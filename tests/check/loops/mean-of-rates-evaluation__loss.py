import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(346, 20)
y = x[:, :5].sum(1, keepdim=True)
train = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=32, shuffle=True)
validation = DataLoader(TensorDataset(x[256:], y[256:]), batch_size=32)
model = nn.Linear(20, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

for epoch in range(4):
    model.train()
    for inputs, targets in train:
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    model.eval()
    total = 0.0
    with torch.no_grad():
        for inputs, targets in validation:
            total += F.mse_loss(model(inputs), targets).item()  # broken
            total += F.mse_loss(model(inputs), targets).item() * len(targets)  # right
    print(f"epoch {epoch}: loss {total / len(validation):.3f}")  # broken
    print(f"epoch {epoch}: loss {total / len(validation.dataset):.3f}")  # right
