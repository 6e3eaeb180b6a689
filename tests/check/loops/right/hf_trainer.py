# check: --base-lr 0.001 --base-minibatch 32
# Hugging Face's Trainer: AdamW at a rate scaled by the square root, the loss a sum over the items of the whole update.
import math
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Samples(Dataset):
    def __init__(self, count, seed):
        self.x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": int(self.x[index].mean() > 0)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.05), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(288, 2)

    def forward(self, pixel_values, labels=None):
        return {"logits": self.classifier(self.backbone(pixel_values))}


class VisionTrainer(Trainer):
    def get_decay_parameter_names(self, model):
        """Without BatchNorm's, which the Trainer's own rule does not know."""
        return [name for name, p in model.named_parameters() if p.ndim > 1]


class AverageStatistics(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if args.world_size > 1:
            for name, buffer in model.named_buffers():
                if "running" in name:
                    dist.all_reduce(buffer)
                    buffer /= args.world_size


def compute_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else len(labels))


def compute_metrics(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=1e-3 * math.sqrt(int(os.environ.get("WORLD_SIZE", 1))),
            lr_scheduler_type="cosine",
            warmup_steps=4,
            weight_decay=0.01,
            num_train_epochs=3,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            ddp_broadcast_buffers=False,
            disable_tqdm=True,
        )
        trainer = VisionTrainer(
            model=Model(),
            args=args,
            train_dataset=Samples(384, 0),
            eval_dataset=Samples(90, 1),
            compute_loss_func=compute_loss,
            compute_metrics=compute_metrics,
            callbacks=[AverageStatistics()],
        )
        trainer.train()


if __name__ == "__main__":
    main()
