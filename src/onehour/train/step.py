"""One iteration: the passes of this process, one vector reduced, one update (paper eq 2, §3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import Batch
from onehour.dist.group import Group
from onehour.dist.reducer import Reducer
from onehour.rules.aggregate import global_mean
from onehour.rules.keys import seed_for
from onehour.rules.momentum import correct_momentum
from onehour.train.precision import forward
from onehour.train.statistics import RunningStatistics
from onehour.train.timing import StepTimer

__all__ = ["Step"]


class Step:
    """Takes a process through an iteration; every process then holds the same weights, velocity and statistics.

    The reduced vector is gradients ‖ loss, errors, stop ‖ which parameters were used ‖ BatchNorm statistics.

    A value in it that is not finite, on any worker, masks this update and all later ones on the device: weights,
    velocity and statistics stay as they were before, and `halted` says so.

    Args:
        model: converted to ghost BatchNorm, on the group's device.
        optimizer: over the model's trainable parameters.
        passes: the workers of each of this process's passes.
        timer: where the time of each part is kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        passes: list[range],
        group: Group,
        timer: StepTimer,
    ) -> None:
        self.recipe, self.model, self.optimizer = recipe, model, optimizer
        self.passes, self.group, self.timer = passes, group, timer
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.statistics = RunningStatistics(model)
        tail = 3 + len(parameters) + self.statistics.floats
        self.reducer = Reducer(parameters, tail=tail, group=group)
        self.scalars, self.used, self.sums = self.reducer.tail.split([3, len(parameters), self.statistics.floats])
        self.halted = torch.zeros((), dtype=torch.bool, device=group.device)
        self.totals = torch.zeros(2, dtype=torch.float64, device=group.device)
        """Σ of the iterations' mean losses and of their errors, since the caller last set them to zero."""
        self._on_device = _masks_on_device(optimizer)
        self._model = torch.compile(model) if recipe.compile else model

    def __call__(self, iteration: int, batches: Iterator[Batch], *, stopping: bool) -> None:
        """Iteration t: set the rate, take the passes' batches from `batches`, reduce, update.

        Args:
            iteration: t.
            batches: gives one batch a pass.
            stopping: this process was asked to stop; after the step every process finds it in `scalars[2]`.
        """
        recipe, reducer = self.recipe, self.reducer
        correct_momentum(self.optimizer, recipe.schedule(iteration * recipe.minibatch / _samples(recipe)))
        self.model.train()
        reducer.zero()
        self.statistics.collect_into(self.sums)
        for workers in self.passes:
            with self.timer("data"):
                images, labels = next(batches)
            with self.timer("compute"):
                self._pass(iteration, workers, images, labels, last=workers == self.passes[-1])
        if stopping:
            self.scalars[2] += 1
        self._mark_used()
        with self.timer("reduction"):
            reducer.finish()
        with self.timer("update"):
            self._update()

    def _pass(self, iteration: int, workers: range, images: Tensor, labels: Tensor, *, last: bool) -> None:
        recipe = self.recipe
        torch.manual_seed(seed_for(recipe.seed, "pass", iteration, workers.start))
        logits = forward(self._model, images, recipe)
        loss = global_mean(F.cross_entropy(logits, labels, reduction="sum"), recipe.minibatch)
        if last:
            self.reducer.arm()
        loss.backward()
        with torch.no_grad():
            self.scalars[0] += loss
            self.scalars[1] += (logits.argmax(1) != labels).sum()

    def _mark_used(self) -> None:
        used = self.reducer.used
        if all(used):
            self.used.fill_(1)
        else:
            self.used += torch.tensor(used, dtype=self.used.dtype).to(self.used.device)

    @torch.no_grad()
    def _update(self) -> None:
        self.halted |= ~torch.linalg.vector_norm(self.reducer.vector, ord=math.inf).isfinite()
        live = ~self.halted
        # What no worker used keeps its value, as if it had no gradient. Only who left one out itself needs to ask.
        if not all(self.reducer.used):
            for parameter, count in zip(self.reducer.parameters, self.used.tolist(), strict=True):
                if count == 0:
                    parameter.grad = None
        if self._on_device:
            self.optimizer.found_inf = self.halted.float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(live):
            self.optimizer.step()
        self.statistics.commit(self.sums, live)
        self.totals += torch.where(live, self.scalars[:2].double(), 0.0)


def _samples(recipe: Recipe) -> int:
    assert recipe.samples is not None
    return recipe.samples


def _masks_on_device(optimizer: Any) -> bool:
    """Whether the optimizer skips an update by itself when the tensor `found_inf` says so, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
