"""Whether all processes of a run are about to train the same: what decides its numbers beside its recipe, compared.

Compared as short texts before the first iteration, and named where they differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import socket
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.dataset import FaultError, KeyedDataset, as_label, in_memory
from onehour.data.images import Images
from onehour.data.processes import in_child
from onehour.data.samples import Keyed, leaves
from onehour.data.sources import Data
from onehour.dist.devices import build_of
from onehour.dist.group import Group
from onehour.entry import is_entry, make_importable
from onehour.machine import which_cores
from onehour.messages import say
from onehour.rules.keys import random_bits, seed_for

Facts = Mapping[str, Mapping[str, Any]]
"""What a process is about to do: by kind, then by name, values that JSON has."""
DIFFERENT = ("versions",)
"""Kinds that a person may allow to differ."""
NOTHING: Facts = {}
SHOWN, LONGEST = 3, 120
"""Differences of a kind that a message names, and characters of a value at most."""
ADVICE = {
    "versions": "install the same versions, or give --allow-different versions",
    "model": "give the name of a function, or seed before the model is built",
}
LEAST, MOST, SECONDS = 16, 256, 0.1
"""Samples of a side that are looked at: so many at least, at most, and between them as many as come in this time."""
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "onehour")
"""Compared by version, not by file; those that are not imported decide nothing."""
LARGE = 2**28
"""Bytes of a tensor that are read at most; of a larger one every second sample, or fewer."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def agree(group: Group, facts: Facts = NOTHING, *, failed: Exception | None = None, allowed: Sequence[str] = ()) -> int:
    """Compare what all processes say; they call it together.

    Of the recipe every field counts; of other kinds what both have, since a process may know less than another one.

    Args:
        failed: why it cannot go on. Then nobody does, and all hear it.
        allowed: kinds that may differ, if all processes allow it; process 0 then prints how they do.

    Returns:
        How many processes, this one among them, share its cores.

    Raises:
        ValueError: the same in all processes, with what differs, the hosts and both values; or `failed`.
    """
    if group.size > 1:
        mine = {
            "host": socket.gethostname(),
            "cores": which_cores(),
            "facts": facts,
            "failed": None if failed is None else str(failed),
            "allowed": list(allowed),
        }
        said = [json.loads(text) for text in group.gather(json.dumps(mine).encode())]
        allowed = [kind for kind in DIFFERENT if all(kind in each["allowed"] for each in said)]
        refused, borne = refusal(said, allowed)
        if refused:
            raise ValueError(refused) from failed
        if borne and group.rank == 0:
            say(f"warning: as allowed, {borne}", sys.stderr)
        here = [each["cores"] for each in said if each["host"] == mine["host"]]
        return sum(bool(cores & mine["cores"]) for cores in here)
    if failed is not None:
        raise failed
    return 1


def refusal(said: Sequence[Mapping[str, Any]], allowed: Sequence[str] = ()) -> tuple[str, str]:
    """Why processes that say this cannot train together, and what is allowed to differ and does; empty for none.

    Args:
        said: by rank: the host, its facts, and why it failed or None.

    >>> said = [{"host": host, "failed": None, "facts": {"recipe": {"seed": ord(host) - 96}}} for host in "ab"]
    >>> refusal(said)[0]
    'the processes do not train the same: seed is 1 on process 0 (a) and 2 on process 1 (b)'
    """
    failed = {each["failed"] for each in said if each["failed"] is not None}
    if len(failed) == 1 and all(each["failed"] is not None for each in said):
        return failed.pop(), ""
    found: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kind for each in said for kind in each["facts"]):
        found[kind] = list(_differences(said, kind))
    borne = [text for kind in allowed for text in found.pop(kind, [])]
    texts = [text for kind in found for text in _first(found[kind], kind)]
    for rank, each in enumerate(said):
        if each["failed"] is not None:
            return "; ".join([f"{_who(said, rank)} cannot train: {each['failed']}", *texts]), ""
    if not texts:
        return "", "; ".join(borne)
    advice = [text for kind, text in ADVICE.items() if found.get(kind)]
    return f"the processes do not train the same: {'; '.join([*texts, *advice])}", ""


def _first(texts: list[str], kind: str) -> list[str]:
    more = [f"and {len(texts) - SHOWN} more of the {kind}"] if len(texts) > SHOWN else []
    return [*texts[:SHOWN], *more]


