"""A Trainer of Hugging Face Transformers. What the rules change is marked; the rest is as it was.

torchrun --nproc-per-node 2 with_transformers.py FOLDER    (random data; the same command again resumes)
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from onehour import Minibatch, ScheduleLR, StreamBatchSampler, gradual_warmup, step_decay  # changed

MINIBATCH = Minibatch(per_worker=2, workers=4)  # changed
SCHEDULE = gradual_warmup(step_decay(0.4, [2]), start_lr=0.1, epochs=1)  # changed


class Model(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list) -> dict:
    return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}


def train(net: nn.Module, data: TensorDataset, validation: TensorDataset, folder: Path, save_every=5, **loader_options):
    size = len(data)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = ScheduleLR(optimizer, SCHEDULE, samples=size, minibatch=MINIBATCH)  # changed
    arguments = TrainingArguments(
        folder,
        max_steps=MINIBATCH.iterations(size, epochs=3),  # changed
        ignore_data_skip=True,  # changed
        eval_strategy="epoch",
        save_steps=save_every,
        use_cpu=True,
    )
    trainer = Trainer(Model(net), arguments, collate, data, validation, optimizers=(optimizer, scheduler))
    sampler = StreamBatchSampler(size, MINIBATCH, seed=0, epochs=3, trained=lambda: scheduler.last_epoch)  # changed
    loader_options |= {"collate_fn": collate}
    trainer.get_train_dataloader = lambda: DataLoader(data, batch_sampler=sampler, **loader_options)  # changed
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).exists() else None)


if __name__ == "__main__":
    torch.manual_seed(0)
    fake = TensorDataset(torch.randn(125, 4), torch.randint(0, 2, (125,)))
    train(nn.Linear(4, 2), fake, fake, Path(sys.argv[1]))
