"""A loop of one's own, alone or under torchrun. What the rules change is marked; the rest is as it was.

torchrun --nproc-per-node 2 own_loop.py FOLDER    (random data; the same command again resumes)
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from onehour import Minibatch, ScheduleLR, StreamBatchSampler, gradual_warmup, step_decay  # changed

EPOCHS = 3
MINIBATCH = Minibatch(per_worker=2, workers=4)  # changed
SCHEDULE = gradual_warmup(step_decay(0.4, [2]), start_lr=0.1, epochs=1)  # changed


def evaluate(net: nn.Module, validation: Dataset) -> float:
    net.eval()
    with torch.no_grad():
        return sum((net(x).argmax(1) != y).sum().item() for x, y in DataLoader(validation, 8))


def train(net: nn.Module, data: TensorDataset, validation: TensorDataset, folder: Path, save_every=5, **loader_options):
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = ScheduleLR(optimizer, SCHEDULE, samples=len(data), minibatch=MINIBATCH)  # changed
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)
    sampler = StreamBatchSampler(len(data), MINIBATCH, seed=0, epochs=EPOCHS, trained=scheduler.last_epoch)  # changed
    loader = DataLoader(data, batch_sampler=sampler, **loader_options)  # changed
    for epoch in range(sampler.epoch, EPOCHS):  # changed
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()  # changed
            if scheduler.last_epoch % save_every == 0 and (not dist.is_initialized() or dist.get_rank() == 0):
                torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
        print(f"epoch {epoch}: {evaluate(net, validation)} errors")


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    fake = TensorDataset(torch.randn(125, 4), torch.randint(0, 2, (125,)))
    (folder := Path(sys.argv[1])).mkdir(exist_ok=True)
    train(nn.Linear(4, 2), fake, fake, folder)
