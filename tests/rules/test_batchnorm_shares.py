"""Workers that count by shares of their own in the running statistics: what is right gives all of them the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onehour.rules.batchnorm import GhostBatchNorm2d, accumulate, convert_batchnorm
from onehour.training.engine import RunningStatistics

N, K, C = 4, 3, 5  # n, k and channels
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def batch(seed: int = 0) -> Tensor:
    x = torch.randn(N * K, C, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + (torch.arange(N * K) % K)[:, None, None, None]


def layer(shares: Tensor | None) -> Any:
    made = GhostBatchNorm2d(C, per_worker=N).double()
    made.shares = shares
    return made


def exact(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def weighted(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Σ of the workers' means and unbiased variances by their shares, over the sum of the shares."""
    workers = [batch()[worker::K] for worker in range(K)]
    means, variances = (torch.stack([f(w) for w in workers]) for f in (lambda w: w.mean((0, 2, 3)), of_all))
    shares = (shares / shares.sum())[:, None]
    return (shares * means).sum(0), (shares * variances).sum(0)


def of_all(worker: Tensor) -> Tensor:
    return worker.var((0, 2, 3))


def running(module: Any) -> tuple[Tensor, Tensor]:
    return module.running_mean.clone(), module.running_var.clone()


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_statistics_move_by_the_weighted_mean_whatever_the_shares_sum_to(scale: float):
    module = layer(scale * SHARES)
    module(batch())
    mean, variance = weighted(SHARES)
    exact(running(module), (0.1 * mean, 0.9 + 0.1 * variance))
    assert int(module.num_batches_tracked) == 1


def test_equal_shares_are_none():
    given, none = layer(torch.full((K,), 0.4, dtype=torch.float64)), layer(None)
    for module in (given, none):
        module(batch())
    exact(running(given), running(none))


def test_a_single_worker_is_all_there_is_whatever_its_share():
    given, none = layer(SHARES[:1]), layer(None)
    for module in (given, none):
        module(batch()[:N])
    exact(running(given), running(none))


def test_what_a_worker_computes_does_not_know_of_the_shares():
    results = []
    for shares in (SHARES, None):
        module, x = layer(shares), batch().requires_grad_()
        (module(x) * batch(1)).sum().backward()
        results.append([module(batch()), x.grad, module.weight.grad, module.bias.grad])
    exact(*results)


@pytest.mark.parametrize("passes", [(1, 1, 1), (2, 1), (1, 2), (3,)])
@pytest.mark.parametrize("shares", [SHARES, torch.tensor([1.0, 0.0, 0.0]).double()])
def test_several_passes_take_the_shares_of_their_own_workers(passes: tuple[int, ...], shares: Tensor):
    module, first = layer(None), 0
    with accumulate(module):
        for g in passes:
            module.shares = shares[first : first + g]
            module(torch.stack([batch()[w::K] for w in range(first, first + g)], 1).flatten(0, 1))
            first += g
    mean, variance = weighted(shares)
    exact(running(module), (0.1 * mean, 0.9 + 0.1 * variance))


def test_layers_with_momenta_of_their_own_take_shares_of_their_own():
    layers = (nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    model: Any = convert_batchnorm(nn.Sequential(*layers), N).double()
    model[1].momentum = 0.3

    class Rule:
        def shares(self, momentum: float) -> Tensor:
            return SHARES if momentum == 0.1 else SHARES.flip(0)

        def moved(self, momentum: float) -> float:
            return momentum

    statistics = RunningStatistics(model, Rule())
    statistics.begin_pass(range(1, 3))
    assert [module.shares.tolist() for module in model] == [SHARES[1:].tolist(), SHARES.flip(0)[1:].tolist()]
    statistics.detach()
    assert [module.shares for module in model] == [None, None]


def test_evaluation_knows_of_no_shares():
    module = layer(SHARES).eval()
    exact(module(batch()), layer(None).eval()(batch()))
    exact(running(module), (torch.zeros(C).double(), torch.ones(C).double()))
