"""What a loop trains, BatchNorm's running statistics (§2.3), and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import CHUNK, Feed
from onehour.dist.group import Group
from onehour.rules.batchnorm import RepeatedParameters, ghost_layers
from onehour.training.average import AveragedWeights
from onehour.training.refusals import refuse_batch, refuse_rows
from onehour.training.task import CLASSIFICATION, Evaluation, Task
from onehour.training.watchdog import never

IN_ORDER = ("cuda",)
"""Where the statistics of all layers are added at once, in whatever order a model calls them.

On a CPU only those of one or two workers, for which there is one order of adding: over more, all layers at once would
give other bits than those of runs that exist.
"""


@dataclass(frozen=True)
class ModelAndOptimizer:
    """A run's own network, its optimizer, and the average of its weights if it keeps one."""

    model: nn.Module
    optimizer: Optimizer
    average: AveragedWeights | None = None


class Network:
    """What a loop trains, and what each of its runs has of it: one run has all.

    Args:
        part: the run's.
    """

    def __init__(self, part: ModelAndOptimizer) -> None:
        self.model, self.optimizer, self.average, self.parts = part.model, part.optimizer, part.average, [part]

    def give_back(self) -> None:
        """Let each run's part hold what was trained; it does."""

    def alive(self, known: Tensor) -> Tensor:
        """Which seeds have finite numbers alone, bool (S,).

        Args:
            known: what the last iteration has found.
        """
        return known

    def clear(self, seed: int) -> None:
        """Take a seed that has left the finite numbers out of the network; alone, it ends the run."""


class StatisticsRule(Protocol):
    """How the running statistics move; `onehour.training.decisions.Decisions` says it."""

    def shares(self, momentum: float) -> Tensor | None: ...

    def moved(self, momentum: float) -> float: ...


class RunningStatistics:
    """The running means and variances of every ghost layer as one vector, moved once an iteration by all k workers.

    What travels is the layers' sums of means, then of variances, then how many workers each has seen.

    Args:
        model: converted by `convert_batchnorm` and on its device.
        rule: how much each worker counts, and how far an iteration moves them.

    Raises:
        ValueError: for a layer with momentum None: a cumulative average has no meaning for a schedule.
    """

    find: Callable[[nn.Module], list[Any]] = staticmethod(ghost_layers)
    """The layers of a model that it moves."""

    def __init__(self, model: nn.Module, rule: StatisticsRule) -> None:
        self.layers = self.find(model)
        widths = [layer.num_features for layer in self.layers]
        ends = list(accumulate(widths, initial=0))
        self._channels, self._columns = ends[-1], [slice(*pair) for pair in pairwise(ends)]
        self.floats = 2 * self._channels + len(widths)
        self._shares: Tensor | None = None
        self._seen: list[tuple[nn.Module, Tensor]] = []
        self._repeated = RepeatedParameters()
        self._pass: range | None = None
        self._numbers: dict[nn.Module, int] = {layer: number for number, layer in enumerate(self.layers)}
        if not self.layers:
            return
        momenta = [layer.momentum for layer in self.layers if layer.momentum is not None]
        if len(momenta) < len(self.layers):
            raise ValueError("a BatchNorm has momentum None (a cumulative average); give it a number such as 0.1")
        means = [layer.running_mean for layer in self.layers if layer.running_mean is not None]
        variances = [layer.running_var for layer in self.layers if layer.running_var is not None]
        self._running = torch.stack([torch.cat(means), torch.cat(variances)])
        counts = [layer.num_batches_tracked for layer in self.layers if layer.num_batches_tracked is not None]
        self._counts = torch.stack(counts)
        layer_of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
        self._layer_of = layer_of.to(self._running.device)
        kept = torch.tensor(momenta, dtype=self._running.dtype)
        moves = kept.new_tensor([rule.moved(float(momentum)) for momentum in kept])
        self._move = moves.to(self._running.device)[self._layer_of]
        given = [share for share in map(rule.shares, momenta) if share is not None]
        if given:
            self._shares = torch.stack(given).to(self._running)

    def attach(self, sums: Tensor, *, in_place: bool = False) -> None:
        """Let the layers' workers add up in `sums` (`floats` values); the layers' buffers become views of the vector.

        Whoever loads a state afterwards loads it into the vector.

        Args:
            in_place: each layer adds for itself, which a compiler makes part of what it does anyway; else all layers'
                are added at once behind each pass.
        """
        if not self.layers:
            return
        self._sums, self._workers = sums[: 2 * self._channels].view(2, -1), sums[2 * self._channels :]
        for number, (layer, own) in enumerate(zip(self.layers, self._columns, strict=True)):
            layer.running_mean, layer.running_var = self._running[:, own].unbind()
            layer.num_batches_tracked = self._counts[number]
            self._collect_from(number, in_place=in_place)

    def _collect_from(self, number: int, *, in_place: bool) -> None:
        layer = self.layers[number]
        if in_place:
            layer.sums = (self._sums[:, self._columns[number]], self._workers[number : number + 1])
        else:
            layer.seen = self._seen
            self._repeated.add(layer)

    def detach(self) -> None:
        """Leave the layers as they would be without a trainer: a forward alone is an iteration again."""
        self.end_pass()
        for layer in self.layers:
            layer.sums = layer.seen = layer.shares = layer.repeated = None

    def begin_pass(self, workers: range) -> None:
        """The next forward is over these workers."""
        self._repeated.begin(len(workers))
        self._pass = workers
        self._seen.clear()  # a forward that failed, as in a capture that was given up, has left some
        if self._shares is not None:
            for layer, shares in zip(self.layers, self._shares, strict=True):
                layer.shares = shares[workers.start : workers.stop]

    @torch.no_grad()
    def end_pass(self) -> None:
        """Add what the pass's workers have left; forget the repeated parameters, which belong to its weights."""
        self._repeated.begin(1)
        if not self._seen:
            return
        if self._pass is not None:
            refuse_rows(self._seen, len(self._pass))
        seen = [(self._numbers[layer], part) for layer, part in self._seen]
        self._seen.clear()
        if self._running.device.type in IN_ORDER or seen[0][1].shape[1] <= 2:
            seen.sort(key=lambda pair: pair[0])
        numbers, parts = [number for number, _ in seen], [part for _, part in seen]
        if numbers == list(range(len(self.layers))):
            self._add(torch.cat(parts, 2), slice(None), slice(None))
            return
        for number, part in zip(numbers, parts, strict=True):  # not each layer once
            self._add(part, self._columns[number], slice(number, number + 1))

    def _add(self, by_worker: Tensor, columns: slice, layers: slice) -> None:
        workers: Any = by_worker.shape[1]
        if self._shares is not None:
            assert self._pass is not None
            shares = self._shares[:, self._pass.start : self._pass.stop]
            by_worker = by_worker * shares[self._layer_of[columns]].t()
            workers = shares[layers].sum(1)
        self._sums[:, columns].add_(by_worker[:, 0] if by_worker.shape[1] == 1 else by_worker.sum(1))
        self._workers[layers].add_(workers)

    @torch.no_grad()
    def commit(self, live: Tensor) -> None:
        """Move every layer once by sums / workers seen; not where no worker saw it, nor where `live` is false.

        Args:
            live: a boolean scalar tensor, so that the host need not know it.
        """
        if not self.layers:
            return
        mean = self._sums / self._workers.index_select(0, self._layer_of)
        if self._workers.is_cpu and live and self._workers.all():  # on a GPU the host would wait for both
            self._running.lerp_(mean, self._move)
            self._counts += 1
            return
        seen = (self._workers > 0) & live
        mean = torch.where(seen.index_select(0, self._layer_of), mean, self._running)
        self._running.lerp_(mean, self._move)
        self._counts += seen


