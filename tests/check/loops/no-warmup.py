# check: --base-lr 0.1 --base-minibatch 16
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
BATCH, EPOCHS = 64, 20  # broken
BATCH, EPOCHS, WARMUP = 64, 20, 5  # right
data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * BATCH / 16, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(loader))  # broken
updates = WARMUP * len(loader)  # right
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=16 / BATCH, total_iters=updates)  # right
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=(EPOCHS - WARMUP) * len(loader))  # right
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[updates])  # right

for epoch in range(EPOCHS):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
