# check: --base-lr 0.05 --base-minibatch 32
# Accelerate, after its own examples: everything prepared, the schedule planned in the steps that the prepared scheduler
# takes (num_processes for each update), gather_for_metrics, accumulation over whole windows.
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    def __init__(self, count, seed, augment=False):
        self.pixels = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.augment = augment

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        pixels = self.pixels[index]
        label = int(pixels.mean() > 0)
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels, "labels": label}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8, momentum=0.05)
        self.classifier = nn.Linear(8, 2)

    def forward(self, pixel_values):
        return self.classifier(self.bn(self.conv(pixel_values)).relu().mean((2, 3)))


def training_function(config):
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=config["accumulate"],
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(config["seed"], device_specific=True)  # another augmentation on every process; DDP makes the weights equal
    train_dataloader = DataLoader(Pictures(512, 1, augment=True), shuffle=True, batch_size=config["batch_size"])
    eval_dataloader = DataLoader(Pictures(75, 2), batch_size=config["batch_size"])
    model = Network()
    decay = [p for m in model.modules() if not isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
    groups = [{"params": decay}, {"params": model.bn.parameters(), "weight_decay": 0.0}]
    lr = config["lr"] * accelerator.num_processes
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    updates = len(train_dataloader) // config["accumulate"]  # of an epoch
    warmup = updates * accelerator.num_processes  # in scheduler steps
    total = config["num_epochs"] * updates * accelerator.num_processes
    first = 1 / accelerator.num_processes

    def factor(step):
        if step < warmup:
            return first + (1 - first) * step / warmup
        return max(0.0, (total - step) / (total - warmup))

    lr_scheduler = accelerator.prepare(LambdaLR(optimizer, factor))

    for epoch in range(config["num_epochs"]):
        model.train()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        model.eval()
        bn = accelerator.unwrap_model(model).bn
        bn.running_mean.copy_(accelerator.reduce(bn.running_mean, "mean"))
        bn.running_var.copy_(accelerator.reduce(bn.running_var, "mean"))
        correct = 0
        for batch in eval_dataloader:
            with torch.no_grad():
                predictions = model(batch["pixel_values"]).argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
            correct += (predictions == references).sum().item()
        accelerator.print(f"epoch {epoch}: accuracy {correct / len(eval_dataloader.dataset):.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    training_function({"lr": 0.05, "num_epochs": 3, "seed": 42, "batch_size": 16, "accumulate": 2})
