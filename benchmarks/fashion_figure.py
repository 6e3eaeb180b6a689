"""Fashion-MNIST's figure: error against minibatch, warmups and scalings, BatchNorm's n, zero γ; what is claimed of it.

    make figure-fashion
    python benchmarks/fashion_figure.py --rest    # trains what the committed results lack, and keeps the others

Needs Fashion-MNIST where Debian's package dataset-fashion-mnist puts it, and about 8 hours on two cores, or minutes on
a GPU. Resumable: what runs/fashion-figure holds is not run again. Seeds from 6000 on, and the 10,000 test images: the
recipe was chosen without them (fashion_choice.py). Ten seeds of the base minibatch, five of all else. The claims were
committed before the first run. Writes results/fashion_figure.json and docs/images/fashion*.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from digits_figure import Cell, claimed, draw_figure, known_entries
from onehour.study.spec import label_of, parse_arm

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


def commands(known: dict[Cell, dict[str, Any]], entries: dict[Cell, dict[str, Any]]) -> Iterator[list[str]]:
    """The sweeps of what was not known at the start; arms are at 16× and where the rule broke first, by now."""

    def sweep(sizes: list[int], seeds: int, *arms: str) -> Iterator[list[str]]:
        labels = [label for arm in arms for label in labels_of(arm)] or [""]
        lacking = [size for size in sizes if any(known.get((label, size), {"n": 0})["n"] < seeds for label in labels)]
        if lacking:
            at = ",".join(map(str, lacking))
            chosen = [word for arm in arms or ("none",) for word in ("--arm", arm)]
            axes = ["--minibatch", at, "--seeds", str(seeds), "--reference-seeds", str(seeds)]
            yield ["sweep", *TASK, *axes, "--out", str(OUT), *chosen, *(["--arms-at", at] if arms else [])]

    for seeds in (2, 3, 5):  # a picture early, then a better one
        yield from sweep([BASE * times for times in TIMES], seeds)
    yield from sweep([BASE], 10)
    yield from sweep([SHOWN], 5, "warmup=none,constant", "scaling=fixed,sqrt")
    yield from sweep([SHOWN], 5, "per_worker=8,16,64", "zero_gamma=false")
    yield from sweep(broken_at(entries), 5, "warmup=none,constant", "scaling=fixed,sqrt")


def labels_of(arm: str) -> list[str]:
    """What the entries of an arm are called, one for each of its values."""
    return [label_of(changes) for changes in parse_arm(arm)]


def broken_at(entries: dict[Cell, dict[str, Any]]) -> list[int]:
    """The smallest minibatch above 16× at which the rule has broken, if there is one."""
    means = {size: entry["mean"] for (arm, size), entry in entries.items() if not arm}
    broken = [size for size in sorted(means) if size > SHOWN and means[size] - means[BASE] >= BREAKS]
    return broken[:1]


def claims(means: dict[Cell, float]) -> list[dict[str, Any]]:
    """What was claimed of this figure, and whether it shows it."""
    base = means["", BASE]
    return [
        claimed("an error of at most 6.5 % at 1×", base, "≤", 6.5),
        claimed("8× within 0.5 points of 1×", abs(means["", 8 * BASE] - base), "≤", 0.5),
        claimed("16× at most 1.0 point above 1×", means["", SHOWN] - base, "≤", 1.0),
        claimed("a break by 64×", means["", 64 * BASE] - base, "≥", 5.0),
    ]


def main() -> int:
    """Train what is missing, report it, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rest", action="store_true", help="train only what the committed results lack")
    rest = parser.parse_args().rest
    known = known_entries(__file__) if rest else {}
    entries = dict(known)
    pictures = {} if rest else {"error-against-time": "fashion-time", "curves": "fashion-curves"}
    return draw_figure(__file__, OUT, commands(known, entries), claims, entries=entries, pictures=pictures)


if __name__ == "__main__":
    sys.exit(main())
