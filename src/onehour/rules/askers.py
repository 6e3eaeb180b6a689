"""What asks a sampler for its batches or its length, where a framework would use them wrongly without a word."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

FIX_THE_LENGTH = (
    *("lightning.pytorch.", "pytorch_lightning.", "transformers."),
    *("lightning.fabric.utilities.data.", "lightning_fabric.utilities.data."),
)
"""They take the first epoch's length for all; where there is no length, they go by the end of each iterator."""


@dataclass
class Asker:
    """What Accelerate does with the batches that are asked for.

    Args:
        accelerate: whether it is there at all.
        processes: among how many it divides them; 1 where it does not.
        splits: whether each process gets a part of every batch, rather than every p-th batch.
        skips: whether it leaves out the first ones.
        epoch: the one that its loader is at; where it divides batches it keeps that to itself.
    """

    accelerate: bool = False
    processes: int = 1
    splits: bool = False
    skips: bool = False
    epoch: int | None = None


def asker() -> Asker:
    """Who asks this package, past torch's DataLoader."""
    found = Asker()
    callers, _ = _callers("torch.", "onehour.", "accelerate.")
    for module, by in callers:
        kind = type(by).__name__
        found.accelerate |= module.startswith("accelerate.")
        found.skips |= kind == "SkipBatchSampler"
        if kind == "DataLoaderShard" and by is not None:
            found.epoch = by.iteration
        if kind == "BatchSamplerShard" and by is not None:
            found.processes, found.splits = by.num_processes, by.split_batches
        elif kind == "DataLoaderDispatcher" and by is not None:  # process 0 reads for all
            found.processes, found.splits = by.state.num_processes, by.split_batches
    return found


def fixes_its_length() -> bool:
    """Whether a framework asks that takes the length of one epoch for every one."""
    _, beyond = _callers("torch.", "onehour.", "accelerate.")
    return beyond.startswith(FIX_THE_LENGTH)


def _callers(*packages: str) -> tuple[list[tuple[str, Any]], str]:
    """Who leads to the caller of this, the nearest first.

    Returns:
        Of each frame of these packages its module and its `self`, and the module that lies behind them.
    """
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    found: list[tuple[str, Any]] = []
    try:
        while frame is not None and _module(frame).startswith(packages):
            found.append((_module(frame), frame.f_locals.get("self")))
            frame = frame.f_back
        return found, _module(frame) if frame is not None else ""
    finally:
        del frame  # a frame that is kept keeps a loader, whose processes then end late: ten seconds after it


def _module(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}."
