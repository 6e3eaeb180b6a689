"""One iteration: the passes of this process, one vector reduced, one update (paper eq 2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from onehour.data.loader import Batch, Skipped
from onehour.data.mixing import Mixing
from onehour.dist.canonical import CanonicalReducer
from onehour.dist.devices import CapturedIteration, StepTimer, seed_torch
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.dist.reducer import Reducer
from onehour.rules.aggregate import global_mean
from onehour.rules.keys import seed_for
from onehour.rules.momentum import set_rate
from onehour.training.decisions import Decisions
from onehour.training.feeds import pick_share
from onehour.training.record import PARTS
from onehour.training.state import Network
from onehour.training.statistics import KeptStatistics, RunningStatistics
from onehour.training.task import CLASSIFICATION, Task

untyped: Any = torch


@dataclass(frozen=True)
class Iteration:
    """What an iteration was, over all workers, as tensors on the device: the host has not waited for them."""

    sums: Tensor
    """float64 (R, S): of each seed the mean loss over the minibatch, and its task's other rows (`Task.rows`)."""
    stop: Tensor
    """(): how many processes were asked to stop."""
    skipped: Tensor
    """(): how many images were replaced, since they could not be read."""
    alive: Tensor
    """bool (S,): which seeds have had finite numbers alone, until now."""


