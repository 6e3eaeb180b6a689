"""The paper's own tables as data (F1, T1, T2a, T2b): what a study is held beside."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from onehour.config import Recipe
from onehour.study.verdict import Sample, judge_minibatches

SEEDS = 5  # behind each entry of the paper (§5.1)
PAPER_REFERENCE = 256  # the minibatch that the paper compares the others with


@cache
def _tables() -> dict[str, Any]:
    return json.loads((resources.files("onehour.study") / "paper.json").read_text(encoding="utf-8"))


def paper_table(name: str = "minibatches") -> list[dict[str, Any]]:
    """A table of the paper: error over minibatches (the numbers of F1), warmups (T1), rates (T2a) or the last γ (T2b).

    Returns:
        ResNet-50 on ImageNet-1k, 90 epochs, a row an entry: `minibatch`, `target_lr` (after warmup), `mean` top-1 error
        in percent over 5 seeds; `std` in points where it is known (not in T2a and T2b); `label`, which is what
        distinguishes it, as an arm is written (not in the table over minibatches).

    >>> [(row["label"], row["mean"]) for row in paper_table("T1") if row["minibatch"] == 8192]
    [('warmup=none', 24.84), ('warmup=constant', 25.88), ('warmup=gradual', 23.74)]
    """
    return _tables()[name]


def paper_samples() -> dict[int, Sample]:
    """The table over minibatches, ready for `judge_minibatches`."""
    return {row["minibatch"]: Sample(row["mean"], row["std"], SEEDS) for row in paper_table()}


def paper_states(margin: float) -> dict[int, str]:
    """The verdict on each of the paper's minibatches."""
    verdicts = judge_minibatches(PAPER_REFERENCE, paper_samples(), margin)
    return {size: verdicts[size].state if size in verdicts else "reference" for size in paper_samples()}


def paper_cost(arm: tuple[tuple[str, str], ...], recipe: Recipe | None) -> float | None:
    """What the change costs in the paper, in points, at a minibatch of 8k; None where it is not in its tables."""
    if recipe is None or len(arm) != 1:
        return None
    ((name, value),) = arm
    own = {"warmup": "gradual", "scaling": "linear", "zero_gamma": True}
    if name in own and getattr(recipe, name) != own[name]:
        return None
    label = f"{name}={0.1 * float(value) / recipe.base_lr:.12g}" if name == "base_lr" else f"{name}={value}"
    for table, reference in (("T1", "warmup=gradual"), ("T2a", "base_lr=0.1"), ("T2b", "zero_gamma=true")):
        errors = {row["label"]: row["mean"] for row in paper_table(table) if row["minibatch"] == 8192}
        if label in errors and label != reference:
            return errors[label] - errors[reference]
    return None
