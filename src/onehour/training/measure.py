"""The line that an evaluation adds to metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

from onehour.config import Recipe
from onehour.training.evaluate import Evaluation
from onehour.training.pitfalls import Decisions
from onehour.training.timing import PARTS

__all__ = ["NOT_FINITE", "measured", "timed"]

NOT_FINITE = (
    "the model's outputs are NaN or infinite for validation samples that are finite: val_loss is null, and where they"
    " are NaN the sample counts as an error"
)
"""What is said where a record has no validation loss."""


def measured(decisions: Decisions, done: int, totals: tuple[float, float], result: Evaluation) -> dict[str, Any]:
    """What is known after iteration `done`.

    Args:
        totals: Σ of the iterations' mean losses and of their errors since the evaluation before.
        result: on the validation data; a loss that is not finite is None, which JSON can say.

    >>> decisions = Decisions(Recipe(samples=512))
    >>> record = measured(decisions, 2, (1.0, 128.0), Evaluation(errors=1, samples=4, loss=0.5))
    >>> record["epoch"], record["train_loss"], record["train_error"], record["top1_error"]
    (1, 0.5, 25.0, 25.0)
    """
    recipe, samples = decisions.recipe, decisions.samples
    position = done * recipe.minibatch
    first, last = _span(position, recipe, samples)
    loss, errors = totals
    return {
        "epoch": position // samples,
        "iteration": done,
        "position": position,
        "lr": decisions.rate(done - 1),
        "train_loss": loss / (last - first),
        "train_error": 100 * errors / ((last - first) * recipe.minibatch),
        "val_loss": result.loss if math.isfinite(result.loss) else None,
        "top1_error": result.top1_error,
    }


def timed(
    record: dict[str, Any],
    images: int,
    *,
    seconds: float,
    cpu_seconds: float,
    evaluating: float,
    steps: list[dict[str, float]],
    runs: int = 1,
) -> dict[str, Any]:
    """The line beside it in timing.jsonl.

    Args:
        record: of metrics.jsonl.
        images: trained on since the evaluation before.
        seconds, cpu_seconds, evaluating: since then.
        steps: milliseconds of each part, for every iteration.
        runs: trained as one network in that time; each is given its share.

    >>> timed({"epoch": 1, "iteration": 8}, 80, seconds=4.0, cpu_seconds=4.0, evaluating=1.0, steps=[], runs=2)[
    ...     "images_per_second"]
    40.0
    """
    return {
        "epoch": record["epoch"],
        "iteration": record["iteration"],
        "images": images,
        "seconds": seconds / runs,
        "cpu_seconds": cpu_seconds / runs,
        "images_per_second": images * runs / seconds,
        "evaluate_seconds": evaluating / runs,
        "parts": list(PARTS),
        "steps_ms": [[round(step[part] / runs, 3) for part in PARTS] for step in steps],
    }


def _span(position: int, recipe: Recipe, samples: int) -> tuple[int, int]:
    """The iterations whose training error belongs to an evaluation at `position`: those since the one before."""
    done = position // recipe.minibatch
    epoch = position // samples
    before = min(-(-(epoch - 1) * samples // recipe.minibatch), done) if epoch > 1 else 0
    return before, done
