"""Trains with a translation as its user would, here or in one of several processes, and keeps what the optimizer did.

As a script: `python act.py TOOL TRANSLATION RESULT`, started alone or by torchrun.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

from onehour.config import Recipe

FEATURES, CLASSES = 6, 3


def small(**changes: Any) -> Recipe:
    """500 iterations, 20 5/6 in each of 24 epochs, so that boundaries fall between them; two workers."""
    size: dict[str, Any] = {"samples": 1000, "minibatch": 48, "per_worker": 24, "base_minibatch": 12}
    plain = Recipe(name="small", base_lr=0.01, epochs=24, milestones=("8", "16", "64/3"), **size)
    return plain.replace(**changes)


def execute(text: str) -> dict[str, Any]:
    """What a translation defines."""
    namespace: dict[str, Any] = {"__name__": "translation"}
    exec(compile(text, "translation.py", "exec"), namespace)
    return namespace


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer computes with, but not the rate, and where and how fast."""
    return {k: v for k, v in group.items() if k not in {"lr", "initial_lr", "params", "fused", "foreach"}}


def points(samples: int = 1000) -> TensorDataset:
    """Float64 points with a label each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


class Block(nn.Module):
    """A residual block with a BatchNorm, whose groups decide the loss."""

    def __init__(self):
        super().__init__()
        self.downsample = None
        self.fc = nn.Linear(FEATURES, FEATURES)
        self.bn = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.fc(x)).relu()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(FEATURES, CLASSES)).double()


class WithLoss(nn.Module):
    """The same for Transformers; its **kwargs make the Trainer believe that it divides by num_items_in_batch."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def act(tool: str, namespace: dict[str, Any], folder: Path, **options: Any) -> tuple[nn.Module, list[float]]:
    """Train a net; returns it, and the rate that its optimizer had at each of its updates."""
    rates: list[float] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        (rate,) = {float(group["lr"]) for group in optimizer.param_groups}
        rates.append(rate)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        return TRAIN[tool](namespace, folder, **options), rates
    finally:
        hook.remove()


def with_loop(namespace: dict[str, Any], folder: Path) -> nn.Module:
    model = net()
    if namespace["PROCESSES"] > 1 and "Accelerator" not in namespace:
        torch.distributed.init_process_group("gloo")
    namespace["train"](model, points(namespace["SAMPLES"]))
    return model


def with_lightning(namespace: dict[str, Any], folder: Path, resume: bool = False, **options: Any) -> nn.Module:
    class Mine(namespace["LargeMinibatch"], importlib.import_module("lightning").LightningModule):
        train_dataset = points(namespace["SAMPLES"])

        def __init__(self):
            super().__init__()
            self.net = net()
            namespace["prepare"](self)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    own = {"accelerator": "cpu", "precision": "64-true", "enable_checkpointing": False}
    module, trainer = Mine(), namespace["make_trainer"](**quiet, **own, **options)
    trainer.fit(module, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=False)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.net


def with_hf(namespace: dict[str, Any], folder: Path) -> nn.Module:
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}

    model, own = WithLoss(), {"trainer_options": {"data_collator": collate}, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    namespace["make_trainer"](model, points(namespace["SAMPLES"]), str(folder), **own, **quiet).train()
    return model.net


TRAIN = {"torch": with_loop, "accelerate": with_loop, "lightning": with_lightning, "hf": with_hf}


if __name__ == "__main__":
    tool, translation, result = sys.argv[1:]
    acted, seen = act(tool, execute(Path(translation).read_text(encoding="utf-8")), Path(result).parent)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"state": acted.state_dict(), "rates": seen}, result)
    os._exit(0)  # Gloo's threads abort some interpreters as they end