class EvaluationStoppedError(Exception):
    """All processes have left the evaluation before the same chunk."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    feed: Feed,
    recipe: Recipe,
    *,
    group: Group,
    task: Task = CLASSIFICATION,
    seeds: int = 1,
    stop_asked: Callable[[], bool] = never,
) -> list[Evaluation]:
    """Evaluate on every sample once; for each of the model's seeds.

    Chunks of 256 consecutive samples are dealt to the processes in turn. Each chunk's sums have a place of their own in
    the vector that is summed, so that no order of adding depends on p.

    Args:
        feed: of the validation data.
        seeds: S, how many networks the model is.
        stop_asked: whether to leave early: on a slow device an evaluation may take hours. Asked before each chunk.
        task: what a chunk adds, as `classification`.

    Raises:
        InputError: where the loss is not finite because a sample is not; in all processes, naming it.
        EvaluationStoppedError: in all processes together, once any was asked to stop.
        ValueError: where a task of one's own has counted nothing.
    """
    every = -(-feed.samples // CHUNK)
    own = range(group.rank, every, group.size)
    sums = torch.zeros(every, task.rows, seeds, dtype=torch.float64, device=group.device)
    was_training = model.training
    model.eval()
    try:
        batches = feed.chunks(own)
        for turn in range(-(-every // group.size)):  # as many for each process, whoever has a chunk less
            if any_process(stop_asked, group):
                raise EvaluationStoppedError
            if turn < len(own):
                found = task(model, next(batches), recipe, evaluating=True)
                sums[own[turn], 0], sums[own[turn], 1:] = found.loss, found.others
    finally:
        model.train(was_training)
    by_seed = group.sum(sums).cpu().permute(2, 1, 0).numpy().tolist()
    for chunk in sorted({chunk for losses, *_ in by_seed for chunk in _first_not_finite(losses)}):
        batch = next(feed.chunks(range(chunk, chunk + 1)))
        if seeds > 1:  # all have the same
            batch = batch[0].chunk(seeds, 1)[0], batch[1]
        refuse_batch(batch, lambda row, first=chunk * CHUNK: feed.called(first + row))
    return [task.evaluated([sum(row) for row in rows], feed.samples) for rows in by_seed]


def _first_not_finite(losses: list[float]) -> Iterator[int]:
    yield from [chunk for chunk, loss in enumerate(losses) if not math.isfinite(loss)][:1]


def any_process(asked: Callable[[], bool], group: Group) -> bool:
    """Whether any process was asked; all processes call it together."""
    if group.size == 1:  # a GPU need not be waited for
        return asked()
    return group.sum(torch.tensor(float(asked()), device=group.device)).item() > 0
