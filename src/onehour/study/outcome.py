"""How a finished run compares with the recipe's committed reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from onehour.recipes import RECIPES
from onehour.study.figures import draw_curve
from onehour.training.record import MEDIAN_OF, Run

__all__ = ["Reference", "outcome_lines", "reference_of"]


@dataclass(frozen=True)
class Reference:
    """Final errors of a recipe at its base minibatch, over seeds, and where a next run's should lie.

    Args:
        minibatch: the recipe's base minibatch.
        mean, std, seeds: of the final errors; std with n − 1.
        low, high: the 95 % prediction interval mean ± t(0.975, n − 1) · std · √(1 + 1/n).

    >>> Reference(minibatch=32, mean=3.6, std=0.2, seeds=5, low=3.0, high=4.2).verdict(3.8)
    'matches the reference'
    """

    minibatch: int
    mean: float
    std: float
    seeds: int
    low: float
    high: float

    def verdict(self, error: float) -> str:
        """Whether a run's error is what another seed of the reference could have given.

        >>> Reference(minibatch=32, mean=3.6, std=0.2, seeds=5, low=3.0, high=4.2).verdict(60.0)
        'does not match the reference: it is worse'
        """
        if error > self.high:
            return "does not match the reference: it is worse"
        if error < self.low:
            return "does not match the reference: it is better"
        return "matches the reference"


def reference_of(name: str) -> Reference | None:
    """The committed reference of a named recipe; None where there is none.

    >>> reference_of("resnet50") is None
    True
    """
    text = (resources.files("onehour.study") / "references.json").read_text(encoding="utf-8")
    known = json.loads(text).get(name)
    return Reference(**known) if known else None


def _comparable(run: Run) -> Reference | None:
    """The reference, if the run had the named recipe's task and length: its model, data and epochs."""
    if run.recipe.name not in RECIPES:
        return None
    named = RECIPES[run.recipe.name]()
    same = all(getattr(run.recipe, name) == getattr(named, name) for name in ("model", "data", "epochs"))
    return reference_of(run.recipe.name) if same else None


def outcome_lines(run: Run) -> Iterator[str]:
    """What `onehour train` says at the end."""
    summary = run.summary
    if not run.finished:
        yield f"{run.folder} ended as {summary.get('outcome', 'unfinished')}"
        return
    last = min(MEDIAN_OF, len(run.metrics))
    yield f"final error  {run.final_error:.2f} % (median of the last {last} epochs)"
    reference = _comparable(run)
    if reference is not None:
        yield (
            f"reference    {reference.mean:.2f} ± {reference.std:.2f} % at minibatch {reference.minibatch}"
            f" ({reference.seeds} seeds), 95 % of runs between {reference.low:.2f} and {reference.high:.2f} %"
        )
        yield f"verdict      {reference.verdict(run.final_error)}"
    if speed := summary.get("images_per_second"):
        most = f"; most time goes to {summary['bottleneck']}" if "bottleneck" in summary else ""
        yield f"speed        {speed:,.0f} images/s{most}"
    yield f"run          {run.folder}"
    curve = draw_curve(run)
    yield f"curve        {curve}" if curve else "curve        needs matplotlib: pip install 'onehour[report]'"
