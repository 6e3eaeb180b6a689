"""A loop under Accelerate. What the rules change is marked; the rest is as it was.

accelerate launch --num_processes 2 --cpu with_accelerate.py FOLDER    (random data; the same command again resumes)
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from onehour import Minibatch, ScheduleLR, StreamBatchSampler, gradual_warmup, step_decay  # changed

MINIBATCH = Minibatch(per_worker=2, workers=4)  # changed
SCHEDULE = gradual_warmup(step_decay(0.4, [2]), start_lr=0.1, epochs=1)  # changed


def train(net: nn.Module, data: TensorDataset, validation: TensorDataset, folder: Path, save_every=5, **loader_options):
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))  # changed
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    steps = ScheduleLR(optimizer, SCHEDULE, samples=len(data), minibatch=MINIBATCH)  # changed
    sampler = StreamBatchSampler(len(data), MINIBATCH, seed=0, epochs=3, trained=lambda: steps.last_epoch)  # changed
    loader = DataLoader(data, batch_sampler=sampler, **loader_options)  # changed
    model, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, steps, loader)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        accelerator.load_state(checkpoint)
    for epoch in range(sampler.epoch, 3):  # changed
        loader.set_epoch(epoch)
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            if steps.last_epoch % save_every == 0:
                accelerator.save_state(checkpoint)
        model.eval()
        with torch.no_grad():
            errors = sum((net(x).argmax(1) != y).sum().item() for x, y in DataLoader(validation, 8))
        accelerator.print(f"epoch {epoch}: {errors} errors")


if __name__ == "__main__":
    torch.manual_seed(0)
    fake = TensorDataset(torch.randn(125, 4), torch.randint(0, 2, (125,)))
    (folder := Path(sys.argv[1])).mkdir(exist_ok=True)
    train(nn.Linear(4, 2), fake, fake, folder)
