import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def samples(count, seed):
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": int(row[:5].sum() > 0)} for row in x]


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
    trainer = Trainer(model=Model(), args=args, train_dataset=samples(256, 0))
    trainer.train()
