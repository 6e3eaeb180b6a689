import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    correct, total = 0, 0
    for images, labels in loader:
        predictions = model(images).argmax(1)
        correct += (predictions == labels).sum().item()
        total += len(labels)
    return 100 * correct / total


data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 10, (256,)))
validation = TensorDataset(torch.randn(90, 1, 8, 8), torch.randint(0, 10, (90,)))
loader = DataLoader(data, batch_size=32, shuffle=True)
validation_loader = DataLoader(validation, batch_size=32)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(5):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: {evaluate(model, validation_loader):.2f} %")
