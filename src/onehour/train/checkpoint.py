"""A checkpoint: weights, velocity, statistics, where the run stands, and a manifest of digests written last.

No pickle and no generator states: everything random is keyed. Process 0 alone writes, finds the latest and reads;
the others get its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.dist.group import Group
from onehour.train.tensorfile import write_bytes, write_tensors

__all__ = [
    "CHECKPOINTS",
    "digest_of",
    "latest_contents",
    "load_latest",
    "model_state",
    "optimizer_state",
    "save_checkpoint",
]

CHECKPOINTS = "checkpoints"
KEPT = 2
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")


def model_state(model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Weights and buffers by torch's names, in CPU memory.

    Args:
        copy: False shares the model's own memory where it can: for a reader that is done before the next step.

    >>> list(model_state(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        # Tied weights: safetensors wants each name to have memory of its own.
        state[name] = _on_host(tensor, copy=copy or tensor.data_ptr() in seen)
        seen.add(tensor.data_ptr())
    return state


def optimizer_state(optimizer: Optimizer, model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Velocity and whatever else the optimizer keeps, by parameter/key; `copy` as for `model_state`.

    >>> model = nn.Linear(2, 1)
    >>> optimizer_state(torch.optim.SGD(model.parameters(), lr=0.1), model)
    {}
    """
    return {
        f"{name}/{key}": _on_host(value, copy=copy) if torch.is_tensor(value) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def digest_of(*states: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> Path:
    """Write a checkpoint of iteration progress["iteration"]: complete under its name, or not there at all.

    The recipe is beside it in the run's folder. Keeps the last two.

    Returns:
        Its folder.
    """
    parent = folder / CHECKPOINTS
    final = parent / f"iteration-{progress['iteration']:09d}"
    writing = parent / f".writing-{final.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    model_file, optimizer_file, progress_file = FILES
    manifest = {
        model_file: write_tensors(writing / model_file, model_state(model, copy=False)),
        optimizer_file: write_tensors(writing / optimizer_file, optimizer_state(optimizer, model, copy=False)),
        progress_file: write_bytes(writing / progress_file, json.dumps(progress, indent=2).encode()),
    }
    write_bytes(writing / "manifest.json", json.dumps(manifest, indent=2).encode())
    _sync_folder(writing)
    if final.exists():  # the same iteration again, after a resume: the same bytes
        shutil.rmtree(final)
    writing.rename(final)
    _sync_folder(parent)
    for old in sorted(parent.glob("iteration-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path, model: nn.Module, optimizer: Optimizer, group: Group) -> dict[str, Any] | None:
    """Load the newest checkpoint that its manifest verifies; None where there is none.

    Raises:
        ValueError: if checkpoints exist and none verifies, or the newest is of another model.
    """
    found = latest_contents(folder) if group.rank == 0 else None
    contents = [group.broadcast(found[number] if found else None) for number in range(len(FILES))]
    if contents[0] is None or contents[1] is None or contents[2] is None:
        return None
    try:
        model.load_state_dict(load(contents[0]))
    except RuntimeError as error:
        raise ValueError(
            f"{folder / CHECKPOINTS} is of another model: {str(error).splitlines()[-1].strip()}"
        ) from error
    _load_optimizer(optimizer, model, load(contents[1]))
    return json.loads(contents[2])


def latest_contents(folder: Path) -> list[bytes] | None:
    """The files of the newest checkpoint that its manifest verifies, in the order of `FILES`; None without one.

    Raises:
        ValueError: if checkpoints exist and none verifies.

    >>> latest_contents(Path("nowhere")) is None
    True
    """
    parent = folder / CHECKPOINTS
    names = sorted(parent.glob("iteration-*"), reverse=True)
    problems = []
    for name in names:
        try:
            manifest = json.loads((name / "manifest.json").read_bytes())
            contents = [(name / file).read_bytes() for file in FILES]
            wrong = [
                file
                for file, content in zip(FILES, contents, strict=True)
                if hashlib.sha256(content).hexdigest() != manifest[file]["sha256"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{name.name}: {error}")
            continue
        if not wrong:
            return contents
        problems.append(f"{name.name}: {wrong[0]} differs from its digest")
    if problems:
        raise ValueError(f"no checkpoint in {parent} can be trusted ({'; '.join(problems)}); start over with --fresh")
    return None


def _load_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        on_host = part == "step" and not getattr(optimizer, "_step_supports_amp_scaling", False)
        value = value if on_host else value.to(parameter.device)
        known = optimizer.state[parameter].get(part)
        if torch.is_tensor(known):
            known.copy_(value)
        else:
            optimizer.state[parameter][part] = value


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    tensor = tensor.detach()
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes  # a view: safetensors would write all of its memory
    return tensor.to("cpu", copy=copy or shares).contiguous()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
