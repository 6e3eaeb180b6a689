"""Adam's square-root rule: its equations in float64, what an epoch keeps by it, and that other variants do not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onehour.rules.adam import adam_scaling
from onehour.rules.minibatch import Minibatch

BASE = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


@given(times=st.floats(0.01, 9.9), lr=st.floats(1e-6, 1), decay=st.floats(0, 1), eps=st.floats(0, 1e-3))
def test_the_equations(times: float, lr: float, decay: float, eps: float):
    """η√κ, 1 − κ(1 − β), ε/√κ, λ√κ; a coupled λ stays."""
    given = {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": decay}
    base = 1_000
    size = max(1, round(base * times))
    k = size / base
    scaled = adam_scaling(base_minibatch=base, minibatch=size, **given)
    assert scaled["lr"] == pytest.approx(lr * math.sqrt(k), rel=1e-12)
    assert scaled["betas"] == pytest.approx((1 - k * 0.1, 1 - k * 0.001), rel=1e-12, abs=1e-12)
    assert scaled["eps"] == pytest.approx(eps / math.sqrt(k), rel=1e-12)
    assert scaled["weight_decay"] == pytest.approx(decay * math.sqrt(k), rel=1e-12)
    coupled = adam_scaling(base_minibatch=base, minibatch=size, decoupled=False, **given)
    assert coupled == {**scaled, "weight_decay": decay}


@pytest.mark.parametrize("times", [1, 2, 8])
def test_averages_span_as_many_samples_and_an_epoch_shrinks_as_much(times: int):
    scaled = adam_scaling(base_minibatch=256, minibatch=Minibatch(32, 8 * times), **BASE)
    for before, after in zip(BASE["betas"], scaled["betas"], strict=True):
        assert 256 * times / (1 - after) == pytest.approx(256 / (1 - before), rel=1e-12)
    shrinks = scaled["lr"] * scaled["weight_decay"] / times  # for each of the updates that there are fewer of
    assert shrinks == pytest.approx(BASE["lr"] * BASE["weight_decay"], rel=1e-12)
    kept = scaled["lr"] * BASE["weight_decay"] / times
    assert (times == 1) == (kept == pytest.approx(shrinks, rel=1e-3))


def test_where_noise_rules_the_update_moves_weights_as_far_an_epoch_in_the_mean_square():
    """Of a gradient that is noise alone, of variance 1/κ, N/κ updates of √κ times the size; not with η·κ."""
    torch.manual_seed(0)

    def moved(times: int, lr: float, betas: tuple[float, float]) -> float:
        weight = torch.zeros(4096, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=lr, betas=betas)
        for _ in range(512 // times):
            weight.grad = torch.randn_like(weight) / math.sqrt(times)
            optimizer.step()
        return float(weight.detach().square().mean().sqrt())

    base = moved(1, 1e-3, (0.98, 0.999))
    options = adam_scaling(base_minibatch=1, minibatch=16, lr=1e-3, betas=(0.98, 0.999))
    assert moved(16, options["lr"], options["betas"]) == pytest.approx(base, rel=0.15)
    assert moved(16, 16e-3, options["betas"]) > 3 * base
    assert moved(16, 1e-3, options["betas"]) < 0.5 * base


def test_the_largest_that_works_is_named():
    with pytest.raises(ValueError, match=r"16 times the minibatch beta1 0\.9 .* below 10 times, or with a beta1"):
        adam_scaling(base_minibatch=32, minibatch=512, **BASE)
    assert adam_scaling(base_minibatch=32, minibatch=304, **BASE)["betas"][0] > 0
    with pytest.raises(ValueError, match="beta1"):
        adam_scaling(base_minibatch=32, minibatch=320, **BASE)
    without = {**BASE, "betas": (0.0, 0.999)}
    assert adam_scaling(base_minibatch=32, minibatch=512, **without)["betas"] == pytest.approx((0, 0.984))


@pytest.mark.parametrize(
    "change", [{"lr": 0}, {"betas": (1.0, 0.9)}, {"eps": -1}, {"weight_decay": -1}, {"minibatch": 0}]
)
def test_numbers_that_cannot_be_are_refused(change: dict):
    with pytest.raises(ValueError, match=r"beta1|lr|eps|weight_decay|minibatch"):
        adam_scaling(**{"base_minibatch": 32, "minibatch": 64, **BASE, **change})
