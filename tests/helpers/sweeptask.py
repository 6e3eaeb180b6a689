"""Sweeps of a small task that takes its time; as a script, a process that sweeps and can be killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import tinytask
from torch import Tensor, nn

from onehour.data.sources import complete
from onehour.execution import Execution
from onehour.study.spec import SweepSpec
from onehour.sweeps.sweep import Work, train_sweep

HERE = Execution(device="cpu", threads=1)
PAUSE = float(os.environ.get("PAUSE", "0.05"))
"""Seconds of an iteration."""


def slow() -> nn.Module:
    return nn.Sequential(Pause(), tinytask.net())


def telling() -> nn.Module:
    """Prints where it is built."""
    print(f"built in {os.environ.get('PLACE')}")
    return tinytask.net()


def breaking() -> nn.Module:
    """Fails in training, with an error that is none of ours."""
    return nn.Sequential(Break(), tinytask.net())


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise KeyError("a bug of my own")
        return x


class Pause(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(PAUSE)
        return x


def spec(*, minibatches: tuple[int, ...] = (8, 16), seeds: int = 2, arms: Any = (), **changes: Any) -> SweepSpec:
    """Of the tiny task; k = 2 and 4 workers, 12 and 6 iterations."""
    recipe, _ = complete(tinytask.recipe(**changes))
    at = minibatches[-1:] if arms else ()
    return SweepSpec(recipe=recipe, minibatches=minibatches, seeds=tuple(range(seeds)), arms=arms, arms_at=at)


def names(work: Work) -> list[list[str]]:
    """The folders of each task."""
    return [[folder.name for folder in task.folders] for task in work.tasks]


def slow_spec() -> SweepSpec:
    """Eight cells; two seconds of pauses on two processes."""
    return spec(seeds=4, model="sweeptask:slow")


if __name__ == "__main__":
    for _ in train_sweep(slow_spec(), Path(sys.argv[1]), jobs=2, execution=HERE, together=1):
        pass
