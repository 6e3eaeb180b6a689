"""One iteration: the passes of this process, one vector reduced, one update (paper eq 2, §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import Batch, Skipped
from onehour.data.mixing import Mixing
from onehour.dist.canonical import CanonicalReducer
from onehour.dist.group import Group
from onehour.dist.reducer import Reducer
from onehour.rules.aggregate import global_mean
from onehour.rules.keys import seed_for
from onehour.rules.momentum import set_rate
from onehour.training.average import AveragedWeights
from onehour.training.capture import CapturedIteration
from onehour.training.decisions import AdaScaled, Decisions
from onehour.training.engine import RunningStatistics
from onehour.training.kept_batchnorm import KeptStatistics
from onehour.training.measure import StepTimer
from onehour.training.task import CLASSIFICATION, Task


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


def _nothing() -> None:
    """What is done before an update where nobody else reads the weights."""


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
        model: converted to ghost BatchNorm, on the group's device.
        optimizer: over the model's trainable parameters.
        passes: the workers of each of this process's passes.
        regroup: gives them for a recipe of another minibatch, which a ramp goes on to.
        task: what the model learns.
        seeds: S; 1 for a run alone, whose batches have labels (N,), else (N, S).
        average: of the model's weights, moved by every update that counts.
        replaced: counts the images of this process's batches that were replaced; None where none may be.
        before_update: called when weights, velocity and statistics are about to change.
        draws: False where the model draws no random numbers, so that no generator need be seeded.
    """

    def __init__(
        self,
        decisions: Decisions,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        passes: list[range],
        regroup: Callable[[Recipe], list[range]] | None = None,
        group: Group,
        task: Task = CLASSIFICATION,
        seeds: int = 1,
        average: AveragedWeights | None = None,
        replaced: Skipped | None = None,
        before_update: Callable[[], None] = _nothing,
        draws: bool = True,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.decisions, self.model, self.optimizer = decisions, model, optimizer
        self._whole, self._regroup = decisions, regroup
        self.passes, self.timer, self.seeds, self.task = passes, StepTimer(group.device), seeds, task
        self._replaced, self._before_update, self._draws, self._warn = replaced, before_update, draws, warn
        self._group, self._average = group, average
        self._mixing = Mixing(decisions.recipe, decisions.stream())
        kept = decisions.recipe.batchnorm == "keep"
        self._statistics = (KeptStatistics if kept else RunningStatistics)(model, decisions)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._adascaled = decisions if isinstance(decisions, AdaScaled) else None
        gains = 0 if self._adascaled is None else 1
        sizes = [task.rows * seeds, 1, 1, len(parameters), self._statistics.floats, gains]
        if decisions.recipe.reduce == "canonical":
            share = range(passes[0].start, passes[-1].stop)
            self.reducer: Reducer = CanonicalReducer(parameters, tail=sum(sizes), group=group, share=share)
        else:
            self.reducer = Reducer(parameters, tail=sum(sizes), group=group)
        sums, self._stop, self._skipped, self._used, *rest = self.reducer.tail.split_with_sizes(sizes)
        self._collected, self._squares = rest
        self._sums = sums.view(task.rows, seeds)
        self._losses, self._others = self._sums[0], self._sums[1:]
        self._halted, self._one = torch.zeros((), device=group.device), torch.ones((), device=group.device)
        self._always = self._one > 0
        self.alive = self._always.repeat(seeds)
        """As in the last iteration's `Iteration`."""
        self.empty = torch.zeros((), dtype=torch.bool, device=group.device)
        """Whether a task's count over all workers has been 0."""
        untyped: Any = torch
        self._forward = untyped.compile(model, dynamic=False) if decisions.recipe.compile else model
        self._inside = decisions.corrected(optimizer)
        # Fused optimizers skip an update by themselves where the tensor `found_inf` says so.
        self._masks_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._run: Callable[[Iterable[Batch], float, bool], Tensor] = self._launch

    def __enter__(self) -> Self:
        """From now on a forward adds to the vector's statistics, and the optimizer looks at what is masked."""
        self._statistics.attach(self._collected, in_place=self.decisions.recipe.compile)
        if self._masks_on_device and self.seeds == 1:
            masking: Any = self.optimizer
            masking.found_inf, masking.grad_scale = self._halted, None
        self._capture()
        return self

    def _capture(self) -> None:
        self._run = self._launch
        if self._can_be_captured():
            self._run = CapturedIteration(
                self._launch, before=self._before_update, timer=self.timer, device=self._group.device, warn=self._warn
            )

    def begin(self, iteration: int) -> None:
        """Take the workers of iteration t and those behind it; where a ramp has another minibatch, they are others."""
        decisions = self._whole.during(iteration)
        if decisions.recipe.minibatch == self.decisions.recipe.minibatch:
            return
        assert self._regroup is not None
        self.decisions, self.passes = decisions, self._regroup(decisions.recipe)
        self.reducer.host(range(self.passes[0].start, self.passes[-1].stop))
        if self._average is not None and decisions.recipe.target_ema is not None:
            self._average.set_decay(decisions.recipe.target_ema)
        self._capture()

    def __exit__(self, *error: object) -> None:
        """Give the model back as it would be without a trainer."""
        self.reducer.close()
        self._statistics.detach()

    def __call__(self, iteration: int, batches: Iterator[Batch], *, stopping: bool = False) -> Iteration:
        """Iteration t: w ← w − η·(1/kn)·Σ ∇l(x, w) over the samples of all workers (eq 2), in the optimizer's form.

        Args:
            iteration: t.
            batches: gives one batch a pass.
            stopping: this process was asked to stop; every process finds it in what is returned.
        """
        self.timer.begin()
        seen = self._run(self._keyed(iteration, batches), self.decisions.rate(iteration), stopping)
        self.timer.end()
        return Iteration(seen[:-2].view(-1, self.seeds), seen[-2], seen[-1], self.alive)

    def gradient(self, iteration: int, batches: Iterator[Batch]) -> list[Tensor]:
        """Iteration t's mean gradient over all workers at the present weights, by parameter; nothing of it is kept."""
        with self.timer.silent():
            self._accumulate(self._keyed(iteration, batches), stopping=False)
        if self.task.counts:
            self._divide()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.reducer.parameters]

    def _keyed(self, iteration: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Its batches; once one is taken, the random numbers are those of its pass."""
        for workers in self.passes:
            batch = self._mixing(next(batches), iteration, workers)
            self.timer.lap("data")
            if self._draws:
                seed_torch(seed_for(self.decisions.recipe.seed, "pass", iteration, workers.start), self._group.device)
            yield batch

    def _launch(self, batches: Iterable[Batch], rate: float | Tensor, stopping: float | Tensor) -> Tensor:
        """All that an iteration does on the device; what it found, over all workers, as one vector."""
        unused = self._accumulate(batches, stopping)
        self._before_update()
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
                unused &= self._take()
            self.timer.lap("compute")
        self.reducer.finish()
        self.timer.lap("reduction")
        return unused

    def _can_be_captured(self) -> bool:
        """Whether nothing in an iteration is the host's to decide, so that it may be one CUDA graph.

        Not in float64: fused optimizers read a rate that lies on the device as a float32.
        """
        keyed_by_pass = self._draws and len(self.passes) > 1
        masked = self.seeds > 1 or self._masks_on_device
        alone = self._group.device.type == "cuda" and self._group.size == 1
        exact = self.decisions.recipe.precision != "float64"
        known = not (keyed_by_pass or self._inside or self.task.counts or self._adascaled)
        return alone and masked and exact and known and self._replaced is None

    def _add_gradient(self, workers: range, batch: Batch, *, last: bool) -> None:
        """Add a pass's share of (1/kn)·Σ ∇l, of the mean loss and of the errors."""
        recipe, parameters = self.decisions.recipe, self.reducer.parameters
        if self._replaced is not None:
            self._skipped.add_(self._replaced.take())
        self._statistics.begin_pass(workers)
        before = [] if self._adascaled is None else [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        found = self.task(self._forward, batch, recipe)
        self._statistics.end_pass()
        if not found.loss.requires_grad and not (self.task.counts and float(found.others[0]) == 0):
            raise ValueError("the loss depends on no trained parameter: is the model under no_grad, or detached?")
        if last and self._adascaled is None:  # a gradient that travels is this worker's no more
            self.reducer.arm()
        if found.loss.requires_grad:
            global_mean(found.loss, self.decisions.divisor).backward(torch.ones_like(found.loss))
        with torch.no_grad():
            if self._adascaled is not None:
                pairs = zip(parameters, before, strict=True)
                own = [p.grad if old is None else p.grad - old for p, old in pairs if p.grad is not None]
                self._squares.add_(_norm_of(own or [0 * self._one]).square())
            self._losses.add_(global_mean(found.loss, recipe.minibatch))
            self._others.add_(found.others)

    def _take(self) -> set[int]:
        """Give what was added to the reducer; the parameters that have no gradient in it, by number."""
        unused = set(self.reducer.mark())
        self._used.fill_(1)
        for number in unused:
            self._used[number] = 0
        self.reducer.take()
        return unused

    @torch.no_grad()
    def _update(self, unused: set[int], rate: float | Tensor) -> None:
        for number in unused:  # what no worker used keeps its value; only who left one out itself must ask
            if self._group.size == 1 or self._used[number] == 0:
                self.reducer.parameters[number].grad = None
        if self.task.counts:
            self._divide()
        clip_norm = self.decisions.recipe.clip_norm
        norms = [] if clip_norm is None and self._adascaled is None else [self._norm()]
        live = self._look(*norms)
        if self._adascaled is not None and bool(live):
            k = self.decisions.recipe.workers.workers  # whose gradients are divided by it
            rate = self._adascaled.gained(k**2 * float(self._squares), float(norms[0]) ** 2)
        if self.seeds > 1 or self._masks_on_device or bool(live):
            if clip_norm is not None:  # as torch.nn.utils.clip_grad_norm_ has it
                share = (clip_norm / (norms[0] + 1e-6)).clamp(max=1)
                untyped: Any = torch
                untyped._foreach_mul_(self._gradients(), share)
            set_rate(self.optimizer, rate, self._inside)  # may change the velocity, so it is part of the update
            self.optimizer.step()
        self._statistics.commit(live)
        if self._average is not None:
            self._average.move(live)

    def _divide(self) -> None:
        """Divide gradients and loss by the count over all workers, where they were divided by kn (Remark 3)."""
        count = self._others[0, 0]
        self.empty.logical_or_(count == 0)
        untyped: Any = torch
        untyped._foreach_mul_([self._losses, *self._gradients()], self.decisions.recipe.minibatch / count)

    def _norm(self) -> Tensor:
        """‖(1/kn)·Σ ∇l‖ over all parameters: process 0's, as the bits of a sum depend on threads and processors."""
        norm = _norm_of(self._gradients() or [0 * self._one])
        return self._group.sum(norm if self._group.rank == 0 else torch.zeros_like(norm))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.reducer.parameters if p.grad is not None]

    def _look(self, *norms: Tensor) -> Tensor:
        """Look for what is not finite; whether the update counts, a boolean scalar on the device.

        Args:
            norms: of the gradient, which may overflow where it does not.
        """
        if self.seeds > 1:
            self.alive &= self._losses.isfinite()
            return self._always
        # What GradScaler calls; times 1 changes nothing, and `_halted` is only ever set.
        torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
            [*self.reducer.summed(), *norms], self._halted, self._one
        )
        live = self._halted == 0
        self.alive.copy_(live)
        return live


