"""The paper's own tables as data (F1, T1, T2a, T2b): what a study is held beside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from onehour.study.statistics import Sample

__all__ = ["PaperEntry", "paper_samples", "paper_table"]

SEEDS = 5
"""Runs behind each entry of the paper (§5.1)."""


@dataclass(frozen=True)
class PaperEntry:
    """An entry of one of the paper's tables: ResNet-50 on ImageNet-1k, 90 epochs.

    Args:
        minibatch: kn.
        target_lr: η̂, the rate after warmup.
        mean: top-1 error in percent over the seeds.
        std: over the seeds, in points; None where it is not at hand (T2a, T2b).
        label: what distinguishes it, as an arm is written; "" in the table over minibatches.
        n: how many seeds.

    >>> PaperEntry(minibatch=8192, target_lr=3.2, mean=23.74, std=0.09).sample
    Sample(mean=23.74, std=0.09, n=5, values=None)
    """

    minibatch: int
    target_lr: float
    mean: float
    std: float | None = None
    label: str = ""
    n: int = SEEDS

    @property
    def sample(self) -> Sample | None:
        """For a verdict; None without a std.

        >>> paper_table("T2a")[0].sample is None
        True
        """
        return None if self.std is None else Sample.known(self.mean, self.std, self.n)


def paper_table(name: Literal["minibatches", "T1", "T2a", "T2b"] = "minibatches") -> tuple[PaperEntry, ...]:
    """A table of the paper: error over minibatches (the numbers of F1), warmups (T1), rates (T2a) or the last γ (T2b).

    >>> [(entry.label, entry.mean) for entry in paper_table("T1") if entry.minibatch == 8192]
    [('warmup=none', 24.84), ('warmup=constant', 25.88), ('warmup=gradual', 23.74)]
    """
    return tuple(PaperEntry(**row) for row in _tables()[name])


def paper_samples() -> dict[int, Sample]:
    """The table over minibatches, ready for `judge_minibatches`; the paper's reference is 256.

    >>> from onehour.study.verdict import judge_minibatches, summary
    >>> summary(256, judge_minibatches(256, paper_samples()))
    'holds to 8192, worse at 16384'
    """
    return {entry.minibatch: Sample.known(entry.mean, entry.std, entry.n) for entry in paper_table() if entry.std}


def _tables() -> dict[str, Any]:
    return json.loads((resources.files("onehour.study") / "paper.json").read_text(encoding="utf-8"))
