"""What a recipe decides of a run, as the paper has it: its iterations, rates, samples, divisor and optimizer (§2-3)."""

from __future__ import annotations

import copy
from typing import Self

from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.rules.momentum import velocity_inside
from onehour.rules.shuffle import SampleStream
from onehour.training.build import build_optimizer


class Decisions:
    """The decisions that loops get wrong, taken right; what deviates overrides some (`onehour.training.deviations`)."""

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
