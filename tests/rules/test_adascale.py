"""AdaScale's gain against the paper's appendix B.3 written out in float64, and what other variants would give."""

import numpy as np
import pytest

from onehour.rules.adascale import AdaScale


def gradients(seed: int, parts: int, noise: float, signal: float = 1.0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return signal * np.linspace(-1, 1, 50) + noise * draw.standard_normal((parts, 50))


def taken(gains: AdaScale, g: np.ndarray) -> float:
    squares, square = float((g**2).sum()), float((g.mean(0) ** 2).sum())
    return gains.gain(parts=len(g), squares=squares, square=square)


@pytest.mark.parametrize("scale", [2, 8, 400])
def test_gains_and_iterations_are_the_papers(scale: int):
    """Σ over S workers of base minibatches; the mean of those so far for t < 1/(1 − θ), then the moving average."""
    gains, theta, tau = AdaScale(scale), max(1 - scale / 1000, 0), 0.0
    variances, squares = list[float](), list[float]()
    variance = square = r = 0.0
    for t in range(12):
        g = gradients(t, scale, noise=1 + t / 4)
        mean = g.mean(0)
        sigma = sum(float(x @ x) for x in g) / (scale - 1) - scale / (scale - 1) * float(mean @ mean)
        variances.append(max(sigma, 1e-6))
        squares.append(max(float(mean @ mean) - sigma / scale, 0))
        if t + 1 < 1 / (1 - theta):
            variance, square = float(np.mean(variances)), float(np.mean(squares))
        else:
            variance = theta * variance + (1 - theta) * variances[-1]
            square = theta * square + (1 - theta) * squares[-1]
        r = (variance + square) / (variance / scale + square)
        assert taken(gains, g) == pytest.approx(r, rel=1e-12)
        tau += r
    assert gains.steps == pytest.approx(tau, rel=1e-12)
    assert 1 < r < scale


@pytest.mark.parametrize("parts", [4, 32])
def test_parts_of_another_size_estimate_the_same_gain(parts: int):
    """Of kn/c samples, with c/S times the variance of a base minibatch."""
    gains, scale, noise = AdaScale(8), 8, 2.0
    for t in range(300):
        taken(gains, gradients(t, parts, noise * (parts / scale) ** 0.5))  # the noise of a base minibatch is 2
    expected = noise**2 * 50, float((np.linspace(-1, 1, 50) ** 2).sum())
    assert (gains.variance, gains.square) == pytest.approx(expected, rel=0.1)


def test_what_is_all_noise_gains_everything_and_what_is_none_nothing():
    assert taken(AdaScale(8), gradients(0, 8, noise=1.0, signal=0.0)) > 4
    assert taken(AdaScale(8), gradients(0, 8, noise=0.0)) == pytest.approx(1.0, abs=1e-6)
    assert taken(AdaScale(8), gradients(0, 8, noise=0.0, signal=0.0)) == 8  # appendix B.3's least variance
    alone = AdaScale(1)
    assert (alone.gain(parts=1, squares=2.0, square=2.0), alone.steps) == (1.0, 1.0)


def test_it_goes_on_from_its_state():
    whole, other = AdaScale(4), AdaScale(4)
    for t in range(3):
        taken(whole, gradients(t, 4, noise=1))
    other.load(whole.state())
    assert taken(other, gradients(9, 4, noise=1)) == taken(whole, gradients(9, 4, noise=1))
    assert other.state() == whole.state()


def test_what_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"scale must be at least 1, got 0\.5"):
        AdaScale(0.5)
    with pytest.raises(ValueError, match="one part does not show its noise"):
        AdaScale(2).gain(parts=1, squares=1.0, square=1.0)
