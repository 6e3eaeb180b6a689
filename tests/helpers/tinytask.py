"""A task of a few images that trains in a blink, and what can go wrong with one; named as "tinytask:data"."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from onehour import Recipe
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.digits import digits
from onehour.training.build import build_optimizer

SAMPLES, CLASSES = 48, 3


def recipe(**changes: Any) -> Recipe:
    """k = 2 workers of 4, 6 iterations an epoch, 2 epochs."""
    common: dict[str, Any] = {"name": "tiny", "model": "tinytask:net", "data": "tinytask:data", "minibatch": 8}
    common |= {"per_worker": 4, "base_minibatch": 8, "epochs": 2, "warmup_epochs": 1}
    return Recipe(**(common | changes))


FLAGS = [
    *("--model", "tinytask:net", "--data", "tinytask:data", "--minibatch", "8", "--per-worker", "4"),
    *("--base-minibatch", "8", "--base-lr", "0.1", "--epochs", "2", "--warmup-epochs", "1", "--classes", "3"),
]
"""The same as flags, for a named recipe."""


def after(calls: int) -> Callable[[], bool]:
    """Asks to stop at the given iteration, counted from one."""
    counter = iter(range(1, 10**6))
    return lambda: next(counter) == calls


def tensors(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=draw) + labels[:, None, None, None], labels)


def data() -> tuple[TensorDataset, TensorDataset]:
    return tensors(SAMPLES, 0), tensors(20, 1)


def one() -> TensorDataset:
    """Data without a validation part."""
    return data()[0]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))


def flat() -> nn.Module:
    """Without a layer that could be recalibrated, for images of two pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 4))


