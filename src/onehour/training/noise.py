"""The gradient noise of a run while its rate is at its peak, measured beside the run and without a trace in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from onehour.data.loader import Batch
from onehour.data.samples import mapped
from onehour.noise import FEWEST, trace_and_square
from onehour.training.decisions import Decisions
from onehour.training.step import Step

MINIBATCHES = 8
"""Whose gradients are compared at a point: so many pairs tell |G|² where two workers of one minibatch do not."""
SHARE = 60
"""Of so many iterations' gradients, one is computed for this alone."""


def peak_epochs(decisions: Decisions) -> range:
    """The epochs, counted from 0, whose rate stays above half of the recipe's target, but for warmup and the first.

    Where the rate falls |G|² falls within noise, and B is another one; in the first epoch |G|² is that of a beginning.
    """
    recipe = decisions.recipe
    first = max(1, math.ceil(recipe.warmup_epochs)) if recipe.warms_up else 1
    last = first
    while last < recipe.epochs and recipe.schedule(last + 1 - 1e-9) > recipe.target_lr / 2:
        last += 1
    return range(first, last)


class GradientNoise:
    """Measures tr Σ and |G|² at points that are spread over the epochs of the peak rate.

    At a point the gradients of the next `MINIBATCHES` minibatches are all computed at the present weights; then the run
    goes on with these very minibatches. Weights, statistics and numbers of the run are what they are without it.

    Args:
        slow: entered while a point is measured.
        warn: is told where the points will be too few for an interval.
    """

    def __init__(
        self,
        decisions: Decisions,
        step: Step,
        *,
        slow: Callable[[], AbstractContextManager[None]] = nullcontext,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self._step, self._minibatch, self._slow = step, decisions.recipe.minibatch, slow
        epochs = peak_epochs(decisions)
        first, stop = (-(-epoch * decisions.samples // self._minibatch) for epoch in (epochs.start, epochs.stop))
        last = min(stop, decisions.iterations) - MINIBATCHES
        points = max(1, decisions.iterations // (SHARE * MINIBATCHES))
        self._due = range(first, last + 1, max(MINIBATCHES, (stop - first) // points))
        if warn is not None and len(self._due) < FEWEST:
            warn(
                f"--noise has iterations for {len(self._due)} of the {FEWEST} points at the peak rate that advise needs"
            )
        self._measured: list[tuple[int, Tensor]] = []
        """Points whose numbers lie on the device still."""
        self._points: list[list[float]] = []

    def is_due(self, iteration: int) -> bool:
        """Whether a point is measured before iteration t."""
        return iteration in self._due

    def measure(self, iteration: int, batches: Iterator[Batch]) -> list[Batch]:
        """Measure a point before iteration t; gives back the batches that it took.

        Args:
            batches: of the passes from iteration t on.
        """
        taken = list(islice(batches, MINIBATCHES * len(self._step.passes)))
        copies: Iterator[Batch] = (mapped(batch, _cloned) for batch in taken)  # a model may write into its input
        buffers = list(self._step.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        total: list[Tensor] = []
        squares: list[Tensor] = []
        with self._slow():
            for number in range(iteration, iteration + MINIBATCHES):
                gradient = [g.to(torch.float64, copy=True) for g in self._step.gradient(number, copies)]
                squares.append(_square(gradient))
                total = [a.add_(b) for a, b in zip(total, gradient, strict=True)] if total else gradient
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
        small, big = torch.stack(squares).mean(), _square(total) / MINIBATCHES**2
        self._measured.append((iteration, torch.stack((small, big))))
        return taken

    @property
    def points(self) -> list[list[float]]:
        """(iteration, tr Σ, |G|²) of the points since the last evaluation; those that are not finite are left out."""
        sizes = {"small_size": self._minibatch, "big_size": MINIBATCHES * self._minibatch}
        rows = [[t, *trace_and_square(*norms.tolist(), **sizes)] for t, norms in self._measured]
        self._measured.clear()
        self._points += [row for row in rows if all(map(math.isfinite, row))]
        return self._points

    @points.setter
    def points(self, points: list[list[float]]) -> None:
        self._points = points


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _square(gradient: list[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in gradient]).sum()
