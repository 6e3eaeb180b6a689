# The Trainer's default: all processes divide by the tokens of all.
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.net(x)
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        return {"loss": loss / num_items_in_batch, "logits": logits}


def samples(count, seed):
    """Sequences of 1 to 12 tokens, filled up to 12."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, 20, generator=generator)
    y = (x[..., :5].sum(-1) > 0).long()
    y[torch.arange(12) >= torch.randint(1, 13, (count, 1), generator=generator)] = -100
    return [{"x": tokens, "labels": labels} for tokens, labels in zip(x, y, strict=True)]


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
