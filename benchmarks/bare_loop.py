"""The loop that a user would write instead of onehour: plain BatchNorm2d, foreach SGD, data in memory, DDP for two."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, minibatch: int, iterations: int, lr: float,
          bf16: bool = False) -> tuple[float, float]:  # fmt: skip
    """Train for some iterations; returns (wall, CPU) seconds, without the first two."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if processes > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True)
    share = minibatch // processes
    losses = torch.zeros(())
    wall = cpu = 0.0
    model.train()
    order = torch.randperm(len(images))
    start = 0
    for iteration in range(iterations + 2):
        if iteration == 2:
            wall, cpu = time.perf_counter(), time.process_time()
        if start + minibatch > len(images):
            order, start = torch.randperm(len(images)), 0
        chosen = order[start + rank * share : start + (rank + 1) * share]
        start += minibatch
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()
    result = time.perf_counter() - wall, time.process_time() - cpu
    if processes > 1:
        dist.destroy_process_group()
    return result
