"""BatchNorm's running statistics, of ghost layers or a network's own: moved each iteration, or recalibrated (§2.3)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from onehour.config import Recipe
from onehour.data.loader import CHUNK, Feed
from onehour.data.sources import Data
from onehour.dist.devices import own_numbers, seed_torch
from onehour.dist.group import Group
from onehour.dist.watchdog import never
from onehour.rules.batchnorm import ghost_layers
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch, whole_workers
from onehour.rules.shuffle import SampleStream
from onehour.training.decisions import Decisions
from onehour.training.task import CLASSIFICATION, Task, refuse_rows

IN_ORDER = ("cuda",)
"""Where the statistics of all layers are added at once, in whatever order a model calls them.

On a CPU only those of one or two workers, for which there is one order of adding: over more, all layers at once would
give other bits than those of runs that exist.
"""
BLOCK = 32
"""Passes whose sums have a place each before they are added, so that no order of adding depends on p."""
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _RepeatedParameters:
    """γ and β of layers, repeated for a pass over g workers, those of equal width together.

    One operation a width in place of two a layer: for small models those cost as much as the normalisation.
    """

    def __init__(self) -> None:
        self._widths: dict[int, list[Any]] = {}
        self._of: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def add(self, layer: Any) -> None:
        """Let a layer take its own from here."""
        layer.repeated = self._of
        if layer.affine:
            self._widths.setdefault(layer.num_features, []).append(layer)

    def begin(self, g: int) -> None:
        """Repeat them; called anew for every pass. g = 1 needs none, and forgets the last."""
        self._of.clear()
        for alike in self._widths.values() if g > 1 else ():
            rows = torch.stack([p for layer in alike for p in (layer.weight, layer.bias)]).repeat(1, g).unbind()
            self._of.update(zip(alike, zip(rows[::2], rows[1::2], strict=True), strict=True))


class _Places:
    """Room for all layers' statistics in a pass over g workers: no layer makes its own, and all are added at once.

    Args:
        columns: of each layer, among all channels.
        like: a tensor of the type and on the device of the layers.
    """

    def __init__(self, layers: list[Any], columns: list[slice], g: int, like: Tensor) -> None:
        self._g, self._room = g, like.new_zeros(2, g * columns[-1].stop)
        rows = [self._room[:, g * own.start : g * own.stop] for own in columns]
        self.of = {layer: row.unbind() for layer, row in zip(layers, rows, strict=True)}
        self.parts = [(layer, row.view(2, g, -1)) for layer, row in zip(layers, rows, strict=True)]
        numbers = torch.arange(self._room.shape[1])
        by_worker = torch.cat([numbers[g * own.start : g * own.stop].view(g, -1) for own in columns], 1)
        self._by_worker = by_worker.flatten().to(like.device)

    def begin(self) -> dict[nn.Module, tuple[Tensor, ...]]:
        """The layers' places, as zeros."""
        self._room.zero_()
        return self.of

    def by_worker(self) -> Tensor:
        """All of it, (2, g, channels)."""
        room = self._room if self._g == 1 else self._room.index_select(1, self._by_worker)
        return room.view(2, self._g, -1)


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
        self._places: dict[nn.Module, tuple[Tensor, ...]] = {}
        self._laid_out: dict[int, _Places] = {}
        self._placed: _Places | None = None
        self._lays_out = False
        self._repeated = _RepeatedParameters()
        self._pass: range | None = None
        self.between = True
        """Whether the layers hold what an iteration begins with."""
        self._numbers: dict[nn.Module, int] = {layer: number for number, layer in enumerate(self.layers)}
        if not self.layers:
            return
        momenta = [layer.momentum for layer in self.layers if layer.momentum is not None]
        if len(momenta) < len(self.layers):
            raise ValueError("a BatchNorm has momentum None (a cumulative average); give it a number such as 0.1")
        means, variances, counts = ([getattr(layer, name) for layer in self.layers] for name in BUFFERS)
        self._running = torch.stack([torch.cat(means), torch.cat(variances)])
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
        kinds = {p.dtype for layer in self.layers for p in (layer.weight, layer.running_mean) if p is not None}
        self._lays_out = not in_place and len(kinds) == 1
        for number, (layer, own) in enumerate(zip(self.layers, self._columns, strict=True)):
            layer.running_mean, layer.running_var = self._running[:, own].unbind()
            layer.num_batches_tracked = self._counts[number]
            self._collect_from(number, in_place=in_place)

    def _collect_from(self, number: int, *, in_place: bool) -> None:
        layer = self.layers[number]
        if in_place:
            layer.sums = (self._sums[:, self._columns[number]], self._workers[number : number + 1])
        else:
            layer.seen, layer.places = self._seen, self._places
            self._repeated.add(layer)

    def detach(self) -> None:
        """Leave the layers as they would be without a trainer: a forward alone is an iteration again."""
        self.end_pass()
        for layer in self.layers:
            layer.sums = layer.seen = layer.places = layer.shares = layer.repeated = None

    def begin_pass(self, workers: range) -> None:
        """The next forward is over these workers."""
        self._repeated.begin(len(workers))
        self._pass = workers
        self._seen.clear()  # a forward that failed, as in a capture that was given up, has left some
        self._places.clear()
        self._placed = None
        if self._lays_out and self._in_order(g := len(workers)):
            if g not in self._laid_out:
                self._laid_out[g] = _Places(self.layers, self._columns, g, self._running)
            self._placed = self._laid_out[g]
            self._places.update(self._placed.begin())
        if self._shares is not None:
            for layer, shares in zip(self.layers, self._shares, strict=True):
                layer.shares = shares[workers.start : workers.stop]

    def _in_order(self, g: int) -> bool:
        return self._running.device.type in IN_ORDER or g <= 2

    @torch.no_grad()
    def end_pass(self) -> None:
        """Add what the pass's workers have left; forget the repeated parameters, which belong to its weights."""
        self._repeated.begin(1)
        placed, self._placed = self._placed, None
        if placed is not None and not self._places and not self._seen:  # each layer once
            self._add(placed.by_worker(), slice(None), slice(None))
            return
        if placed is not None:
            self._seen[:0] = [(layer, part) for layer, part in placed.parts if layer not in self._places]
            self._places.clear()
        if not self._seen:
            return
        if self._pass is not None:
            refuse_rows(self._seen, len(self._pass))
        seen = [(self._numbers[layer], part) for layer, part in self._seen]
        self._seen.clear()
        if self._in_order(seen[0][1].shape[1]):
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
        seen = (self._workers > 0) & live
        mean = torch.where(seen.index_select(0, self._layer_of), mean, self._running)
        self._running.lerp_(mean, self._move)
        self._counts += seen


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
            if self.between:
                begun.copy_(now)
            else:
                now.copy_(begun)
        self.between = False

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
        self.between = True
        super().commit(live)


