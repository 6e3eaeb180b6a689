# Every process has a batch of 32, however many processes there are.
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class AverageStatistics(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        for name, buffer in model.named_buffers():
            if args.world_size > 1 and "running" in name:
                dist.all_reduce(buffer)
                buffer /= args.world_size


def samples(count, seed):
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": int(row[:5].sum() > 0)} for row in x]


if __name__ == "__main__":
    args = TrainingArguments(
        output_dir="out",
        use_cpu=True,
        per_device_train_batch_size=32,
        num_train_epochs=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_broadcast_buffers=False,
    )
    trainer = Trainer(model=Model(), args=args, train_dataset=samples(256, 0), callbacks=[AverageStatistics()])
    trainer.train()
