"""Fashion-MNIST's figure: error against minibatch, warmups and scalings, BatchNorm's n, zero γ; what is claimed of it.

    make figure-fashion

Needs Fashion-MNIST where Debian's package dataset-fashion-mnist puts it, and about 8 hours on two cores, or minutes on
a GPU. Resumable: what runs/fashion-figure holds is not run again. Seeds from 6000 on, and the 10,000 test images: the
recipe was chosen without them (fashion_choice.py). Ten seeds of the base minibatch, five of all else. The claims were
committed before the first run. Writes results/fashion_figure.json and docs/images/fashion*.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from digits_figure import claimed, draw_figure
from onehour.study.results import Study, read_study

OUT = Path("runs") / "fashion-figure"
TASK = ["fashion", "--seed", "6000", "--precision", "bf16", "--channels-last"]
TASK += [] if torch.cuda.is_available() else ["--seeds-together", "1"]
"""bf16 and NHWC: half the time on a CPU that multiplies in bf16, as on GPUs. Several seeds as one network take longer
on a CPU: convolutions of 64 channels are fast one by one."""
BASE = 64
TIMES = (1, 2, 4, 8, 16, 32, 64, 128)
SHOWN = 16 * BASE
BREAKS = 1.0
"""Points above the base minibatch at which the rule has broken."""


def commands() -> Iterator[list[str]]:
    """The sweeps; the arms are trained at 16× and where the first one broke."""

    def sweep(sizes: list[int], seeds: int, *arms: str) -> list[str]:
        axes = ["--minibatch", ",".join(map(str, sizes)), "--seeds", str(seeds), "--reference-seeds", str(seeds)]
        chosen = [word for arm in arms for word in ("--arm", arm)]
        at = ["--arms-at", ",".join(map(str, sizes))] if arms != ("none",) else []
        return ["sweep", *TASK, *axes, "--out", str(OUT), *chosen, *at]

    for seeds in (2, 3, 5):  # a picture early, then a better one
        yield sweep([BASE * times for times in TIMES], seeds, "none")
    yield sweep([BASE], 10, "none")
    yield sweep([SHOWN, *broken_at(read_study([OUT]))], 5, "warmup=none,constant", "scaling=fixed,sqrt")
    yield sweep([SHOWN], 5, "per_worker=8,16,64", "zero_gamma=false")


def broken_at(study: Study) -> list[int]:
    """The smallest minibatch above 16× at which the rule has broken, if there is one."""
    means = {entry.minibatch: entry.mean for entry in study.flat if entry.minibatch is not None}
    broken = [size for size, mean in means.items() if size > SHOWN and mean - means[BASE] >= BREAKS]
    return broken[:1]


def claims(study: Study) -> list[dict[str, Any]]:
    """What was claimed of this figure, and whether it shows it."""
    means = {entry.minibatch: entry.mean for entry in study.flat}
    base = means[BASE]
    return [
        claimed("an error of at most 6.5 % at 1×", base, "≤", 6.5),
        claimed("8× within 0.5 points of 1×", abs(means[8 * BASE] - base), "≤", 0.5),
        claimed("16× at most 1.0 point above 1×", means[SHOWN] - base, "≤", 1.0),
        claimed("a break by 64×", means[64 * BASE] - base, "≥", 5.0),
    ]


def main() -> int:
    """Train what is missing, report it, write the results."""
    pictures = {"error-against-minibatch": "fashion", "error-against-time": "fashion-time", "curves": "fashion-curves"}
    return draw_figure(__file__, OUT, commands(), claims, pictures)


if __name__ == "__main__":
    sys.exit(main())
