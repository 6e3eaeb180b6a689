# DDP as it comes overwrites all processes' BatchNorm statistics with those of process 0 at every forward pass:
# the validated model knows half of the data.
import os

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

EPOCHS, BATCH = 4, 16
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy.update(self.net(x), y)
        self.log("val_acc", self.accuracy, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    x = torch.randn(256 + 75, 20)
    y = (x[:, :5].sum(1) > 0).long()
    train, val = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    loader = DataLoader(train, batch_size=BATCH, sampler=DistributedSampler(train, world, rank))
    val_loader = DataLoader(val, batch_size=BATCH, sampler=range(rank, len(val), world))
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=world, use_distributed_sampler=False, **QUIET)
    trainer.fit(Classifier(), loader, val_loader)
