import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
EPOCHS, ACCUMULATE = 10, 4
data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=16, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
updates = EPOCHS * len(loader) // ACCUMULATE
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates)

for epoch in range(EPOCHS):
    for i, (images, labels) in enumerate(loader):
        loss = F.cross_entropy(model(images), labels)
        (loss / ACCUMULATE).backward()
        if (i + 1) % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()  # right
        scheduler.step()  # broken
