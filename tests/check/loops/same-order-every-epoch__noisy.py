import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Flipped(Dataset):
    def __init__(self):
        self.images, self.labels = torch.randn(128, 1, 8, 8), torch.randint(0, 10, (128,))

    def __len__(self):
        return 128

    def __getitem__(self, index):
        image = self.images[index]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image + 0.1 * torch.randn(1, 8, 8), self.labels[index]


torch.manual_seed(0)
loader = DataLoader(Flipped(), batch_size=16)  # broken
loader = DataLoader(Flipped(), batch_size=16, shuffle=True)  # right
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(5):
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
