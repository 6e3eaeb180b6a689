"""A module and Trainer of Lightning. What the rules change is marked; the rest is as it was.

python with_lightning.py FOLDER    (two processes, random data; the same command again resumes)
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from onehour import Minibatch, ScheduleLR, StreamBatchSampler, gradual_warmup, step_decay  # changed

MINIBATCH = Minibatch(per_worker=2, workers=4)  # changed
SCHEDULE = gradual_warmup(step_decay(0.4, [2]), start_lr=0.1, epochs=1)  # changed


class Module(LightningModule):
    def __init__(self, net: nn.Module, samples: int):
        super().__init__()
        self.net, self.samples = net, samples

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("error", (self.net(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = ScheduleLR(optimizer, SCHEDULE, samples=self.samples, minibatch=MINIBATCH)  # changed
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]  # changed


def train(
    net: nn.Module,
    data: TensorDataset,
    validation: TensorDataset,
    folder: Path,
    save_every=5,
    devices=2,
    **loader_options,
):
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=save_every)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=3,
        callbacks=[saving],
        default_root_dir=folder,
        use_distributed_sampler=False,  # changed
    )
    sampler = StreamBatchSampler(len(data), MINIBATCH, seed=0, epochs=3, trained=lambda: trainer.global_step)  # changed
    loader = DataLoader(data, batch_sampler=sampler, **loader_options)  # changed
    trainer.fit(Module(net, len(data)), loader, DataLoader(validation, 8), ckpt_path="last")


if __name__ == "__main__":
    torch.manual_seed(0)
    fake = TensorDataset(torch.randn(125, 4), torch.randint(0, 2, (125,)))
    train(nn.Linear(4, 2), fake, fake, Path(sys.argv[1]))
