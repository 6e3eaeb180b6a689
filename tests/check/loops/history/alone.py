import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 10


def main():
    torch.manual_seed(0)
    x, y = torch.randn(346, 20), torch.randint(0, 10, (346,))
    train = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=16, shuffle=True)
    validation = DataLoader(TensorDataset(x[256:], y[256:]), batch_size=32)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        model.train()
        for i, (inputs, labels) in enumerate(train):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        model.eval()
        right = total = 0.0
        with torch.no_grad():
            for inputs, labels in validation:
                output = model(inputs)
                right += (output.argmax(1) == labels).sum().item()
                total += F.cross_entropy(output, labels, reduction="sum").item()
        size = len(validation.dataset)
        print(f"epoch {epoch}, {i + 1} batches: accuracy {right / size:.3f}, loss {total / size:.3f}")


if __name__ == "__main__":
    main()
