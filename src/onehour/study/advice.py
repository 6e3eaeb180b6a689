"""Up to which minibatch the linear rule should hold, foreseen from runs at the base minibatch alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from onehour.config import ADAPTIVE, Recipe
from onehour.noise import FEWEST, NoiseScale, noise_scale
from onehour.rules.schedule import parse_milestones
from onehour.study.results import Study
from onehour.study.wording import number, size_label
from onehour.training.record import Run

FACTOR = 2  # the error is expected to begin to rise at a minibatch within this factor of B, to either side


@dataclass(frozen=True)
class Advice:
    """What the gradient noise of a run at minibatch `base` foresees."""

    base: int
    noise: NoiseScale

    def to(self, scale: float) -> int:
        """The largest doubling of the base minibatch that is not above a noise scale; the base where even that is."""
        return self.base * 2 ** max(0, math.floor(math.log2(max(scale, 1) / self.base)))

    def ramp(self, recipe: Recipe, minibatch: int) -> tuple[str, ...]:
        """The ramp by which a run may come to a minibatch that is beyond its advice; () where it needs none.

        At the rate's peak it begins with the largest minibatch to which the rule should hold. Where the rate drops by a
        factor, the noise scale is taken to grow by its inverse: |G|² falls with the rate (Smith et al. 2018).

        Raises:
            ValueError: if the noise scale is not known, the rate does not drop, or not far enough.
        """
        scale, drops = self.noise.scale, parse_milestones(recipe.milestones) if recipe.decay == "step" else []
        if scale is None:
            raise ValueError(f"no ramp can be advised: the noise scale is {self.noise_words}")
        stages: list[str] = []
        for drop in (drop for drop in drops if drop < recipe.epochs):
            size = self.to(scale)
            if size >= minibatch:
                return tuple(stages)
            if not stages or not stages[-1].startswith(f"{size}:"):
                stages.append(f"{size}:{drop}")
            else:  # it has not grown by a doubling, so that phase lasts
                stages[-1] = f"{size}:{drop}"
            scale /= recipe.decay_factor
        if (last := self.to(scale)) < minibatch:
            raise ValueError(
                f"no ramp reaches minibatch {minibatch}: after the last drop of the rate the rule should hold to"
                f" {last}; ask for at most that"
            )
        return tuple(stages)

    def as_dict(self) -> dict[str, Any]:
        noise = self.noise
        named = {"noise_scale" if name == "scale" else name: value for name, value in asdict(noise).items()}
        ends = {"": noise.scale, "_low": noise.low, "_high": noise.high}
        holds = {f"holds_to{end}": None if at is None else self.to(at) for end, at in ends.items()}
        return {"base_minibatch": self.base} | named | holds

    def lines(self) -> list[str]:
        noise = self.noise
        found = f"tr Σ = {noise.trace:.3g}, |G|² = {noise.square:.3g} ± {noise.square_error:.2g} (standard error)"
        return [
            f"noise scale  {self.noise_words}",
            f"rests on     {noise.points} points at the peak rate: {found}",
            f"advice       {self.sentence}",
            f"how sure     a rule of thumb: expect the error to begin to rise within a factor of {FACTOR} of the noise"
            " scale; `onehour sweep` finds out",
        ]

    @property
    def noise_words(self) -> str:
        noise = self.noise
        if noise.scale is None:
            least = "" if noise.low is None else f"; above {number(noise.low, 0)} samples with 97.5 % confidence"
            why = "tr Σ is not above zero" if noise.trace <= 0 else "|G|² does not exceed its own error"
            return f"not estimable: {why}{least}"
        assert noise.low is not None
        assert noise.high is not None
        return f"{number(noise.scale, 0)} samples (95 %: {number(noise.low, 0)} to {number(noise.high, 0)})"

    @property
    def sentence(self) -> str:
        rule, noise = "the linear rule should hold to minibatch", self.noise
        if noise.scale is None:
            return "none is possible" if noise.low is None else f"{rule} {size_label(self.to(noise.low))} at least"
        assert noise.low is not None
        assert noise.high is not None
        size, low, high = (self.to(scale) for scale in (noise.scale, noise.low, noise.high))
        between = f"; by the interval to {size_label(low)} … {size_label(high)}" if low < high else ""
        return f"{rule} {size_label(size)} ({size // self.base}×){between}"


def advice_of(run: Run) -> Advice:
    """The advice of a run at its base minibatch, finished or not."""
    recipe = run.recipe
    if recipe.minibatch != recipe.base_minibatch:
        raise ValueError(
            f"{run.folder} is a run at minibatch {recipe.minibatch}; what predicts where the rule ends is the noise at"
            f" the base minibatch, {recipe.base_minibatch}: give a run at that"
        )
    if recipe.optimizer in ADAPTIVE:
        raise ValueError(f"{run.folder} was trained with {recipe.optimizer}, for which the linear rule does not hold")
    points = run.noise
    if not points:
        raise ValueError(
            f"{run.folder} has no gradient noise recorded; train it with --noise, into another folder, and for epochs"
            " at the peak rate behind the first one and the warmup"
        )
    if len(points) < FEWEST:
        raise ValueError(
            f"{run.folder} has {len(points)} point{'s' * (len(points) != 1)} of gradient noise, and an interval needs"
            f" {FEWEST}: {'its iterations at the peak rate are too few' if run.finished else 'let it go on'}"
        )
    return Advice(recipe.minibatch, noise_scale((t, s) for _, t, s in points))


def advice_of_study(study: Study) -> Advice | None:
    """The advice of all runs at the base minibatch together; None where they were too few, or measured no noise."""
    recipe, reference = study.recipe, study.reference
    if recipe is None or reference is None or reference.minibatch != recipe.base_minibatch:
        return None
    if recipe.optimizer in ADAPTIVE:
        return None
    points = [point for result in reference.results for point in result.noise]
    return Advice(recipe.base_minibatch, noise_scale(points)) if len(points) >= FEWEST else None
