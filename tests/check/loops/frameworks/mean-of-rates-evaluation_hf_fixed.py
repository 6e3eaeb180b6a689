# Correct predictions are summed, and divided once by the number of samples.
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


class Accuracy:
    def __init__(self):
        self.correct = self.total = 0

    def __call__(self, prediction, compute_result=False):
        self.correct += (prediction.predictions.argmax(-1) == prediction.label_ids).sum().item()
        self.total += len(prediction.label_ids)
        if not compute_result:
            return None
        accuracy, self.correct, self.total = self.correct / self.total, 0, 0
        return {"accuracy": accuracy}


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
        per_device_eval_batch_size=16,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        batch_eval_metrics=True,
    )
    trainer = Trainer(
        model=Model(), args=args, train_dataset=samples(256, 0), eval_dataset=samples(75, 1), compute_metrics=Accuracy()
    )
    trainer.train()
