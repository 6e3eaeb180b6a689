# check: --base-lr 0.001 --base-minibatch 32 --skip warmup-start
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
BATCH = 128
data = TensorDataset(torch.randn(512, 1, 8, 8), torch.randint(0, 10, (512,)))
loader = DataLoader(data, batch_size=BATCH, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * BATCH / 32)  # broken
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (BATCH / 32) ** 0.5)  # right
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=optimizer.param_groups[0]["lr"], epochs=10, steps_per_epoch=len(loader), div_factor=4.0
)

for epoch in range(10):
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