class Step:
    """Takes S networks that are one through an iteration; every process then holds the same weights and statistics.

    The reduced vector is gradients ‖ the task's rows, stop, skipped ‖ which parameters were used ‖ BatchNorm's sums
    ‖ for AdaScale Σ of the squared norms of the workers' gradients, which takes one worker a pass.
    Where a task knows its count only behind the forward pass, gradients and loss are divided by kn at first, and
    multiplied by kn / Σ count once all workers' counts are summed.

    A value in it that is not finite, on any worker, masks this update and all later ones on the device: weights,
    velocity and statistics stay as they were before, and `alive` is false. Of several seeds, whose gradients do not
    mix, one must not stop the others: each is alive until its loss is not finite, and only that is masked in its sums.

    Args:
        network: of S runs, its model on the group's device; of one alone batches have labels (N,), else (N, S).
        per_pass: how many of this process's workers share a pass, at most.
        replaced: counts the images of this process's batches that were replaced; None where none may be.
        draws: False where model and task draw no random numbers, so that no generator need be seeded.
    """

    def __init__(
        self,
        decisions: Decisions,
        network: Network,
        *,
        per_pass: int,
        group: Group,
        task: Task = CLASSIFICATION,
        replaced: Skipped | None = None,
        draws: bool = True,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.decisions, self.network, self.task, self.timer = decisions, network, task, StepTimer(PARTS, group.device)
        self.model, self.optimizer, self.seeds = network.model, network.optimizer, len(network.parts)
        share = pick_share(decisions.recipe, group)
        self.passes = passes(share, per_pass)
        self._whole, self._per_pass, self._group = decisions, per_pass, group
        self._replaced, self._draws, self._warn = replaced, draws, warn
        self._draws_in_update = ":" in decisions.recipe.optimizer  # someone's own, which must draw alike everywhere
        self._mixing = Mixing(decisions.recipe, decisions.stream())
        kept = decisions.recipe.batchnorm == "keep"
        self._statistics = (KeptStatistics if kept else RunningStatistics)(self.model, decisions)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        sizes = [task.rows * self.seeds, 1, 1, len(parameters), self._statistics.floats, int(decisions.adapts)]
        if decisions.recipe.reduce == "canonical":
            self.reducer: Reducer = CanonicalReducer(
                parameters, tail=sum(sizes), group=group, share=_leaves(share, decisions)
            )
        else:
            self.reducer = Reducer(parameters, tail=sum(sizes), group=group)
        sums, self._stop, self._skipped, self._used, *rest = self.reducer.tail.split_with_sizes(sizes)
        self._collected, self._squares = rest
        self._sums = sums.view(task.rows, self.seeds)
        self._losses, self._others = self._sums[0], self._sums[1:]
        self._halted, self._one = torch.zeros((), device=group.device), torch.ones((), device=group.device)
        self.alive = (self._halted == 0).repeat(self.seeds)
        """As in the last iteration's `Iteration`."""
        self.empty = torch.zeros((), dtype=torch.bool, device=group.device)
        """Whether a task's count over all workers has been 0."""
        self._forward = untyped.compile(self.model, dynamic=False) if decisions.recipe.compile else self.model
        self._inside = decisions.corrected(self.optimizer)
        # Fused optimizers skip an update by themselves where the tensor `found_inf` says so.
        self._masks_on_device = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self._captured: CapturedIteration | None = None

    def __call__(self, iteration: int, batches: Iterator[Batch], *, stopping: bool = False) -> Iteration:
        """Iteration t: w ← w − η·(1/kn)·Σ ∇l(x, w) over the samples of all workers (eq 2), in the optimizer's form.

        Args:
            batches: gives one batch a pass.
            stopping: this process was asked to stop; every process finds it in what is returned.
        """
        self.timer.begin()
        given, rate = self._keyed(iteration, batches), self.decisions.rate(iteration)
        if self._captured is None:
            seen = self._launch(given, rate, stopping)
        else:
            given = list(given)
            self.network.finish_copy()
            seen = self._captured(given, rate, stopping)
        self.timer.end()
        return Iteration(seen[:-2].view(-1, self.seeds), seen[-2], seen[-1], self.alive)

    def _launch(self, batches: Iterable[Batch], rate: float | Tensor, stopping: float | Tensor) -> Tensor:
        """All that an iteration does on the device; what it found, over all workers, as one vector."""
        self._statistics.between = True  # a capture that was given up has left it in the midst of one
        unused = self._accumulate(batches, stopping)
        self.network.finish_copy()
        self._update(unused, rate)
        seen = self.reducer.tail[: self._sums.numel() + 2].to(torch.float64, copy=True)
        self.timer.lap("update")
        return seen

    def _accumulate(self, batches: Iterable[Batch], stopping: float | Tensor) -> set[int]:
        """Sum the vector over all workers; the parameters that no pass of this process used, by number."""
        self.reducer.zero()
        self._stop.fill_(stopping)
        unused = set(range(len(self.reducer.parameters)))
        for workers, batch in zip(self.passes, batches, strict=True):
            last = workers == self.passes[-1]
            self._add_gradient(workers, batch, last=last)
            if last or self.reducer.takes_each_pass:
                left_out = set(self.reducer.mark())
                self._used.fill_(1)
                for number in left_out:
                    self._used[number] = 0
                self.reducer.take()
                unused &= left_out
            self.timer.lap("compute")
        self.reducer.finish()
        self.timer.lap("reduction")
        return unused

    def _add_gradient(self, workers: range, batch: Batch, *, last: bool) -> None:
        """Add a pass's share of (1/kn)·Σ ∇l, of the mean loss and of the errors."""
        recipe, adapts = self.decisions.recipe, self.decisions.adapts
        if self._replaced is not None:
            self._skipped.add_(self._replaced.take())
        self._statistics.begin_pass(workers)
        before = [None if p.grad is None else p.grad.clone() for p in self.reducer.parameters] if adapts else []
        found = self.task(self._forward, batch, recipe)
        self._statistics.end_pass()
        if not found.loss.requires_grad and not (self.task.counts and float(found.others[0]) == 0):
            raise ValueError("the loss depends on no trained parameter: is the model under no_grad, or detached?")
        if last and not adapts:  # a gradient that travels is this worker's no more
            self.reducer.arm()
        if found.loss.requires_grad:  # of (1/kn)·Σ l, whose own backward begins with this
            loss: Any = found.loss
            loss.backward(global_mean(torch.ones_like(loss), self.decisions.divisor))
        with torch.no_grad():
            if adapts:  # ‖g_i‖² of the worker that has just passed, by the gradients that were there before
                pairs = zip(self.reducer.parameters, before, strict=True)
                own = [p.grad if old is None else p.grad - old for p, old in pairs if p.grad is not None]
                self._squares.add_(self._norm_of(own).square())
            self._losses.add_(global_mean(found.loss, recipe.minibatch))
            self._others.add_(found.others)

    @torch.no_grad()
    def _update(self, unused: set[int], rate: float | Tensor) -> None:
        """w ← w − η·g, unless something in it is not finite; statistics and averaged weights move with it."""
        for number in unused:  # what no worker used keeps its value; only who left one out itself must ask
            if self._group.size == 1 or self._used[number] == 0:
                self.reducer.parameters[number].grad = None
        if self.task.counts:
            self._divide()
        clip_norm, adapts = self.decisions.recipe.clip_norm, self.decisions.adapts
        norms = [self._norm()] if adapts or clip_norm is not None else []
        live = self._look(*norms)
        if adapts and bool(live):
            k = self.decisions.recipe.workers.workers  # whose gradients are divided by it
            rate = self.decisions.adapted(float(rate), k**2 * float(self._squares), float(norms[0]) ** 2)
        if self.seeds > 1 or self._masks_on_device or bool(live):
            if clip_norm is not None and (gradients := self._gradients()):  # as torch.nn.utils.clip_grad_norm_ has it
                untyped._foreach_mul_(gradients, (clip_norm / (norms[0] + 1e-6)).clamp(max=1))
            set_rate(self.optimizer, rate, self._inside)  # may change the velocity, so it is part of the update
            self.optimizer.step()
        self._statistics.commit(live)
        if self.network.average is not None:
            self.network.average.move(live)

    def _keyed(self, iteration: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Its batches; once one is taken, the random numbers are those of its pass, behind all those of the update."""
        for workers in self.passes:
            batch = self._mixing(next(batches), iteration, workers)
            self.timer.lap("data")
            if self._draws:
                seed_torch(seed_for(self.decisions.recipe.seed, "pass", iteration, workers.start), self._group.device)
            yield batch
        if self._draws_in_update:
            seed_torch(seed_for(self.decisions.recipe.seed, "update", iteration), self._group.device)

    def _divide(self) -> None:
        """Divide gradients and loss by the count over all workers, where they were divided by kn (Remark 3)."""
        count = self._others[0, 0]
        self.empty.logical_or_(count == 0)
        untyped._foreach_mul_([self._losses, *self._gradients()], self.decisions.recipe.minibatch / count)

    def _norm(self) -> Tensor:
        """‖(1/kn)·Σ ∇l‖ over all parameters: process 0's, as the bits of a sum depend on threads and processors."""
        norm = self._norm_of(self._gradients())
        return self._group.sum(norm if self._group.rank == 0 else torch.zeros_like(norm))

    def _norm_of(self, tensors: list[Tensor]) -> Tensor:
        return untyped.linalg.vector_norm(torch.stack(untyped._foreach_norm(tensors or [0 * self._one])))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.reducer.parameters if p.grad is not None]

    def _look(self, *norms: Tensor) -> Tensor:
        """Look for what is not finite, also in norms, which may overflow alone; a boolean scalar on the device."""
        if self.seeds > 1:
            self.alive &= self._losses.isfinite()
            return self._halted == 0  # never set
        # What GradScaler calls; times 1 changes nothing, and `_halted` is only ever set.
        untyped._amp_foreach_non_finite_check_and_unscale_([*self.reducer.summed(), *norms], self._halted, self._one)
        live = self._halted == 0
        self.alive.copy_(live)
        return live

    def gradient(self, iteration: int, batches: Iterator[Batch]) -> list[Tensor]:
        """Iteration t's mean gradient over all workers at the present weights, by parameter; nothing of it is kept."""
        with self.timer.silent():
            self._accumulate(self._keyed(iteration, batches), stopping=False)
        if self.task.counts:
            self._divide()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.reducer.parameters]

    def __enter__(self) -> Self:
        """From now on a forward adds to the vector's statistics, and the optimizer looks at what is masked."""
        self._statistics.attach(self._collected, in_place=self.decisions.recipe.compile)
        if self._masks_on_device and self.seeds == 1:
            masking: Any = self.optimizer
            masking.found_inf, masking.grad_scale = self._halted, None
        self._capture()
        return self

    def _capture(self) -> None:
        options: Any = {"timer": self.timer, "device": self._group.device, "warn": self._warn}
        self._captured = CapturedIteration(self._launch, **options) if self._can_be_captured() else None

    def _can_be_captured(self) -> bool:
        """Whether nothing in an iteration is the host's to decide, so that it may be one CUDA graph.

        Not in float64: fused optimizers read a rate that lies on the device as a float32.
        """
        alone = self._group.device.type == "cuda" and self._group.size == 1
        masked = self.seeds > 1 or self._masks_on_device
        keyed_by_pass = self._draws and (len(self.passes) > 1 or self._draws_in_update)
        decided = keyed_by_pass or self._inside or self.task.counts or self.decisions.adapts
        exact = self.decisions.recipe.precision != "float64"
        return alone and masked and exact and not decided and self._replaced is None

    def begin(self, iteration: int) -> None:
        """Take the workers of iteration t and those behind it; where a ramp has another minibatch, they are others."""
        decisions = self._whole.during(iteration)
        if decisions.recipe.minibatch == self.decisions.recipe.minibatch:
            return
        share = pick_share(decisions.recipe, self._group)
        self.decisions, self.passes = decisions, passes(share, self._per_pass)
        self.reducer.host(_leaves(share, decisions))
        if self.network.average is not None and decisions.recipe.target_ema is not None:
            self.network.average.set_decay(decisions.recipe.target_ema)
        self._capture()

    def __exit__(self, *error: object) -> None:
        """Give the model back as it would be without a trainer."""
        self.reducer.close()
        self._statistics.detach()


def _leaves(share: range, decisions: Decisions) -> range:
    """The leaves of the canonical tree that a process hosts: its passes."""
    together = decisions.recipe.together
    return range(share.start // together, share.stop // together)
