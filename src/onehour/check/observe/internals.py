"""What is known of torch's inside, by its private names; a test says which of them a new torch has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

BATCHNORM = _BatchNorm  # the class of every BatchNorm, SyncBatchNorm too
REFUSES_CPU = "_passing_sync_batchnorm_handle"
"""DistributedDataParallel's method that refuses a SyncBatchNorm on a CPU."""


def import_compiler() -> None:
    """Import what every optimizer of torch imports at last: its compiler, which takes as long as torch itself."""
    import torch._dynamo  # noqa: F401


def renew(copied: DataLoader, fresh: DataLoader) -> None:
    """Give a copy of a loader what the loader has now; its sampler and its processes stay."""
    kept = vars(copied)
    same = {name: kept[name] for name in ("sampler", "batch_sampler", "_iterator") if name in kept}
    kept.update(vars(fresh) | same)


def without_processes(loader: DataLoader) -> None:
    """Take a copied loader's own processes away: its batches stay the same, and none of them waits."""
    vars(loader).update(num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False, _iterator=None)
    vars(loader)["_DataLoader__multiprocessing_context"] = None


def hand_over(copied: DataLoader, loader: DataLoader) -> None:
    """Processes that persist go on with the loader that they were made for."""
    iterator = vars(copied).get("_iterator")
    if iterator is not None and vars(loader).get("_iterator") is None:
        iterator._index_sampler = loader._index_sampler  # pyright: ignore[reportAttributeAccessIssue]
        vars(loader)["_iterator"] = iterator


def parts_of(scheduler: Any) -> list[Any]:
    """The schedulers that a SequentialLR or a ChainedScheduler steps."""
    parts = getattr(scheduler, "_schedulers", None)
    return [part for part in parts if hasattr(part, "step")] if isinstance(parts, list) else []


def as_if_stepped(optimizer: Optimizer) -> None:
    """A scheduler of it warns of no missing step."""
    vars(optimizer)["_opt_called"] = True


def step_unseen(optimizer: Optimizer) -> None:
    """The class's own step without torch's wrapper, so that nobody's hooks see it."""
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    with torch.no_grad():
        step(optimizer)  # type: ignore[call-arg]


def exponent(node: Any) -> float:
    """Of a power, or the order of a norm."""
    return float(getattr(node, "_saved_exponent", getattr(node, "_saved_ord", 2)))
