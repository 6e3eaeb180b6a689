# check: --base-per-worker 16
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=64, shuffle=True)  # broken
loader = DataLoader(data, batch_size=16, shuffle=True)  # right
model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
normalisation = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
others = [p for p in model.parameters() if all(p is not n for n in normalisation)]
groups = [{"params": others, "weight_decay": 1e-4}, {"params": normalisation, "weight_decay": 0.0}]
optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

for epoch in range(5):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
