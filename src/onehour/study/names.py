"""Plain names for what an arm changes, and what the paper measured for the same change (T1, T2a, T2b)."""

from __future__ import annotations

from fractions import Fraction

from onehour.config import Recipe
from onehour.study.paper import paper_table
from onehour.study.results import Arm

__all__ = ["GROUPS", "OTHERS", "group_of", "paper_cost", "plain_name"]

OTHERS = ("arm", "curve")
"""Names under which an arm is somebody else's text: a CSV's column, or its file."""

GROUPS = {
    "rate": "Warmup and rate",
    "pitfall": "One thing wrong",
    "n": "BatchNorm’s n",
    "other": "Other changes",
}
"""Questions that arms answer, each corrected for its own number of arms."""

PLAIN = {
    "warmup=none": "no warmup",
    "warmup=constant": "constant warmup",
    "warmup=gradual": "gradual warmup",
    "scaling=fixed": "the rate not scaled",
    "scaling=sqrt": "the rate scaled by √k",
    "scaling=linear": "the rate scaled by k",
    "zero_gamma=false": "no zero γ",
    "zero_gamma=true": "zero γ",
    "pitfall=gradient-sum-not-mean": "loss divided by n, not kn",
    "pitfall=decay-on-batchnorm": "weight decay on BatchNorm",
    "pitfall=momentum-inside-uncorrected": "rate inside the momentum, not corrected",
    "pitfall=overlapping-shards": "each worker shuffles for itself",
    "pitfall=batchnorm-stats-of-rank-0": "running statistics of process 0 alone",
    "pitfall=batchnorm-stats-k-times": "running statistics moved k times",
    "pitfall=warmup-per-epoch": "warmup in steps of an epoch",
}


def plain_name(arm: Arm, recipe: Recipe | None = None, minibatch: int | None = None) -> str:
    """What an arm changes, in words.

    Args:
        recipe: the base, to say a rate as a multiple of its own.
        minibatch: kn at which it was run, to say BatchNorm's n as a share of it.

    >>> plain_name((("warmup", "none"),)), plain_name((("base_lr", "0.05"),), Recipe())
    ('no warmup', 'half the rate')
    >>> plain_name((("per_worker", "8192"),), Recipe(), 8192)
    'BatchNorm over all of kn'
    """
    return ", ".join(_plain(name, value, recipe, minibatch) for name, value in arm) or "the recipe"


def group_of(arm: Arm, minibatch: int | None) -> str:
    """Which of `GROUPS` an arm belongs to.

    >>> group_of((("per_worker", "8"),), 512), group_of((("per_worker", "512"),), 512)
    ('n', 'pitfall')
    """
    kinds = {_kind(name, value, minibatch) for name, value in arm}
    return kinds.pop() if len(kinds) == 1 else "other"


def paper_cost(arm: Arm, recipe: Recipe | None) -> float | None:
    """What the change costs in the paper, in points, at a minibatch of 8k; None where it is not in its tables.

    >>> round(paper_cost((("warmup", "none"),), Recipe()), 2), paper_cost((("momentum", "0.8"),), Recipe())
    (1.1, None)
    """
    if recipe is None or len(arm) != 1:
        return None
    ((name, value),) = arm
    own = {"warmup": "gradual", "scaling": "linear", "zero_gamma": True}
    if name in own and getattr(recipe, name) != own[name]:
        return None
    label = f"{name}={value}"
    if name == "base_lr":
        label = f"base_lr={0.1 * float(value) / recipe.base_lr:.12g}"
    tables = {
        "warmup=gradual": paper_table("T1"),
        "base_lr=0.1": paper_table("T2a"),
        "zero_gamma=true": paper_table("T2b"),
    }
    for reference, table in tables.items():
        errors = {entry.label: entry.mean for entry in table if entry.minibatch == 8192}
        if label in errors and label != reference:
            return errors[label] - errors[reference]
    return None


def _kind(name: str, value: str, minibatch: int | None) -> str:
    if name == "per_worker":
        return "pitfall" if value == str(minibatch) else "n"
    return {
        **dict.fromkeys(("warmup", "warmup_epochs", "scaling", "base_lr", "milestones", "decay"), "rate"),
        **dict.fromkeys(("pitfall", "zero_gamma"), "pitfall"),
    }.get(name, "other")


def _plain(name: str, value: str, recipe: Recipe | None, minibatch: int | None) -> str:
    if name in OTHERS:
        return value
    if name == "per_worker":
        return "BatchNorm over all of kn" if value == str(minibatch) else f"n = {value}"
    if name == "base_lr" and recipe is not None:
        factor = Fraction(value) / Fraction(str(recipe.base_lr))
        words = {Fraction(1, 2): "half the rate", Fraction(2): "twice the rate"}
        return words.get(factor, f"{float(factor):.3g} times the rate")
    return PLAIN.get(f"{name}={value}", f"{name} = {value}")
