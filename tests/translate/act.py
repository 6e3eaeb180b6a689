"""Trains with a translation as its user would, here or in one of several processes, and keeps what the optimizer did.

As a script: `python act.py TOOL TRANSLATION RESULT`, started alone or by torchrun.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.data import Dataset

FEATURES, CLASSES = 6, 3


def define_operators() -> None:
    """torchvision's operators, which its wheel has for CUDA only and without which it cannot be imported here."""
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    if not hasattr(torch.ops.torchvision, "nms"):
        global _library  # it takes its operators with it
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def execute(text: str) -> dict[str, Any]:
    """What a translation defines."""
    define_operators()
    namespace: dict[str, Any] = {"__name__": "translation"}
    exec(compile(text, "translation.py", "exec"), namespace)
    return namespace


class Points(Dataset):
    """Float64 points with a label each, a pure function of their index."""

    def __init__(self, samples: int):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Named(Points):
    """The same as Transformers wants them."""

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "labels": self.y[index]}


class Block(nn.Module):
    """A residual block with a BatchNorm, whose groups decide the loss."""

    def __init__(self):
        super().__init__()
        self.downsample = None
        self.fc = nn.Linear(FEATURES, FEATURES)
        self.bn = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.fc(x)).relu()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(FEATURES, CLASSES)).double()


class WithLoss(nn.Module):
    """The same for Transformers; its **kwargs make the Trainer believe that it divides by num_items_in_batch."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def act(tool: str, namespace: dict[str, Any], folder: Path) -> tuple[nn.Module, list[float]]:
    """Train a net; returns it, and the rate that its optimizer had at each of its updates."""
    rates: list[float] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        (rate,) = {float(group["lr"]) for group in optimizer.param_groups}
        rates.append(rate)

    hook = register_optimizer_step_pre_hook(keep)
    try:
        return TRAIN[tool](namespace, folder), rates
    finally:
        hook.remove()


def with_torch(namespace: dict[str, Any], folder: Path) -> nn.Module:
    model = net()
    if namespace["PROCESSES"] > 1:
        torch.distributed.init_process_group("gloo")
    namespace["train"](model, Points(namespace["SAMPLES"]))
    return model


def with_accelerate(namespace: dict[str, Any], folder: Path) -> nn.Module:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    model = net()
    namespace["train"](model, Points(namespace["SAMPLES"]))
    return model


def with_lightning(namespace: dict[str, Any], folder: Path) -> nn.Module:
    pytorch = importlib.import_module("lightning.pytorch")

    class Mine(namespace["LargeMinibatch"], pytorch.LightningModule):
        train_dataset = Points(namespace["SAMPLES"])

        def __init__(self):
            super().__init__()
            self.net = net()
            namespace["prepare"](self)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"accelerator": "cpu", "precision": "64-true", "enable_checkpointing": False, "default_root_dir": folder}
    module = Mine()
    namespace["make_trainer"](**quiet, **own).fit(module)
    return module.net


def with_hf(namespace: dict[str, Any], folder: Path) -> nn.Module:
    model = WithLoss()
    dataset = Named(namespace["SAMPLES"])
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    namespace["make_trainer"](model, dataset, str(folder), use_cpu=True, **quiet).train()
    return model.net


TRAIN = {"torch": with_torch, "accelerate": with_accelerate, "lightning": with_lightning, "hf": with_hf}


if __name__ == "__main__":
    tool, translation, result = sys.argv[1:]
    acted, seen = act(tool, execute(Path(translation).read_text(encoding="utf-8")), Path(result).parent)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"state": acted.state_dict(), "rates": seen}, result)
    os._exit(0)  # Gloo's threads abort some interpreters as they end