def _differences(said: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Of each name that two processes have other values for: process 0, or the first that has one, and another."""
    everything = kind == "recipe"
    texts: list[str] = []
    known = [each["facts"].get(kind) for each in said]
    for name in dict.fromkeys(name for facts in known if facts is not None for name in facts):
        values = {
            rank: facts.get(name, "not given")
            for rank, facts in enumerate(known)
            if facts is not None and (everything or name in facts)
        }
        first, *others = values
        other = [rank for rank in others if values[rank] != values[first]]
        if other:
            more = f", as on {len(other) - 1} more" if len(other) > 1 else ""
            one, two = (f"{_shown(values[rank])} on {_who(said, rank)}" for rank in (first, other[0]))
            texts.append(f"{name} is {one} and {two}{more}")
    return texts


def _who(said: Sequence[Mapping[str, Any]], rank: int) -> str:
    return f"process {rank} ({said[rank]['host']})"


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def facts_of_start(recipe: Recipe, device: torch.device, named: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """The recipe as it was given, the versions, and the source of what is someone's own.

    Args:
        named: models, data, transforms, optimizers and loggers: names as package.module:function, objects, or None.
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
        several: list[Any] = [*named]
        yield from chain.from_iterable(map(_homes, several))
    elif named is not None:
        yield "__main__"
        parts: list[Any] = [*named.modules()] if isinstance(named, nn.Module) else [named]
        for part in parts:
            owner = part if hasattr(part, "__qualname__") else part.__class__
            home = getattr(owner, "__module__", None)
            if isinstance(home, str) and home.split(".")[0] not in LIBRARIES:
                yield home


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
    """
    sides = {"training": data.train, "validation": data.validation}
    numbers = {side: look.samples for side, look in zip(sides, data.looks, strict=True)}
    own = data.form.own
    given = {"classes": recipe.classes, "channels": data.channels, "resized": recipe.resized}
    samples: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for side, dataset in sides.items():
        if in_memory(dataset):
            samples |= _gathered(side, dataset, _chosen(side, recipe.seed, numbers[side]), own=own)
            continue
        others[side] = dataset
        if isinstance(dataset, Images):
            listed = (
                "\0".join(dataset.classes).encode("utf-8", "surrogateescape")
                + np.ascontiguousarray(dataset.source.labels).tobytes()
            )
            samples[f"the digest of all {side} labels"] = _digest(listed)

    def look() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for side, dataset in others.items():
            keyed = Keyed(dataset, recipe.seed, form=data.form)
            found |= _read_some(side, keyed, _chosen(side, recipe.seed, numbers[side]))
        return found

    looked = in_child(look, "the look at samples that all processes compare") if others else {}
    counts = {f"{side} samples": number for side, number in numbers.items()}
    return {"data": counts | given, "samples": looked | samples}


def _chosen(side: str, seed: int, number: int) -> list[int]:
    return list(dict.fromkeys((random_bits(seed_for(seed, f"agreement {side}"), MOST) % np.uint64(number)).tolist()))


def _gathered(side: str, dataset: Any, chosen: list[int], *, own: bool) -> dict[str, Any]:
    if own:
        called = [f"the bytes of all {side} samples' tensor {number}" for number in range(len(dataset.tensors))]
        return {name: _described(t[:: _step(t)]) for name, t in zip(called, dataset.tensors, strict=True)}
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
        if first[0] == again[0] and not keyed.form.own:
            labels[f"the label of {side} sample {index}"] = first[0]
        images[f"the {'tensors' if keyed.form.own else 'image'} of {side} sample {index}"] = first[1]
    return labels | (images if stable else {})


def _read(keyed: Keyed, index: int) -> tuple[int | None, str]:
    try:
        sample = keyed[(0, index)]
    except FaultError as fault:
        if isinstance(keyed.dataset, KeyedDataset) and keyed.dataset.skips:
            return None, f"none, since it {fault.problem}"
        raise
    if keyed.form.own:
        return None, "; ".join(_described_leaf(leaf) for leaf in leaves(sample))
    image, label = sample
    return as_label(label), _described(image)


def _described_leaf(leaf: Any) -> str:
    if isinstance(leaf, Tensor | np.ndarray | np.generic):
        return _described(torch.as_tensor(leaf))
    return ADDRESS.sub("", repr(leaf))


def facts_of_model(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The model's layers, its initial weights and buffers, the optimizer's groups, and the source of both."""
    layers: dict[str, Any] = {}
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    for name, module in modules:
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
            plain: Any = value
            if key == "params":
                text = ", ".join(names.get(id(parameter), "?") for parameter in plain)
            else:
                text = ADDRESS.sub("", repr(plain.tolist() if torch.is_tensor(value) else plain))
            groups[f"{key} of the optimizer's group {number}"] = text
    return {"model": layers, "optimizer": groups, "source": dict(_sources([model, optimizer]))}


def _described(tensor: Tensor) -> str:
    """A tensor's shape, type and digest."""
    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return f"{str(plain.dtype).removeprefix('torch.')} {tuple(plain.shape)} with digest {_digest(content)}"


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()
