"""BatchNorm's statistics of the weights as they are, over training images, in place of the running averages (§2.3).

Running averages lag behind the weights, and a large minibatch updates them less often: the paper names that as the
reason why its early validation curves at 8k are noisy (F4). Here μ = (1/K)·Σ μ_j and σ² = (1/K)·Σ σ²_j over K workers
of n training images, each normalised by its own statistics, under the weights of one iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.loader import CHUNK, Feed
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.execution import Execution
from onehour.rules.batchnorm import ghost_layers
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch, whole_workers
from onehour.rules.shuffle import SampleStream
from onehour.training.build import pick_loaders
from onehour.training.engine import EvaluationStoppedError, any_process
from onehour.training.state import model_state
from onehour.training.step import seed_torch
from onehour.training.task import CLASSIFICATION, Task
from onehour.training.watchdog import never
from onehour.training.weights import OpenedWeights, WeightsEvaluation

IMAGES = 8192
"""Training images unless told otherwise, or all where there are fewer."""
BLOCK = 32
"""Passes whose sums have a place each before they are added, so that no order of adding depends on p."""


class Recalibration:
    """Statistics of training images for a model's evaluations; its own running statistics are put back behind each.

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
        self._layers = ghost_layers(model)
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
            assert layer.running_mean is not None
            assert layer.running_var is not None
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
                    if number % size == 0 and any_process(stop_asked, self.group):
                        raise EvaluationStoppedError
                    if number % size == rank:
                        collect(row)
                        seed_torch(seed_for(self.recipe.seed, "recalibrate", number), device)
                        self._task(self.model, next(batches), self.recipe)
                total += self.group.sum(rows).sum(0)
        return total

    @contextmanager
    def _collecting(self) -> Generator[Callable[[Tensor], None]]:
        """While entered the model trains, and its layers add to the vector that the function was last given."""
        kept = [(layer, layer.seen, layer.sums, layer.shares) for layer in self._layers]
        random: Any = torch.random  # which has no types
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        was_training = self.model.training

        def collect(row: Tensor) -> None:
            sums, counts = row[: 2 * self._channels].view(2, -1), row[2 * self._channels :]
            for number, (layer, own) in enumerate(zip(self._layers, self._columns, strict=True)):
                layer.sums = (sums[:, own], counts[number : number + 1])

        try:
            self.model.train()
            for layer in self._layers:
                layer.seen = layer.shares = None
            with random.fork_rng(devices=devices):
                yield collect
        finally:
            self.model.train(was_training)
            for layer, seen, sums, shares in kept:
                layer.seen, layer.sums, layer.shares = seen, sums, shares


@dataclass(frozen=True)
class Recalibrated:
    """A model evaluated with its running averages, and with statistics of so many training images."""

    images: int
    before: WeightsEvaluation
    after: WeightsEvaluation
    weights: dict[str, Tensor]
    """Its state dict, on the CPU, with the new statistics."""


def recalibrated(
    source: Path,
    *,
    recipe: Recipe,
    images: int | None = None,
    device: str = "auto",
    ema: bool = False,
) -> Recalibrated:
    """Recalibrate the weights of a run, or of a file; nothing is written.

    Args:
        images: training images; None for the recipe's number, else `IMAGES` or all if there are fewer.
    """
    opened = OpenedWeights(source, recipe=recipe, device=device, ema=ema)
    if images is None:
        most, n = min(IMAGES, opened.data.looks[0].samples), recipe.per_worker
        images = recipe.recalibrate or max(1, most // n) * n
    else:  # here, where they have the name that they were given by
        whole_workers("--images", images, per_worker=recipe.per_worker, samples=opened.data.looks[0].samples)
    group, loaders = Group(device=opened.device), pick_loaders(Execution(), opened.data)
    with closing(
        Recalibration(
            opened.model, opened.recipe, opened.data, images=images, group=group, loaders=loaders, task=opened.task
        )
    ) as recalibration:
        before = opened.evaluate()
        recalibration.apply()
    return Recalibrated(images, before, opened.evaluate(), model_state(opened.model))
