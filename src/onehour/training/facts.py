"""What decides a run's numbers beside its recipe, as short texts that processes can compare."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.images import Images
from onehour.data.look import as_label, in_memory
from onehour.data.processes import in_child
from onehour.data.samples import Keyed
from onehour.data.sources import Data
from onehour.entry import is_entry, make_importable
from onehour.rules.keys import random_bits, seed_for
from onehour.training.determinism import build_of

__all__ = ["facts_of_data", "facts_of_model", "facts_of_start"]

LEAST, MOST, SECONDS = 16, 256, 0.1
"""Samples of a side that are looked at: so many at least, at most, and between them as many as come in this time."""
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "onehour")
"""Compared by version, not by file; those that are not imported decide nothing."""
LARGE = 2**28
"""Bytes of a tensor that are read at most; of a larger one every second sample, or fewer."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def facts_of_start(recipe: Recipe, device: torch.device, named: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The recipe as it was given, the versions, and the source of what is someone's own.

    Args:
        named: models, data, optimizers and loggers: names as package.module:function, objects, or None.

    >>> facts_of_start(Recipe(seed=7), torch.device("cpu"), ["onehour.models.small:resnet8"])["source"]
    {}
    """
    return {"recipe": recipe.as_dict(), "versions": _versions(recipe, device), "source": dict(_sources(named))}


def _versions(recipe: Recipe, device: torch.device) -> dict[str, str]:
    import onehour

    found = {"the version of Python": ".".join(platform.python_version_tuple()[:2])}
    for name in (*LIBRARIES, "PIL"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[f"the version of {name}"] = str(version)
    found["the source of onehour"] = _digest_of_folder(Path(onehour.__file__).parent)
    if recipe.reduce == "canonical":  # whose bits are a promise
        found |= {f"{key} of a canonical run": value for key, value in build_of(device).items()}
    return found


@cache
def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _sources(named: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The modules that hold what is named, and those beside them that are imported, each with its file's digest."""
    for home in dict.fromkeys(home for each in named for home in _homes(each)):
        file = _file_of(home)
        if file is None:
            continue
        yield from _source(home, file)
        package, *inner = home.split(".")
        beside = None if _installed(file) else file.parents[len(inner) + (file.name == "__init__.py")]
        for name, module in list(sys.modules.items()):
            other = getattr(module, "__file__", None)
            if name.split(".")[0] in LIBRARIES or not isinstance(other, str):
                continue
            path = Path(other)
            if name.split(".")[0] == package or (beside in path.parents and not _installed(path)):
                yield from _source(name, path)


def _source(name: str, file: Path) -> Iterator[tuple[str, str]]:
    try:
        yield f"the source of {name}", _digest(file.read_bytes())
    except OSError:
        return


def _homes(named: Any) -> Iterator[str]:
    """The modules of a name, of an object, of a model's parts, or of each of several."""
    if isinstance(named, str):
        if is_entry(named) and named.partition(":")[0].split(".")[0] not in LIBRARIES:
            yield named.partition(":")[0]
    elif isinstance(named, tuple | list):
        for each in named:
            yield from _homes(each)
    elif named is not None:
        yield "__main__"
        parts = named.modules() if isinstance(named, nn.Module) else [named]
        homes = (getattr(part if hasattr(part, "__qualname__") else type(part), "__module__", None) for part in parts)
        yield from (home for home in homes if isinstance(home, str) and home.split(".")[0] not in LIBRARIES)


