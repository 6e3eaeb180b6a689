# check: --base-lr 0.05 --base-minibatch 32
# timm's train.py: its optimizer and scheduler factories, sched_on_updates, its meters; counts in place of mean rates.
import argparse
import os

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel as NativeDDP
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

parser = argparse.ArgumentParser(description="PyTorch ImageNet Training")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr-base", type=float, default=0.05)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--seed", type=int, default=42)


class Images(Dataset):
    def __init__(self, count, training):
        self.images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        self.labels = (self.images[:, 0].mean((1, 2)) > 0).long()
        self.training = training

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.training:
            image = image.roll(int(torch.randint(-1, 2, ())), -1)
        return image, self.labels[index]


def main():
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed + rank)  # timm's random_seed: augmentation differs, DDP makes the weights equal
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    lr = args.lr_base * args.batch_size * world_size / 32
    optimizer = create_optimizer_v2(net, opt="sgd", lr=lr, weight_decay=2e-5, momentum=0.9)
    model = NativeDDP(net, broadcast_buffers=False) if world_size > 1 else net

    train, evaluation = Images(320, True), Images(101, False)
    sampler = DistributedSampler(train) if world_size > 1 else None
    loader_train = DataLoader(train, args.batch_size, shuffle=sampler is None, sampler=sampler, drop_last=True)
    loader_eval = DataLoader(Subset(evaluation, range(rank, len(evaluation), world_size)), args.batch_size)
    updates_per_epoch = len(loader_train)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="multistep", num_epochs=args.epochs, decay_milestones=[6], decay_rate=0.1, warmup_epochs=5,
        warmup_lr=args.lr_base, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    for epoch in range(num_epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        loss = train_one_epoch(epoch, model, loader_train, optimizer, lr_scheduler, updates_per_epoch)
        if world_size > 1:
            distribute_bn(net, world_size, reduce=True)
        top1 = validate(net, loader_eval, world_size)
        lr_scheduler.step(epoch + 1, top1)
        if rank == 0:
            print(f"Train: {epoch} loss {loss:.4f}  Test: acc@1 {top1:.3f}")
    if world_size > 1:
        dist.destroy_process_group()


def train_one_epoch(epoch, model, loader, optimizer, lr_scheduler, updates_per_epoch):
    losses_m = AverageMeter()
    model.train()
    optimizer.zero_grad()
    num_updates = epoch * updates_per_epoch
    for input, target in loader:
        loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_updates += 1
        losses_m.update(loss.item(), input.size(0))
        lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)
    return losses_m.avg


@torch.inference_mode()
def validate(model, loader, world_size):
    model.eval()
    counts = torch.zeros(2)
    for input, target in loader:
        counts += torch.tensor([(model(input).argmax(1) == target).sum(), len(target)])
    if world_size > 1:
        dist.all_reduce(counts)
    return (100 * counts[0] / counts[1]).item()


if __name__ == "__main__":
    main()