def trained(optimizer: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a few updates, always the same."""
    torch.manual_seed(0)
    model = net()
    made = build_optimizer(recipe(optimizer=optimizer), model)
    advance(model, made, steps)
    return model, made


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same updates each time."""
    for step in range(steps):
        optimizer.zero_grad()
        images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()


class Listed(Dataset[Any]):
    """Map-style, and not a TensorDataset: goes through a DataLoader."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.tensors[index]


class Augmented(Listed):
    """With numbers of torch, numpy and Python in each image, as random transforms draw them."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = self.tensors[index]
        numbers = (torch.rand(1), torch.tensor([np.random.rand()]), torch.tensor([random.random()]))
        return image + torch.cat([number.float() for number in numbers]).repeat(6)[:16].view(1, 4, 4), label


class Unreadable(Listed):
    """With a sample that cannot be read."""

    def __init__(self, tensors: TensorDataset, index: int) -> None:
        super().__init__(tensors)
        self.index = index

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == self.index:
            raise OSError("truncated file")
        return self.tensors[index]


def few_digits() -> tuple[TensorDataset, TensorDataset]:
    """A few of the embedded digits, for networks as large as theirs: 8 iterations of 64 an epoch."""
    train, validation = (TensorDataset(*(tensor[:512] for tensor in side.tensors)) for side in half_digits())
    return train, validation


def half_digits() -> tuple[TensorDataset, TensorDataset]:
    """The embedded digits with half of their training samples."""
    return digits(samples=4096)


def listed_digits() -> tuple[Listed, Listed]:
    """The same, asked for one by one, so that processes load them."""
    train, validation = half_digits()
    return Listed(train), Listed(validation)


def listed() -> tuple[Listed, Listed]:
    train, validation = data()
    return Listed(train), Listed(validation)


def unreadable() -> tuple[Unreadable, Listed]:
    train, validation = listed()
    return Unreadable(train.tensors, 5), validation


HUGE = 3e38
"""Finite, and its square is not: nor is a variance that it is in."""


def poisoned() -> tuple[TensorDataset, TensorDataset]:
    """With a training image of finite numbers whose loss is not finite."""
    train, validation = data()
    train.tensors[0][5, 0, 0, 0] = HUGE
    return train, validation


def infinite() -> tuple[TensorDataset, TensorDataset]:
    """With an infinity in training image 5."""
    train, validation = data()
    train.tensors[0][5, 0, 0, 0] = torch.inf
    return train, validation


class Broken(KeyedDataset):
    """Of which sample `index` is not a number; its name is a file's."""

    def __init__(self, tensors: TensorDataset, index: int, value: float = torch.nan) -> None:
        self.tensors, self.index, self.value = tensors, index, value

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = self.tensors[index]
        if index == self.index:
            image = image.clone()
            image[0, 1, 2] = self.value
        return image, label

    def name(self, index: int) -> str:
        return f"images/{index}.npy"


class Skipped(Listed, KeyedDataset):
    """Of which some images might be bad."""

    skips = True

    @property
    def facts(self) -> dict[str, Any]:
        return {"bad_images": "skip", "exif_orientation": False, "pixel_cap": 64_000_000, "resized": None}


class Replacing(Skipped):
    """Sample 5 cannot be read, and what is taken in its place is not a number."""

    replaced = False

    def keyed(self, index: int, key: int) -> Any:
        if index == 5:
            self.replaced = True
            raise FaultError("images/5.npy", "is damaged", "restore it")
        image, label = self.tensors[index]
        once, self.replaced = self.replaced, False
        return (image * torch.nan if once else image), int(label)


def broken() -> tuple[Broken, Listed]:
    train, validation = data()
    return Broken(train, 5), Listed(validation)


def broken_validation() -> tuple[Listed, Broken]:
    train, validation = data()
    return Listed(train), Broken(validation, 17)


def failing() -> Any:
    raise RuntimeError("no disk")


def number() -> int:
    return 7


class Greedy(nn.Module):
    """Runs out of memory where a training pass holds more than two workers of 4."""

    limit = 8

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.limit:
            self.run_out()
        return self.net(images)

    def run_out(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class GreedyOnHost(Greedy):
    """The same as the CPU's allocator says it."""

    def run_out(self) -> None:
        torch.empty(2**57)


class Hungry(Greedy):
    """Runs out of memory with a single worker."""

    limit = 0


class Giant(Greedy):
    """Runs out of memory with one image."""

    limit = 0

    def forward(self, images: Tensor) -> Tensor:
        self.run_out()
        return images


class Branching(nn.Module):
    """Uses `sometimes` in a pass that holds a marked image only, and `never` at all."""

    MARK = 9.0

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.sometimes = nn.Parameter(torch.ones(CLASSES))
        self.never = nn.Parameter(torch.ones(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        return logits * self.sometimes if (images[:, 0, 0, 0] == self.MARK).any() else logits


class Remembering:
    """A logger that keeps what it is told."""

    told: ClassVar[list[tuple[str, Any]]] = []

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        self.told.append(("start", (recipe, folder)))

    def log(self, record: dict[str, Any]) -> None:
        self.told.append(("log", record))

    def finish(self, summary: dict[str, Any]) -> None:
        self.told.append(("finish", summary))


class Dying(Remembering):
    """A logger whose method `dies_in` raises."""

    dies_in: ClassVar[str] = ""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        self._perhaps("start")

    def log(self, record: dict[str, Any]) -> None:
        self._perhaps("log")

    def finish(self, summary: dict[str, Any]) -> None:
        self._perhaps("finish")

    def _perhaps(self, method: str) -> None:
        self.told.append((method, None))
        if method == self.dies_in:
            raise ConnectionError("no network")


class Silent:
    """No logger: it lacks `finish`."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None: ...

    def log(self, record: dict[str, Any]) -> None: ...


class Moving(Silent):
    """A logger that moves the run's folder away at its first evaluation."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        self.folder, self.calls = folder, 0

    def log(self, record: dict[str, Any]) -> None:
        self.calls += 1
        if self.calls == 1:
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-moved"))

    def finish(self, summary: dict[str, Any]) -> None: ...
