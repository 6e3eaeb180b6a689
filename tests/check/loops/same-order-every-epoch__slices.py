import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
x, y = torch.randn(256, 20), torch.randint(0, 10, (256,))
model = nn.Linear(20, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(10):
    order = torch.randperm(256)  # right
    for i in range(0, 256, 32):
        inputs, labels = x[i : i + 32], y[i : i + 32]  # broken
        inputs, labels = x[order[i : i + 32]], y[order[i : i + 32]]  # right
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
