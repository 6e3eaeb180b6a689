"""The loop of imagenet_stock.py with the paper's rules; sections are those of Goyal et al. 2017.

torchrun --nproc-per-node 8 imagenet_onehour.py DIR    (DIR/train/CLASS/*, DIR/val/CLASS/*; needs torchvision)
python imagenet_onehour.py --fake 1024                 (random images and a small network, anywhere)
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import onehour


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", help="ImageNet's folder")
    parser.add_argument("--fake", type=int, default=0, metavar="N", help="N random images in place of a folder")
    parser.add_argument("--batch-size", type=int, default=256, help="images a process sees in an iteration")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--loaders", type=int, default=8, help="processes that load data, for each process")
    parser.add_argument("--out", default="", help="file to save the weights in")
    args = parser.parse_args()
    if bool(args.folder) == bool(args.fake):
        parser.error("give a folder, or --fake N")
    return args


def load(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """Model, training and validation data."""
    if args.fake:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(args.fake, 3, 32, 32, generator=generator)
        fake = TensorDataset(images, torch.randint(0, 10, (args.fake,), generator=generator))
        stem = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*stem, nn.Flatten(), nn.Linear(16, 10)), fake, fake
    from torchvision import datasets, models, transforms  # pyright: ignore[reportMissingImports]

    tail = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    crop = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *tail])
    centre = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *tail])
    train = datasets.ImageFolder(os.path.join(args.folder, "train"), crop)
    return models.resnet50(), train, datasets.ImageFolder(os.path.join(args.folder, "val"), centre)


@torch.no_grad()
def evaluate(net: nn.Module, data: Any, args: argparse.Namespace, rank: int, world: int) -> float:
    """Top-1 error in percent: every image once, with process 0's BatchNorm statistics, which are those it saves."""
    net.eval()
    if world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)
    share = Subset(data, range(rank, len(data), world))
    device = next(net.parameters()).device
    wrong = torch.zeros((), device=device)
    for images, labels in DataLoader(share, args.batch_size, num_workers=args.loaders):
        wrong += (net(images.to(device)).argmax(1) != labels.to(device)).sum()
    if world > 1:
        dist.all_reduce(wrong)
    return 100 * wrong.item() / len(data)


def main() -> None:
    args = parse()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    net, train, val = load(args)
    # §5.1: He fan-out, γ = 0 at the end of each block; §2.3: BatchNorm over n = 32, however many a process takes.
    net = onehour.init_weights_(onehour.convert_batchnorm(net, per_worker=32)).to(device)
    model = DistributedDataParallel(net) if world > 1 else net
    # §2.3: n stays 32, so a process of 256 images hosts 8 of the k workers; another size is refused.
    hosted = onehour.Minibatch.of(args.batch_size, per_worker=32).workers
    minibatch = onehour.Minibatch(per_worker=32, workers=hosted * world)
    # §3, Remark 4: one permutation an epoch, divided among the workers; full minibatches, nothing padded or dropped.
    sampler = onehour.StreamBatchSampler(len(train), minibatch, seed=0, epochs=args.epochs)
    loader = DataLoader(train, batch_sampler=sampler, num_workers=args.loaders, pin_memory=cuda)
    # §2.1: k times the minibatch, k times the rate; --lr is that of 256 images. §2.2: from there to the target in 5
    # epochs, a little at every iteration. §5.1: drops at 30, 60, 80.
    schedule = onehour.scaled_step_schedule(
        base_lr=args.lr, base_minibatch=256, minibatch=minibatch, milestones=[30, 60, 80], warmup_epochs=5
    )
    # §3, Remark 1 and §5.1: coupled decay, none on γ and β; Nesterov momentum.
    groups = onehour.parameter_groups(net, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    # §2.2; Remark 2: it also corrects the momentum of optimizers that need it, which torch's SGD does not.
    scheduler = onehour.ScheduleLR(optimizer, schedule, samples=len(train), minibatch=minibatch)

    for epoch in range(args.epochs):
        model.train()
        total, batches = torch.zeros((), device=device), len(loader)
        for images, labels in loader:
            # §3, Remark 3: DDP averages over processes, right for means over equal counts, which the sampler gives.
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            total += loss.detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()  # §2.2: at every iteration
        error = evaluate(net, val, args, rank, world)
        if rank == 0:
            rate = scheduler.get_last_lr()[0]
            loss = total.item() / batches
            print(f"epoch {epoch + 1}  loss {loss:.4f}  validation error {error:.2f} %  next rate {rate:g}")
            if args.out:
                torch.save(net.state_dict(), args.out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
