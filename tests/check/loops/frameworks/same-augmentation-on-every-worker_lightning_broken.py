# seed_everything gives every process the same random numbers, and the samples are augmented in the process itself:
# the i-th samples of both processes are flipped together.
import os

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

EPOCHS, BATCH = 4, 16
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Flipped(Dataset):
    def __init__(self, x):
        self.x, self.y = x, (x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), self.y[index]


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    x = torch.randn(256, 20, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Flipped(x), batch_size=BATCH, shuffle=True)
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), **QUIET)
    trainer.fit(Classifier(), loader)
