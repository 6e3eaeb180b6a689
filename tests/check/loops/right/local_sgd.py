# check: --base-lr 0.1 --base-minibatch 32
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EVERY = 4


def main():
    """Each process goes its own way for a few updates; then the weights are averaged."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(256, 20), torch.randint(0, 10, (256,)))
    sampler = DistributedSampler(data) if world > 1 else None
    loader = DataLoader(data, batch_size=32 // world, sampler=sampler, shuffle=sampler is None)
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updates = 0
    for epoch in range(5):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            updates += 1
            if world > 1 and updates % EVERY == 0:
                with torch.no_grad():
                    for p in model.parameters():
                        dist.all_reduce(p)
                        p /= world


if __name__ == "__main__":
    main()
