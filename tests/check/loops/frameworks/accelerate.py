import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH = 4, 16


def main():
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    x = torch.randn(320, 20)
    y = (x[:, :5].sum(1) > 0).long()
    train_loader = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=BATCH, shuffle=True)
    eval_loader = DataLoader(TensorDataset(x[256:], y[256:]), batch_size=BATCH)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    for epoch in range(EPOCHS):
        model.train()
        for inputs, targets in train_loader:
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        correct = 0
        for inputs, targets in eval_loader:
            with torch.no_grad():
                predictions = model(inputs).argmax(-1)
            predictions, targets = accelerator.gather_for_metrics((predictions, targets))
            correct += (predictions == targets).sum().item()
        accelerator.print(f"epoch {epoch}: accuracy {correct / len(eval_loader.dataset):.3f}")


if __name__ == "__main__":
    main()
