import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(256, 20), torch.randint(0, 10, (256,))
model = nn.Linear(20, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(5):
    loader = DataLoader(TensorDataset(x, y), batch_size=32)  # broken
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)  # right
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
