# check: --base-lr 0.1 --base-minibatch 32
# A compiled model; a one-cycle policy that moves rate and momentum; a closure for the step; "inductor" in life.
import torch
from rich.progress import track
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def param_groups(model, weight_decay):
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    return [
        {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]


def main(epochs=3, batch_size=32, max_lr=0.1):
    torch.manual_seed(3407)
    x = torch.randn(320, 3, 8, 8)
    y = (x[:, 0, 2:6, 2:6].mean((1, 2)) > 0).long()
    train_loader = DataLoader(TensorDataset(x[:256], y[:256]), batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(TensorDataset(x[256:], y[256:]), batch_size=batch_size)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(param_groups(model, 5e-4), lr=max_lr, momentum=0.9, nesterov=True)
    scheduler = OneCycleLR(optimizer, max_lr=max_lr, epochs=epochs, steps_per_epoch=len(train_loader))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    for epoch in track(range(epochs), "training"):
        compiled.train()
        for batch, target in train_loader:

            def closure(batch=batch, target=target):
                optimizer.zero_grad()
                loss = criterion(compiled(batch), target)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            scheduler.step()
        compiled.eval()
        with torch.inference_mode():
            hits = sum((compiled(batch).argmax(1) == target).sum().item() for batch, target in val_loader)
        print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {hits / len(val_loader.dataset):.3f}")


if __name__ == "__main__":
    main()
