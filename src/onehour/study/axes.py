"""The axes of a sweep, from what a person asks for (paper F1, T1, T2a)."""

from __future__ import annotations

from collections.abc import Sequence

from onehour.config import Recipe
from onehour.study.spec import Arm, SweepSpec, arm_of, parse_arm, pitfall_arms, table_arms

__all__ = ["spec_of"]

FACTORS = (1, 2, 4, 8, 16, 32, 64)
"""Times the base minibatch: the paper's 256 … 16k."""
ARMS_AT = 16


def spec_of(
    recipe: Recipe, sizes: Sequence[int] | None, seeds: range, arms: Sequence[str] | None, arms_at: Sequence[int] | None
) -> SweepSpec:
    """The sweep that options ask for.

    Args:
        recipe: completed.
        sizes: minibatches; None is 1 … 64 times the base, as far as the data goes.
        arms: FIELD=VALUE[,VALUE…], or "table" (the paper's T1 and T2a), "pitfalls", "none"; None is "table".
        arms_at: minibatches of the arms; None is 16 times the base where the axis has it, else its largest.

    Raises:
        ValueError: for what no sweep can have.

    >>> spec = spec_of(Recipe(samples=8192), None, range(2), ["warmup=none"], None)
    >>> spec.minibatches, spec.arms_at
    ((256, 512, 1024, 2048, 4096, 8192), (4096,))
    """
    if len(seeds) < 1:
        raise ValueError(f"--seeds is {len(seeds)}; expected at least 1, and 5 for the paper's table")
    base, samples = recipe.base_minibatch, recipe.samples or 0
    if sizes is None:
        sizes = tuple(base * factor for factor in FACTORS if base * factor <= samples)
        if not sizes:
            raise ValueError(f"the base minibatch {base} is larger than the data set of {samples} samples")
    if arms_at is None:
        arms_at = (base * ARMS_AT if base * ARMS_AT in sizes else max(sizes),)
    chosen: list[Arm] = []
    for text in arms or ["table"]:
        if text == "table":
            chosen += table_arms(recipe)
        elif text == "pitfalls":
            if len(arms_at) > 1:
                raise ValueError("--arm pitfalls is measured at one minibatch, since BatchNorm over all of kn names it")
            chosen += pitfall_arms(recipe, arms_at[0])
        elif text != "none":
            chosen += parse_arm(text)
    # A value that the recipe has is the recipe's own entry.
    probe = SweepSpec(recipe=recipe, minibatches=tuple(sizes), seeds=tuple(seeds))
    chosen = [arm for arm in dict.fromkeys(chosen) if arm_of(probe.applied(arm, arms_at[0], 0), recipe)]
    return SweepSpec(
        recipe=recipe,
        minibatches=tuple(sorted(set(sizes) | (set(arms_at) if chosen else set()))),
        seeds=tuple(seeds),
        arms=tuple(chosen),
        arms_at=tuple(sorted(set(arms_at))) if chosen else (),
    )