def _file_of(module: str) -> Path | None:
    """Found without importing it: of a logger only process 0 does."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module not in sys.modules:
        with suppress(ImportError, ValueError):
            make_importable()
            spec = importlib.util.find_spec(module)
            file = spec.origin if spec is not None and spec.has_location else None
    return None if file is None else Path(file)


@cache
def _installed(file: Path) -> bool:
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")}
    return any(Path(place) in file.parents for place in places)


def facts_of_data(recipe: Recipe, data: Data) -> dict[str, dict[str, Any]]:
    """How much data there is, and what samples it gives under keys that follow from the recipe's seed.

    All of it where it lies in memory as tensors, all labels where they are known, and of the rest some samples, which a
    process of their own reads. A side whose images differ from one reading to the next says nothing of its images.

    Args:
        recipe: completed.

    Raises:
        ValueError: if a sample cannot be read.

    >>> from onehour.data.sources import load_data
    >>> facts_of_data(Recipe(samples=8192), load_data("digits"))["data"]["validation samples"]
    4096
    """
    sides = {"training": data.train, "validation": data.validation}
    numbers = {side: look.samples for side, look in zip(sides, data.looks, strict=True)}
    given = {"classes": recipe.classes, "channels": data.channels, "resized": recipe.resized}
    samples: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for side, dataset in sides.items():
        if in_memory(dataset):
            samples |= _gathered(side, dataset, _chosen(side, recipe.seed, numbers[side]))
            continue
        others[side] = dataset
        if isinstance(dataset, Images):
            listed = "\0".join(dataset.classes).encode() + np.ascontiguousarray(dataset.source.labels).tobytes()
            samples[f"the digest of all {side} labels"] = _digest(listed)

    def look() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for side, dataset in others.items():
            found |= _read_some(side, Keyed(dataset, recipe.seed), _chosen(side, recipe.seed, numbers[side]))
        return found

    looked = in_child(look, "the look at samples that all processes compare") if others else {}
    counts = {f"{side} samples": number for side, number in numbers.items()}
    return {"data": counts | given, "samples": looked | samples}


def _chosen(side: str, seed: int, number: int) -> list[int]:
    return list(dict.fromkeys((random_bits(seed_for(seed, f"agreement {side}"), MOST) % np.uint64(number)).tolist()))


def _gathered(side: str, dataset: Any, chosen: list[int]) -> dict[str, Any]:
    images, labels = dataset.tensors
    return {f"the label of {side} sample {index}": labels[index].item() for index in chosen} | {
        f"the bytes of all {side} images": _described(images[:: _step(images)]),
        f"the bytes of all {side} labels": _described(labels),
    }


def _step(tensor: Tensor) -> int:
    """So that no more than `LARGE` bytes are read."""
    return 1 + tensor.numel() * tensor.element_size() // LARGE


def _read_some(side: str, keyed: Keyed, chosen: list[int]) -> dict[str, Any]:
    """Labels and digests of some samples, each read twice unless it is known to be a function of its key."""
    labels: dict[str, Any] = {}
    images: dict[str, Any] = {}
    stable, until = True, time.monotonic() + SECONDS
    for count, index in enumerate(chosen):
        if count >= LEAST and time.monotonic() > until:
            break
        first = _read(keyed, index)
        again = first if isinstance(keyed.dataset, Images) else _read(keyed, index)
        stable = stable and first[1] == again[1]
        if first[0] == again[0]:
            labels[f"the label of {side} sample {index}"] = first[0]
        images[f"the image of {side} sample {index}"] = first[1]
    return labels | (images if stable else {})


def _read(keyed: Keyed, index: int) -> tuple[int | None, str]:
    try:
        image, label = keyed[(0, index)]
    except FaultError as fault:
        if isinstance(keyed.dataset, KeyedDataset) and keyed.dataset.skips:
            return None, f"none, since it {fault.problem}"
        raise
    return as_label(label), _described(image)


def facts_of_model(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The model's layers, its initial weights and buffers, the optimizer's groups, and the source of both.

    >>> model = nn.Linear(2, 1)
    >>> facts_of_model(model, torch.optim.SGD(model.parameters(), lr=0.1))["optimizer"]["lr of the optimizer's group 0"]
    '0.1'
    """
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        title = f"the layer {name}" if name else "the model"
        layers[title] = ADDRESS.sub("", f"{type(module).__qualname__}({module.extra_repr()})")
        numbers = {key: repr(value) for key, value in vars(module).items() if isinstance(value, float)}
        layers |= {f"{key} of {title}": value for key, value in numbers.items() if not key.startswith("_")}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        fixed = ", not trained" if isinstance(tensor, nn.Parameter) and id(tensor) not in trained else ""
        layers[f"the initial {name}"] = _described(tensor) + fixed
    names = {id(tensor): name for name, tensor in tensors}
    groups: dict[str, Any] = {"the optimizer": type(optimizer).__qualname__}
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            plain = value.tolist() if isinstance(value, Tensor) else value
            text = ", ".join(names.get(id(p), "?") for p in value) if key == "params" else ADDRESS.sub("", repr(plain))
            groups[f"{key} of the optimizer's group {number}"] = text
    return {"model": layers, "optimizer": groups, "source": dict(_sources([model, optimizer]))}


def _described(tensor: Tensor) -> str:
    """A tensor's shape, type and digest.

    >>> _described(torch.zeros(2, 3))[:19]
    'float32 (2, 3) with'
    """
    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return f"{str(plain.dtype).removeprefix('torch.')} {tuple(plain.shape)} with digest {_digest(content)}"


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()