class EvaluationStoppedError(Exception):
    """All processes have left the evaluation before the same chunk."""


class Recalibration:
    """Statistics of training images for a model's evaluations; its own running statistics are put back behind each.

    Running averages lag behind the weights, and a large minibatch updates them less often: the paper names that as the
    reason why its early validation curves at 8k are noisy (F4). Here μ = (1/K)·Σ μ_j and σ² = (1/K)·Σ σ²_j over K
    workers of n training images, each normalised by its own statistics, under the weights of one iteration.

    The images are always the same ones, drawn and augmented as in training under a key of their own. Pass by pass a
    batch has the same workers on any number of processes, and the passes are added in their order.

    Args:
        recipe: its seed says which images, its n how many are normalised together.
        images: how many, a multiple of n, at most all.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data,
        *,
        images: int,
        group: Group,
        loaders: int,
        task: Task = CLASSIFICATION,
    ) -> None:
        self.model, self.recipe, self.group, self._task = model, recipe, group, task
        self._layers: list[Any] = ghost_layers(model)
        if not self._layers:
            if recipe.batchnorm == "keep":
                raise ValueError("recalibrate is for batchnorm ghost, and this run has batchnorm keep")
            raise ValueError("the model has no BatchNorm with running statistics, so there is nothing to recalibrate")
        samples, n = data.looks[0].samples, recipe.per_worker
        workers = whole_workers("recalibrate", images, per_worker=n, samples=samples)
        together = max(1, CHUNK // n)
        self._passes = [range(first, min(first + together, workers)) for first in range(0, workers, together)]
        seed = seed_for(recipe.seed, "recalibrate")
        stream = SampleStream(samples=samples, minibatch=Minibatch(n, workers), seed=seed)
        options: Any = {"loaders": loaders, "device": group.device, "stream": stream}
        options |= {"look": data.looks[0], "form": data.form}
        self._feed = Feed(data.train, seed=seed, **options)
        ends = list(accumulate((layer.num_features for layer in self._layers), initial=0))
        self._channels, self._columns = ends[-1], [slice(*pair) for pair in pairwise(ends)]

    @contextmanager
    def applied(self, stop_asked: Callable[[], bool] = never) -> Generator[None]:
        """While entered, the layers have the statistics of the images under the present weights.

        Every buffer of the model is afterwards what it was, in the memory where it was.

        Raises:
            EvaluationStoppedError: in all processes together, once any was asked to stop.
        """
        kept = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            self.apply(stop_asked)
            yield
        finally:
            for module, name, buffer, before in kept:
                setattr(module, name, buffer.copy_(before))

    @torch.no_grad()
    def apply(self, stop_asked: Callable[[], bool] = never) -> None:
        """Give the layers the statistics of the images, for good; `stop_asked` as of `applied`."""
        found = self._measured(stop_asked)
        means, counts = found[: 2 * self._channels].view(2, -1), found[2 * self._channels :].cpu().numpy().tolist()
        for layer, own, count in zip(self._layers, self._columns, counts, strict=True):
            if count:  # else no forward calls it
                layer.running_mean.copy_(means[0, own] / count)
                layer.running_var.copy_(means[1, own] / count)

    def close(self) -> None:
        self._feed.close()

    def _measured(self, stop_asked: Callable[[], bool]) -> Tensor:
        """Σ of the workers' means, then of their unbiased variances, then each layer's number of workers; float64."""
        rank, size, device = self.group.rank, self.group.size, self.group.device
        batches = self._feed.passes(self._passes[rank::size], start=0, stop=1)
        total = torch.zeros(2 * self._channels + len(self._layers), dtype=torch.float64, device=device)
        with self._collecting() as collect:
            for first in range(0, len(self._passes), BLOCK):
                block = range(first, min(first + BLOCK, len(self._passes)))
                rows = total.new_zeros(len(block), len(total))
                for number, row in zip(block, rows, strict=True):
                    if number % size == 0 and self.group.any(stop_asked()):
                        raise EvaluationStoppedError
                    if number % size == rank:
                        collect(row)
                        batch = next(batches)  # first: reading someone's data may seed everything too
                        seed_torch(seed_for(self.recipe.seed, "recalibrate", number), device)
                        self._task(self.model, batch, self.recipe)
                total += self.group.sum(rows).sum(0)
        return total

    @contextmanager
    def _collecting(self) -> Generator[Callable[[Tensor], None]]:
        """While entered the model trains, and its layers add to the vector that the function was last given."""
        kept = [(layer, layer.seen, layer.sums, layer.shares) for layer in self._layers]
        was_training = self.model.training

        def collect(row: Tensor) -> None:
            sums, counts = row[: 2 * self._channels].view(2, -1), row[2 * self._channels :]
            for number, (layer, own) in enumerate(zip(self._layers, self._columns, strict=True)):
                layer.sums = (sums[:, own], counts[number : number + 1])

        try:
            self.model.train()
            for layer in self._layers:
                layer.seen = layer.shares = None
            with own_numbers(self.group.device):
                yield collect
        finally:
            self.model.train(was_training)
            for layer, seen, sums, shares in kept:
                layer.seen, layer.sums, layer.shares = seen, sums, shares
