# check: --base-lr 0.1 --base-minibatch 16
# PyTorch's ImageNet example: argparse, functions, the rate set by hand, the rest of the validation set apart.
import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("-j", "--workers", default=2, type=int)
parser.add_argument("--epochs", default=9, type=int)
parser.add_argument("-b", "--batch-size", default=16, type=int, help="images of one process")
parser.add_argument("--lr", default=0.1, type=float, help="for 16 images")
parser.add_argument("--checkpoint", default="checkpoint.pth.tar")
args = parser.parse_args()
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def fake(count):
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())


def adjust_learning_rate(optimizer, epoch, target):
    if epoch < 5:
        lr = args.lr + (target - args.lr) * epoch / 5
    else:
        lr = target * 0.1 ** sum(epoch >= milestone for milestone in (6, 8))
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(loader, model, criterion, optimizer, epoch):
    model.train()
    for i, (images, target) in enumerate(loader):
        adjust_learning_rate(optimizer, epoch + i / len(loader), args.lr * args.batch_size * world / 16)
        loss = criterion(model(images.to(device)), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 10 == 0 and rank == 0:
            print(f"Epoch: [{epoch}][{i}/{len(loader)}]\tLoss {loss.item():.4e}")


@torch.no_grad()
def validate(loader, model):
    def run_validate(loader):
        for images, target in loader:
            correct.add_((model(images.to(device)).argmax(1) == target.to(device)).sum())

    correct = torch.zeros((), dtype=torch.long, device=device)
    model.eval()
    run_validate(loader)
    if world > 1:
        dist.all_reduce(correct)
        done = len(loader.sampler) * world
        if done < len(loader.dataset):  # what the sampler dropped, on every process
            run_validate(DataLoader(Subset(loader.dataset, range(done, len(loader.dataset))), args.batch_size))
    return 100 * correct.item() / len(loader.dataset)


def main_worker():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).to(device)
    model = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    groups = [
        {"params": [*net[0].parameters(), *net[4].parameters()]},
        {"params": net[1].parameters(), "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss().to(device)
    train_data, val_data = fake(512), fake(131)
    train_sampler = DistributedSampler(train_data) if world > 1 else None
    val_sampler = DistributedSampler(val_data, shuffle=False, drop_last=True) if world > 1 else None
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    train_loader = DataLoader(train_data, shuffle=train_sampler is None, sampler=train_sampler, **options)
    val_loader = DataLoader(val_data, sampler=val_sampler, **options)
    for epoch in range(args.epochs):
        if train_sampler is not None:
            train_sampler.set_epoch(epoch)
        train(train_loader, model, criterion, optimizer, epoch)
        for statistic in (net[1].running_mean, net[1].running_var) if world > 1 else ():
            dist.all_reduce(statistic)
            statistic /= world
        acc1 = validate(val_loader, model)
        if rank == 0:
            print(f" * Acc@1 {acc1:.3f}")
            torch.save({"epoch": epoch + 1, "state_dict": net.state_dict()}, args.checkpoint)


if __name__ == "__main__":
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main_worker()
    if world > 1:
        dist.destroy_process_group()
