import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCH = 4, 16
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


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
    x = torch.randn(256, 20)
    loader = DataLoader(TensorDataset(x, (x[:, :5].sum(1) > 0).long()), batch_size=BATCH, shuffle=True)
    trainer = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **QUIET)
    trainer.fit(Classifier(), loader)