def _norm_of(tensors: list[Tensor]) -> Tensor:
    untyped: Any = torch
    return untyped.linalg.vector_norm(torch.stack(untyped._foreach_norm(tensors)))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    Not `torch.manual_seed`, which without CUDA notes a stack trace for every call and keeps them all.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class HostFlags:
    """Two booleans an iteration: a stop was asked for, no seed is alive any more.

    On the CPU they are read at once. On CUDA they are copied behind the iteration and read one iteration later, so that
    the device always has work; every process reads the same iteration's, so all act alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._cuda = device.type == "cuda"
        self.late = 0
        """How many iterations before the one that it was read at a run had halted."""

    def read(self, stop: Tensor, alive: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        """(stop asked, halted) of this iteration; on CUDA of the one before, and of this one where `now`."""
        if not self._cuda:
            return stop.item() > 0, not alive.any().item()
        earlier, self._pending = self._pending, self._copy(stop, alive)
        stopped = halted = False
        for late, copied in ((1, earlier), (0, self._pending if now else None)):
            if copied is not None:
                flags, event = copied
                event.synchronize()
                stopped |= bool(flags[0])
                if flags[1] and not halted:
                    halted, self.late = True, late
        return stopped, halted

    def _copy(self, stop: Tensor, alive: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        on_host.copy_(torch.stack((stop > 0, ~alive.any())), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
