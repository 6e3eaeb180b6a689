"""Remark 3: the update needs the mean over all kn samples, whatever share each worker has."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from onehour.rules.aggregate import global_mean
from onehour.rules.minibatch import Minibatch

EQUAL, UNEQUAL = (4, 4, 4), (1, 4, 7)
LR, DECAY = 0.1, 0.01


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Twelve samples of a regression, and the weights at which gradients are taken."""
    draw = torch.Generator().manual_seed(0)
    inputs, targets, weight = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((12, 3), (12,), (3,)))
    return inputs, targets, weight


def gradient(loss_of_sums, shares: Sequence[int]) -> list[Tensor]:
    """Each worker's gradient of `loss_of_sums(Σ of its losses, its count)`."""
    inputs, targets, weight = problem()
    gradients = []
    for x, y in zip(inputs.split(shares), targets.split(shares), strict=True):
        w = weight.clone().requires_grad_()
        loss_of_sums(0.5 * (x @ w - y).square().sum(), len(x)).backward()
        assert w.grad is not None
        gradients.append(w.grad)
    return gradients


def mean_gradient() -> Tensor:
    """(1/kn)·ΣΣ∇l by hand: ∇ ½(xw − y)² = (xw − y)·x."""
    inputs, targets, weight = problem()
    return ((inputs @ weight - targets)[:, None] * inputs).sum(0) / 12


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-12)  # a dozen float64 sums of order 1 round below 1e-14


@pytest.mark.parametrize("shares", [EQUAL, UNEQUAL, (12,)])
def test_gradients_of_the_global_mean_sum_to_the_gradient_of_the_minibatch(shares):
    assert close(sum(gradient(lambda total, _: global_mean(total, 12), shares), torch.zeros(())), mean_gradient())


def test_a_minibatch_stands_for_its_size():
    assert global_mean(6.0, Minibatch(per_worker=4, workers=3)) == global_mean(6.0, 12) == 0.5


def test_summed_means_of_workers_are_k_times_too_large():
    summed = sum(gradient(lambda total, count: total / count, EQUAL), torch.zeros(()))
    assert close(summed, 3 * mean_gradient())
    assert not close(summed, mean_gradient())


@pytest.mark.parametrize(("shares", "right"), [(EQUAL, True), (UNEQUAL, False)])
def test_averaging_means_over_processes_is_right_only_for_equal_counts(shares, right):
    averaged = torch.stack(gradient(lambda total, count: total / count, shares)).mean(0)
    assert close(averaged, mean_gradient()) == right


def test_folding_one_over_k_into_the_rate_breaks_weight_decay():
    """w' = w − (η/k)(Σ of means + λw) has the right gradient but k times too little decay (Remark 1)."""
    _, _, weight = problem()
    summed = sum(gradient(lambda total, count: total / count, EQUAL), torch.zeros(()))

    def right(decay: float) -> Tensor:
        return weight - LR * (mean_gradient() + decay * weight)

    def folded(decay: float) -> Tensor:
        return weight - LR / 3 * (summed + decay * weight)

    assert close(folded(0.0), right(0.0))
    assert close(folded(DECAY) - right(DECAY), LR * DECAY * (1 - 1 / 3) * weight)
    assert not close(folded(DECAY), right(DECAY))
