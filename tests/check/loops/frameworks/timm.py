import os

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
EPOCHS, BATCH = 4, 16


def main():
    if WORLD > 1:
        dist.init_process_group("gloo")
    x = torch.randn(331, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0].mean((1, 2)) > 0).long()
    train, val = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])
    sampler = DistributedSampler(train, WORLD, RANK)
    loader_train = DataLoader(train, BATCH, sampler=sampler)
    loader_eval = DataLoader(val, BATCH, sampler=range(RANK, len(val), WORLD))
    torch.manual_seed(42 + RANK)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 2))
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.1 * WORLD, weight_decay=2e-5, momentum=0.9)
    model = DistributedDataParallel(net, broadcast_buffers=False) if WORLD > 1 else net
    updates_per_epoch = len(loader_train)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=2, warmup_lr=0.1, warmup_prefix=True,
        step_on_epochs=False, updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        for i, (images, target) in enumerate(loader_train):
            loss = nn.functional.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(num_updates=epoch * updates_per_epoch + i + 1)
        if WORLD > 1:
            distribute_bn(net, WORLD, reduce=True)
        net.eval()
        counts = torch.zeros(2)
        with torch.inference_mode():
            for images, target in loader_eval:
                counts += torch.tensor([(net(images).argmax(1) == target).sum(), len(target)])
        if WORLD > 1:
            dist.all_reduce(counts)
        scheduler.step(epoch + 1)
        if RANK == 0:
            print(f"Test: {epoch} acc@1 {100 * counts[0] / counts[1]:.2f}")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
