"""One iteration: the passes of this process, one vector reduced, one update (paper eq 2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.bad_images import too_many
from onehour.data.loader import Batch
from onehour.dist.canonical import CanonicalReducer
from onehour.dist.group import Group
from onehour.dist.reducer import Reducer
from onehour.rules.aggregate import global_mean
from onehour.rules.batchnorm import repeat_parameters
from onehour.rules.keys import seed_for
from onehour.rules.momentum import set_rate
from onehour.training.pitfalls import decisions_of
from onehour.training.precision import forward
from onehour.training.statistics import RunningStatistics
from onehour.training.timing import StepTimer

__all__ = ["Step"]


class Step:
    """Takes a process through an iteration; every process then holds the same weights, velocity and statistics.

    The reduced vector is gradients ‖ loss, errors, stop, skipped ‖ which parameters were used ‖ BatchNorm statistics.

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
        tail = 4 + len(parameters) + self.statistics.floats
        if recipe.reduce == "canonical":
            share = range(passes[0].start, passes[-1].stop)
            self.reducer = CanonicalReducer(parameters, tail=tail, group=group, share=share)
        else:
            self.reducer = Reducer(parameters, tail=tail, group=group)
        self.scalars, self.used, self.sums = self.reducer.tail.split([4, len(parameters), self.statistics.floats])
        self.loss, self.errors, self.stop, self._skipped_now = self.scalars.unbind()
        self.statistics.collect_into(self.sums)
        self.halted = torch.zeros((), device=group.device)
        """1 once anything was not finite, else 0."""
        self._one = torch.ones((), device=group.device)
        self.before_update: Callable[[], None] = lambda: None
        """Called when weights, velocity and statistics are about to change."""
        self.totals = torch.zeros(2, dtype=torch.float64, device=group.device)
        """Σ of the iterations' mean losses and of their errors, since the caller last set them to zero."""
        self.count_skipped: Callable[[], int] = lambda: 0
        """Called at every pass: the images that were replaced in it."""
        self.skipped = torch.zeros((), dtype=torch.float64, device=group.device)
        """How many were, in all processes; the caller may set it to what a checkpoint knows."""
        self.too_many = torch.zeros((), device=group.device)
        """1 once they were more than `onehour.data.bad_images` allows; `stop` then says so too."""
        self._skips = recipe.bad_images == "skip"
        self._first: tuple[int, Tensor] | None = None
        self._decisions = decisions = decisions_of(recipe)
        self._inside = decisions.corrected(optimizer)
        self._shares = self.statistics.apply(decisions)
        self._on_device = _masks_on_device(optimizer)
        if self._on_device:
            optimizer.found_inf, optimizer.grad_scale = self.halted, None  # type: ignore[attr-defined]
        self._model = torch.compile(model, dynamic=False) if recipe.compile else model

    def __call__(self, iteration: int, batches: Iterator[Batch], *, stopping: bool) -> None:
        """Iteration t: take the passes' batches from `batches`, reduce, set the rate, update.

        Args:
            iteration: t.
            batches: gives one batch a pass.
            stopping: this process was asked to stop; after the step every process finds it in `stop`.
        """
        reducer = self.reducer
        self.timer.begin()
        reducer.zero()
        if stopping:
            self.stop.add_(1)
        unused: set[int] | None = None
        for workers in self.passes:
            last = workers == self.passes[-1]
            images, labels = next(batches)
            self.timer.lap("data")
            if self._skips:  # before its share is taken
                self._skipped_now.add_(self.count_skipped())
            self._pass(iteration, workers, images, labels, last=last)
            if last or reducer.takes_each_pass:
                missing = self._mark_used()
                unused = missing if unused is None else unused & missing
                reducer.take()
            self.timer.lap("compute")
        reducer.finish()
        if self._skips:
            self._note_skipped(iteration)
        self.timer.lap("reduction")
        self._update(unused or set(), self._decisions.rate(iteration))
        self.timer.lap("update")
        self.timer.end()

    def close(self) -> None:
        """Give the model back as it would be without a trainer."""
        self.reducer.close()
        self.statistics.collect_into(None)
        self.statistics.weigh(None)
        repeat_parameters(self.statistics.layers, 1)

    def _pass(self, iteration: int, workers: range, images: Tensor, labels: Tensor, *, last: bool) -> None:
        recipe = self.recipe
        seed_generators(seed_for(recipe.seed, "pass", iteration, workers.start), images.device)
        repeat_parameters(self.statistics.layers, len(workers))
        if self._shares is not None:
            self.statistics.weigh(self._shares[:, workers.start : workers.stop])
        logits = forward(self._model, images, recipe)
        if not logits.requires_grad:
            raise ValueError("the model's logits depend on no trained parameter: is it under no_grad, or detached?")
        total = F.cross_entropy(logits, labels, reduction="sum")
        loss = global_mean(total, self._decisions.divisor)
        repeat_parameters(self.statistics.layers, 1)  # forget them: they belong to these weights
        if last:
            self.reducer.arm()
        loss.backward()
        with torch.no_grad():
            self.loss.add_(global_mean(total, recipe.minibatch))
            self.errors.add_((logits.argmax(1) != labels).sum())

    def _note_skipped(self, iteration: int) -> None:
        """Count over all processes; more than is allowed since this process began asks for a stop."""
        if self._first is None:
            self._first = iteration, self.skipped.clone()
        first, before = self._first
        self.skipped += self._skipped_now
        drawn = first * self.recipe.minibatch, (iteration + 1) * self.recipe.minibatch
        self.too_many.logical_or_(self.skipped - before > too_many(*drawn, self._decisions.samples))
        self.stop.add_(self.too_many)

    def _mark_used(self) -> set[int]:
        unused = set(self.reducer.mark())
        self.used.fill_(1)
        for number in unused:
            self.used[number] = 0
        return unused

    @torch.no_grad()
    def _update(self, unused: set[int], rate: float) -> None:
        self.before_update()
        self._drop(unused)
        # What GradScaler calls; times 1 changes nothing, and `halted` is only ever set.
        torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateImportUsage]
            self.reducer.summed(), self.halted, self._one
        )
        live = self.halted == 0
        if self._on_device or bool(live):
            set_rate(self.optimizer, rate, self._inside)  # may change the velocity, so it is part of the update
            self.optimizer.step()
        self.statistics.commit(self.sums, live)
        self.totals += torch.where(live, self.scalars[:2].double(), 0.0)

    def _drop(self, unused: set[int]) -> None:
        """What no worker used keeps its value, as if it had no gradient. Only who left one out itself must ask."""
        for number in unused:
            if self.used[number] == 0:
                self.reducer.parameters[number].grad = None


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    Not `torch.manual_seed`, which without CUDA notes a stack trace for every call and keeps them all.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _masks_on_device(optimizer: Any) -> bool:
    """Whether the optimizer skips an update by itself when the tensor `found_inf` says so, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
