"""What a recipe decides of a run, as the paper has it: its iterations, rates, samples, divisor and optimizer (§2-3).

Some recipes decide otherwise: by AdaScale's rate, or with ONE thing wrong, whose cost is then measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.rules.adascale import AdaScale
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch
from onehour.rules.momentum import InsideSGD, velocity_inside
from onehour.rules.shuffle import SampleStream, permutation
from onehour.training.build import build_optimizer


class Decisions:
    """The decisions that loops get wrong, taken right; what deviates overrides some."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.samples is not None
        self.recipe, self.samples = recipe, recipe.samples
        self.ramp, self.schedule = recipe.phases(recipe.samples), recipe.schedule
        self.iterations = self.ramp.iterations(self.samples, recipe.epochs)
        """How many the run has, at most."""

    def is_over(self, done: int) -> bool:
        """Whether the run ends with its iteration `done`."""
        return done >= self.iterations

    def during(self, iteration: int) -> Self:
        """Those of an iteration: where the minibatch grows, their recipe is that of its minibatch."""
        size = self.ramp.at(iteration).minibatch.size
        if size == self.recipe.minibatch:
            return self
        now = copy.copy(self)
        now.recipe = next(stage for stage, _ in self.recipe.stages if stage.minibatch == size)
        return now

    def epoch(self, iteration: int) -> float:
        """The fractional epoch at which iteration t begins."""
        return self.ramp.position(iteration) / self.samples

    def ends_epoch(self, done: int) -> bool:
        """Whether an epoch's last sample is among those of the iteration that makes it `done`."""
        before, now = (self.ramp.position(iteration) // self.samples for iteration in (done - 1, done))
        return now > before

    def evaluated_epoch(self, done: int) -> float:
        """What the evaluation after iteration `done` is of: the epoch that has ended, or all epochs of the run."""
        return self.recipe.epochs if done == self.iterations else self.ramp.position(done) // self.samples

    @property
    def divisor(self) -> int:
        """What the summed loss is divided by: kn (Remark 3)."""
        return self.recipe.minibatch

    def rate(self, iteration: int) -> float:
        """The rate of iteration t: of its fractional epoch (§2.2)."""
        return self.schedule(self.epoch(iteration))

    adapts = False
    """Whether an iteration's rate follows its own gradients."""

    def adapted(self, rate: float, squares: float, square: float) -> float:
        """The rate of the iteration whose gradients these are: the schedule's.

        Args:
            squares, square: as `AdaScale.gain` has them, of the k workers.
        """
        return rate

    def state(self) -> list[float] | None:
        """What a run that goes on must know of the gradients before, where the rate does."""
        return None

    def load(self, state: list[float]) -> None:
        """Go on from what `state` gave."""

    @property
    def base_iterations(self) -> float | None:
        """How many iterations of the base those so far count as, where that follows from their gradients."""
        return None

    def stream(self) -> SampleStream:
        """Which samples each iteration takes: one permutation of all (Remark 4)."""
        return SampleStream(samples=self.samples, minibatch=self.recipe.workers, seed=self.recipe.seed, ramp=self.ramp)

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer, with its parameter groups (Remark 1)."""
        return build_optimizer(self.recipe, model)

    def corrected(self, optimizer: Optimizer) -> set[str]:
        """The optimizer's state that follows the rate (Remark 2)."""
        return velocity_inside(optimizer)

    def shares(self, momentum: float) -> Tensor | None:
        """How much each worker's BatchNorm statistics count in an iteration's, of shape (k,); None for all alike.

        Args:
            momentum: torch's, the share of an iteration's statistics in the running ones.
        """
        return None

    def moved(self, momentum: float) -> float:
        """How far an iteration moves the running statistics: `momentum`, once (§2.3)."""
        return momentum


class AdaScaled(Decisions):
    """The rate of each iteration is the base's, at the iterations of the base done so far, times its gain."""

    adapts = True

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.gains = AdaScale(recipe.minibatch / recipe.base_minibatch)
        self._rate = recipe.schedule(0.0)
        # As many as the base has, where every r is 1.
        self.iterations = Minibatch(recipe.base_minibatch, workers=1).iterations(self.samples, recipe.epochs)

    def is_over(self, done: int) -> bool:
        return (
            super().is_over(done) or self.gains.steps * self.recipe.base_minibatch >= self.samples * self.recipe.epochs
        )

    def evaluated_epoch(self, done: int) -> float:
        """As ever, but a run ends where its gains say, within an epoch most often."""
        position = self.ramp.position(done)
        whole = done == 0 or self.ends_epoch(done)
        return position // self.samples if whole else position / self.samples

    def rate(self, iteration: int) -> float:
        return self._rate

    def adapted(self, rate: float, squares: float, square: float) -> float:
        usual = self.schedule(math.floor(self.gains.steps) * self.recipe.base_minibatch / self.samples)
        parts = self.recipe.workers.workers
        self._rate = usual * self.gains.gain(parts=parts, squares=squares, square=square)
        return self._rate

    def state(self) -> list[float]:
        """Where the gains stand, and the last rate."""
        return [*self.gains.state(), self._rate]

    def load(self, state: list[float]) -> None:
        *gains, self._rate = state
        self.gains.load(gains)

    @property
    def base_iterations(self) -> float:
        return self.gains.steps


class _SumNotMean(Decisions):
    """Means over n, summed by the reduction: k times too large."""

    @property
    def divisor(self) -> int:
        return self.recipe.per_worker


class _DecayOnBatchNorm(Decisions):
    """λ on every parameter."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        return build_optimizer(self.recipe, model, without=())


class _MomentumInside(Decisions):
    """The rate folded into the velocity, which keeps the old rate's share when the rate changes."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        right = build_optimizer(self.recipe, model)
        own = {"params", "weight_decay", "lr", "lr_scale"}
        groups = [{key: group[key] for key in own & group.keys()} for group in right.param_groups]
        return InsideSGD(groups, lr=self.rate(0), momentum=self.recipe.momentum, nesterov=self.recipe.nesterov)

    def corrected(self, optimizer: Optimizer) -> set[str]:
        return set()


class _OverlappingShards(Decisions):
    """Each worker draws its share of an epoch from a permutation of its own."""

    def stream(self) -> SampleStream:
        return _OwnShuffles(samples=self.samples, minibatch=self.recipe.workers, seed=self.recipe.seed)


class _OwnShuffles(SampleStream):
    """Worker j's share of epoch e is that of its own permutation: the positions that it has in the stream."""

    @cached_property
    def _share(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(maxsize=2 * self.minibatch.workers)(self._own)

    def epochs_and_indices(self, iteration: int, worker: int | range | None = None) -> tuple[np.ndarray, np.ndarray]:
        positions, k = self.positions(iteration, worker), self.minibatch.workers
        epochs, offsets = np.divmod(positions, self.samples)
        places = zip(positions % k, epochs, offsets // k, strict=True)
        return epochs, np.array([self._share(int(j), int(epoch))[place] for j, epoch, place in places])

    def _own(self, worker: int, epoch: int) -> np.ndarray:
        order, k = permutation(self.samples, seed_for(self.seed, "worker", worker), epoch), self.minibatch.workers
        return order[(worker - epoch * self.samples) % k :: k].copy()


class _StatisticsOfRank0(Decisions):
    """Worker 0's statistics alone are kept, as by a trainer that saves what process 0 has."""

    def shares(self, momentum: float) -> Tensor | None:
        return torch.eye(self.recipe.workers.workers, 1).view(-1)


class _StatisticsKTimes(Decisions):
    """The running statistics move at every worker's pass, as accumulation without care does."""

    def shares(self, momentum: float) -> Tensor | None:
        later = torch.arange(self.recipe.workers.workers - 1, -1, -1, dtype=torch.float64)
        moves = momentum * (1 - momentum) ** later
        return moves / moves.sum()

    def moved(self, momentum: float) -> float:
        return 1 - (1 - momentum) ** self.recipe.workers.workers


class _WarmupPerEpoch(Decisions):
    """During warmup the rate is raised once an epoch."""

    def rate(self, iteration: int) -> float:
        epoch = self.epoch(iteration)
        warms_up = self.recipe.warms_up and epoch < self.recipe.warmup_epochs
        return self.recipe.schedule(float(int(epoch)) if warms_up else epoch)


BROKEN: dict[str, type[Decisions]] = {
    "gradient-sum-not-mean": _SumNotMean,
    "decay-on-batchnorm": _DecayOnBatchNorm,
    "momentum-inside-uncorrected": _MomentumInside,
    "overlapping-shards": _OverlappingShards,
    "batchnorm-stats-of-rank-0": _StatisticsOfRank0,
    "batchnorm-stats-k-times": _StatisticsKTimes,
    "warmup-per-epoch": _WarmupPerEpoch,
}


def decisions_of(recipe: Recipe) -> Decisions:
    """A recipe's decisions, with its pitfall if it has one."""
    usual = AdaScaled if recipe.scaling == "adascale" else Decisions
    return (usual if recipe.pitfall is None else BROKEN[recipe.pitfall])(recipe)
