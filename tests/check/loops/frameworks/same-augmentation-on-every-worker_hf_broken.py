# The Trainer seeds every process alike, and without loader processes the samples are augmented in the process itself:
# the i-th samples of both processes are flipped together.
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Flipped(Dataset):
    def __init__(self, count):
        self.x = torch.randn(count, 20, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        return {"x": x.flip(-1) if torch.rand(()) < 0.5 else x, "labels": int(x.sum() > 0)}


if __name__ == "__main__":
    args = TrainingArguments(
        output_dir="out",
        use_cpu=True,
        per_device_train_batch_size=16,
        num_train_epochs=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=Model(), args=args, train_dataset=Flipped(256))
    trainer.train()
