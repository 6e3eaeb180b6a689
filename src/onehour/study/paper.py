"""The paper's own tables as data (F1, T1, T2, T3a), judged as any study is: what a study is held beside."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from onehour.config import Recipe
from onehour.study.verdict import Sample, Verdict, judge

SEEDS = 5  # behind each entry of the paper (§5.1)
PAPER_REFERENCE = 256  # the minibatch that the paper compares the others with
OWN = (None, "baseline", "warmup=gradual", "base_lr=0.1", "zero_gamma=true")
"""Labels of the paper's recipe itself; of the entries of a table over minibatches, which have none, too."""


@cache
def paper_table(name: str = "minibatches") -> list[dict[str, Any]]:
    """A table of the paper, a row an entry: ResNet-50 on ImageNet-1k, 90 epochs.

    Args:
        name: "minibatches" (the numbers of F1), "T1" (warmups), "T2a" (rates), "T2b" (the last γ), "T2c" (ResNet-101),
            "T3a, box AP" or "T3a, mask AP" (Mask R-CNN from the weights of each minibatch).

    Returns:
        `minibatch`, `target_lr` (after warmup), `mean` top-1 error in percent over 5 seeds, or average precision; `std`
        in points; `label`, which is what distinguishes it, as an arm is written (not in tables over minibatches).
    """
    return json.loads((resources.files("onehour.study") / "paper.json").read_text(encoding="utf-8"))[name]


def paper_verdicts(name: str = "minibatches", margin: float = 0.5) -> list[tuple[dict[str, Any], Verdict | None]]:
    """Each row of a table of the paper with its verdict, or None where the table has nothing to compare it with.

    It is compared with the paper's recipe at its minibatch; that recipe itself with the one at 256. Of average
    precision what is lost counts as error.
    """
    table = paper_table(name)
    sign = -1 if name.startswith("T3a") else 1
    own = {row["minibatch"]: row for row in table if row.get("label") in OWN}

    def judged(row: dict[str, Any]) -> Verdict | None:
        other = own.get(row["minibatch"])
        other = own.get(PAPER_REFERENCE) if other is row else other
        if other is None or other is row:
            return None
        sample, beside = (Sample(sign * each["mean"], each["std"], SEEDS) for each in (row, other))
        return judge(sample, beside, margin)

    return [(row, judged(row)) for row in table]


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
