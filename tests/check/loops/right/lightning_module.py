# check: --base-lr 0.1 --base-minibatch 16
# Lightning: its schedule goes by steps, samplers of its own, metrics of torchmetrics, DDP where it is launched.
import os

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

WORLD = int(os.environ.get("WORLD_SIZE", 1))
BATCH, BASE_LR, EPOCHS = 16, 0.1, 4


class Data(L.LightningDataModule):
    def setup(self, stage=None):
        x = torch.randn(256 + 77, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        y = (x.mean((1, 2, 3)) > 0).long()
        self.train, self.val = TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])

    def train_dataloader(self):
        sampler = torch.utils.data.DistributedSampler(self.train, WORLD, self.trainer.global_rank, seed=1)
        return DataLoader(self.train, BATCH, sampler=sampler)  # Lightning calls its set_epoch

    def val_dataloader(self):
        return DataLoader(self.val, BATCH, sampler=range(self.trainer.global_rank, len(self.val), WORLD))


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(288, 2)
        self.accuracy = MulticlassAccuracy(2, average="micro")

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def on_validation_start(self):
        if WORLD > 1:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    for statistic in (module.running_mean, module.running_var):
                        dist.all_reduce(statistic)
                        statistic /= WORLD

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy.update(self(x), y)
        self.log("val_acc", self.accuracy, on_epoch=True)

    def configure_optimizers(self):
        norm = [p for m in self.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        other = [p for p in self.parameters() if all(p is not q for q in norm)]
        optimizer = torch.optim.SGD(
            [{"params": other, "weight_decay": 1e-4}, {"params": norm, "weight_decay": 0.0}],
            lr=BASE_LR * WORLD,
            momentum=0.9,
        )
        steps = self.trainer.estimated_stepping_batches // EPOCHS
        warmup = LinearLR(optimizer, start_factor=1 / WORLD, total_iters=steps)
        decay = MultiStepLR(optimizer, [steps, 2 * steps], gamma=0.1)
        scheduler = SequentialLR(optimizer, [warmup, decay], milestones=[steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


if __name__ == "__main__":
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=WORLD,
        strategy=DDPStrategy(broadcast_buffers=False) if WORLD > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Data())
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
