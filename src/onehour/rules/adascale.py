"""AdaScale: the rate grows by what the workers' gradients say a larger minibatch gains (Johnson et al. 2020).

An iteration at S times the minibatch counts as r iterations of the base, 1 ≤ r ≤ S: as S where gradients are mostly
noise, as 1 where they are none. Past the break r falls, so the rate stays below the linear rule's, no warmup is needed,
and a run takes more epochs than the base's (arXiv:2007.05105).
"""

from __future__ import annotations

from onehour.rules.arguments import not_negative, positive, positive_int

__all__ = ["AdaScale"]

LEAST = 1e-6
"""Of σ̂², so that r exists (appendix B.3)."""


class AdaScale:
    """The gain ratio r of iterations at S times the base minibatch, and τ, how many of the base they count as.

    r = (σ² + μ²) / (σ²/S + μ²), where σ² is the variance of the base minibatch's gradient, the trace of its covariance,
    and μ² the square of the gradient's norm. Both are averaged with θ = max(0, 1 − S/1000); the first 1/(1 − θ)
    iterations have the mean of those so far (appendix B.3). The rate of iteration t is r·lr(⌊τ⌋) with the base's own
    schedule lr; then τ grows by r, and the run ends once τ has come to the base's number of iterations.

    Args:
        scale: S, kn / base.

    Raises:
        ValueError: below 1.

    >>> gains = AdaScale(scale=4)
    >>> round(gains.gain(parts=4, squares=8.0, square=2.0), 6)  # of four equal gradients nothing is noise
    1.0
    """

    def __init__(self, scale: float) -> None:
        if positive("scale", scale) < 1:
            raise ValueError(f"scale must be at least 1, got {scale:g}: AdaScale grows the rate from the base's on")
        self.scale, self.smoothing = scale, max(0.0, 1 - scale / 1000)
        self.steps = 0.0
        """τ."""
        self.count, self.variance, self.square = 0, 0.0, 0.0

    def gain(self, *, parts: int, squares: float, square: float) -> float:
        """Take an iteration in; its r.

        σ̂² = (S/c)·(1/(c − 1)·Σ‖g_i‖² − c/(c − 1)·‖ḡ‖²), μ̂² = ‖ḡ‖² − σ̂²/S: the paper's for c = S. For other c the
        variance of a part, kn/c samples, becomes that of the base minibatch, kn/S.

        Args:
            parts: c, of equal size, that the minibatch's gradient ḡ is the mean of, such as k workers.
            squares: Σ‖g_i‖² over them.
            square: ‖ḡ‖².
        """
        squares, square = not_negative("squares", squares), not_negative("square", square)
        if self.scale == 1:
            self.steps += 1
            return 1.0
        if positive_int("parts", parts) < 2:
            raise ValueError("one part does not show its noise; give at least 2")
        part = (squares - parts * square) / (parts - 1)
        variance = max(LEAST, part * self.scale / parts)
        self.count += 1
        share = max(1 / self.count, 1 - self.smoothing)
        self.variance += share * (variance - self.variance)
        self.square += share * (max(0.0, square - part / parts) - self.square)
        gain = (self.variance + self.square) / (self.variance / self.scale + self.square)
        self.steps += gain
        return gain

    def state(self) -> list[float]:
        """What a run that goes on must know."""
        return [self.steps, self.count, self.variance, self.square]

    def load(self, state: list[float]) -> None:
        """Go on from what `state` gave."""
        self.steps, count, self.variance, self.square = state
        self.count = int(count)
