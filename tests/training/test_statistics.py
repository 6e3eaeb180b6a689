"""Running statistics move once an iteration, by all k workers (§2.3), as one vector."""

from typing import Any

import pytest
import torch
from torch import nn

from onehour import Recipe
from onehour.rules.batchnorm import GhostBatchNorm1d, convert_batchnorm
from onehour.training.decisions import Decisions
from onehour.training.engine import RunningStatistics

LIVE = torch.tensor(True)
RIGHT = Decisions(Recipe(samples=1024))


def two_layers() -> Any:
    """With momenta of their own."""
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.1), nn.BatchNorm1d(3, momentum=0.3)).double()
    return nn.Sequential(*convert_batchnorm(model, per_worker=2).children())


def test_the_buffers_stay_the_models_own_under_the_same_names():
    model = two_layers()
    model[0].running_mean.fill_(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = RunningStatistics(model, RIGHT)
    statistics.attach(torch.zeros(statistics.floats, dtype=torch.float64))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_loaded_state_is_the_one_that_moves():
    model = two_layers()
    statistics = RunningStatistics(model, RIGHT)
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums)
    state = {name: torch.full_like(tensor, 5) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    sums[-2:] = 1
    statistics.commit(LIVE)
    assert model[0].running_mean.tolist() == pytest.approx([4.5, 4.5], abs=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_each_layer_moves_by_its_own_momentum_in_full_float64(in_place: bool):
    model = two_layers()
    statistics = RunningStatistics(model, RIGHT)
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums, in_place=in_place)
    torch.manual_seed(0)
    batches = [(torch.randn(4, 2).double(), torch.randn(4, 3).double()) for _ in range(2)]
    for first, second in batches:
        statistics.begin_pass(range(2))
        model[0](first)
        model[1](second)
        statistics.end_pass()
    statistics.commit(LIVE)
    for number, momentum in enumerate((0.1, 0.3)):
        workers = [batch[number][worker::2] for batch in batches for worker in (0, 1)]
        mean = torch.stack([w.mean(0) for w in workers]).mean(0)
        variance = torch.stack([w.var(0) for w in workers]).mean(0)
        torch.testing.assert_close(model[number].running_mean, momentum * mean, rtol=0, atol=1e-12)
        expected = (1 - momentum) + momentum * variance
        torch.testing.assert_close(model[number].running_var, expected, rtol=0, atol=1e-12)
        assert model[number].num_batches_tracked == 1


def test_a_layer_that_a_model_uses_twice_counts_twice():
    model, alone = two_layers(), two_layers()
    sums = []
    for net, in_place in ((model, False), (alone, True)):
        statistics = RunningStatistics(net, RIGHT)
        sums.append(torch.zeros(statistics.floats, dtype=torch.float64))
        statistics.attach(sums[-1], in_place=in_place)
        torch.manual_seed(0)
        for layer, width in ((0, 2), (1, 3), (0, 2)):
            net[layer](torch.randn(4, width).double())
        statistics.end_pass()
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-12)
    assert sums[0][-2:].tolist() == [4, 2]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_that_no_worker_saw_stays(in_place: bool):
    model = two_layers()
    statistics = RunningStatistics(model, RIGHT)
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums, in_place=in_place)
    model[0](torch.randn(4, 2).double())
    statistics.end_pass()
    statistics.commit(LIVE)
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 0]
    assert model[1].running_mean.tolist() == [0, 0, 0]
    assert model[1].running_var.tolist() == [1, 1, 1]


def test_nothing_moves_in_an_update_that_is_masked():
    model = two_layers()
    statistics = RunningStatistics(model, RIGHT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sums = torch.full((statistics.floats,), torch.nan, dtype=torch.float64)
    sums[-2:] = 1  # workers have seen both layers
    statistics.attach(sums)
    statistics.commit(torch.tensor(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_are_left_alone_once_collecting_ends():
    model = two_layers()
    statistics = RunningStatistics(model, RIGHT)
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums)
    statistics.detach()
    model[0](torch.randn(4, 2).double())
    assert sums.tolist() == [0] * statistics.floats
    assert model[0].num_batches_tracked == 1  # a forward alone is an iteration again


def test_a_cumulative_average_is_refused():
    with pytest.raises(ValueError, match="momentum None"):
        RunningStatistics(GhostBatchNorm1d(2, per_worker=2, momentum=None), RIGHT)
