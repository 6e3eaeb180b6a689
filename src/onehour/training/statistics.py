"""BatchNorm's running statistics, of ghost layers or a network's own: a run moves them once an iteration (§2.3)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from onehour.rules.batchnorm import RepeatedParameters, ghost_layers
from onehour.training.decisions import Decisions
from onehour.training.refusals import refuse_rows

IN_ORDER = ("cuda",)
"""Where the statistics of all layers are added at once, in whatever order a model calls them.

On a CPU only those of one or two workers, for which there is one order of adding: over more, all layers at once would
give other bits than those of runs that exist.
"""


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

    def __init__(self, model: nn.Module, rule: Decisions) -> None:
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


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def tracked_layers(model: nn.Module) -> list[_BatchNorm]:
    """The model's BatchNorm layers that keep running statistics, converted or not."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


class KeptStatistics(RunningStatistics):
    """The running statistics of layers that move them by themselves, whatever their rule.

    A pass is one worker, and each begins with what the iteration began with; after the iteration they are the mean over
    all k workers of what a pass has left. With torch's own rule r ← (1 − m)·r + m·s that is (1 − m)·r + m·Σs/k, as for
    ghost layers.
    """

    find = staticmethod(tracked_layers)

    def __init__(self, model: nn.Module, rule: Decisions) -> None:
        super().__init__(model, rule)
        if self.layers:
            self._begun = self._running.clone(), self._counts.clone()
            self._move.fill_(1)
        self._views: list[tuple[nn.Module, str, Tensor]] = []
        self._between = True
        """Whether the layers hold what an iteration begins with."""

    def _collect_from(self, number: int, *, in_place: bool) -> None:
        layer = self.layers[number]
        self._views += [(layer, name, getattr(layer, name)) for name in BUFFERS]

    def detach(self) -> None:
        """Nothing was left with the layers."""

    def begin_pass(self, workers: range) -> None:
        assert len(workers) == 1
        if not self.layers:
            return
        for begun, now in zip(self._begun, (self._running, self._counts), strict=True):
            if self._between:
                begun.copy_(now)
            else:
                now.copy_(begun)
        self._between = False

    @torch.no_grad()
    def end_pass(self) -> None:
        """Add what the worker's pass has left, where it has used a layer."""
        if not self.layers:
            return
        for layer, name, view in self._views:
            left = getattr(layer, name)
            if left is not view:  # it assigns a tensor of its own
                view.copy_(left)
                setattr(layer, name, view)
        used = self._counts != self._begun[1]
        self._sums += torch.where(used.index_select(0, self._layer_of), self._running, 0.0)
        self._workers += used

    def commit(self, live: Tensor) -> None:
        if not self.layers:
            return
        self._running.copy_(self._begun[0])
        self._counts.copy_(self._begun[1])
        self._between = True
        super().commit(live)
