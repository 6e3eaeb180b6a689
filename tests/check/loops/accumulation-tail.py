import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
ACCUMULATE = 4
data = TensorDataset(torch.randn(224, 1, 8, 8), torch.randint(0, 10, (224,)))
loader = DataLoader(data, batch_size=16, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(10):
    for i, (images, labels) in enumerate(loader):
        first = i - i % ACCUMULATE  # right
        gathered = min(ACCUMULATE, len(loader) - first)  # right
        loss = F.cross_entropy(model(images), labels)
        (loss / ACCUMULATE).backward()  # broken
        (loss / gathered).backward()  # right
        if (i + 1) % ACCUMULATE == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
