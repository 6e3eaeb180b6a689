# check: --base-lr 0.2 --base-minibatch 32
# Mixed precision: autocast, a GradScaler, gradients unscaled before they are clipped. One process, any device.
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, random_split

device = "cuda" if torch.cuda.is_available() else "cpu"
batch_size, epochs, warmup_epochs, base_lr = 64, 4, 1, 0.2
lr = base_lr * batch_size / 32

torch.manual_seed(1)
images = torch.randn(640, 3, 8, 8)
labels = (images.mean((1, 2, 3)) > 0).long()
train_set, val_set = random_split(TensorDataset(images, labels), [512, 128])
train_loader = DataLoader(train_set, batch_size, shuffle=True, pin_memory=device == "cuda")
val_loader = DataLoader(val_set, batch_size)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))


net = Net().to(device)
optimizer = torch.optim.SGD(
    [
        {"params": [*net.stem.parameters(), *net.head.parameters()]},
        {"params": net.norm.parameters(), "weight_decay": 0.0},
    ],
    lr=lr,
    momentum=0.9,
    weight_decay=5e-4,
)
steps = len(train_loader)


def factor(step):
    """From base_lr to lr over the warmup, then a tenth after half of the epochs."""
    if step < warmup_epochs * steps:
        return (base_lr + (lr - base_lr) * step / (warmup_epochs * steps)) / lr
    return 1.0 if step < epochs * steps // 2 else 0.1


scheduler = LambdaLR(optimizer, factor)
scaler = torch.amp.GradScaler(device)

for epoch in range(epochs):
    net.train()
    for x, y in train_loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    net.eval()
    right = seen = 0
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
        for x, y in val_loader:
            right += (net(x.to(device)).argmax(1).cpu() == y).sum().item()
            seen += len(y)
    print(f"epoch {epoch} lr {scheduler.get_last_lr()[0]:.3f} loss {loss.item():.4f} val acc {right / seen:.3%}")
