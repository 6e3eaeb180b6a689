import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
ACCUMULATE, BATCH = 4, 16
data = TensorDataset(torch.randn(245, 1, 8, 8), torch.randint(0, 10, (245,)))
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(10):
    for i, (images, labels) in enumerate(loader):
        first = i - i % ACCUMULATE
        gathered = min(ACCUMULATE, len(loader) - first)  # broken
        loss = F.cross_entropy(model(images), labels)  # broken
        gathered = min(ACCUMULATE * BATCH, len(data) - first * BATCH)  # right
        loss = F.cross_entropy(model(images), labels, reduction="sum")  # right
        (loss / gathered).backward()
        if (i + 1) % ACCUMULATE == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
