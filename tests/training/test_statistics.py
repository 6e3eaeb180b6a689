"""Running statistics move once an iteration (§2.3); an evaluation counts every sample once, whatever the processes."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from onehour import Recipe
from onehour.api import train
from onehour.data.loader import CHUNK, Feed
from onehour.dist.group import Group
from onehour.rules.batchnorm import GhostBatchNorm1d, convert_batchnorm
from onehour.training.decisions import Decisions
from onehour.training.evaluate import evaluate
from onehour.training.statistics import RunningStatistics
from onehour.training.task import Evaluation

LIVE = torch.tensor(True)
RIGHT = Decisions(Recipe(samples=1024))


def two_layers() -> Any:
    """With momenta of their own."""
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.1), nn.BatchNorm1d(3, momentum=0.3)).double()
    return nn.Sequential(*convert_batchnorm(model, per_worker=2).children())


def attached(model: Any = None, *, in_place: bool = False) -> tuple[Any, RunningStatistics, Tensor]:
    """A model, its statistics, and the sums that its layers' workers add up in."""
    model = model or two_layers()
    statistics = RunningStatistics(model, RIGHT)
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums, in_place=in_place)
    return model, statistics, sums


def test_the_buffers_stay_the_models_own_under_the_same_names():
    model = two_layers()
    model[0].running_mean.fill_(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_loaded_state_is_the_one_that_moves():
    model, statistics, sums = attached()
    state = {name: torch.full_like(tensor, 5) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    sums[-2:] = 1
    statistics.commit(LIVE)
    assert model[0].running_mean.tolist() == pytest.approx([4.5, 4.5], abs=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_each_layer_moves_by_its_own_momentum_in_full_float64(in_place: bool):
    model, statistics, _ = attached(in_place=in_place)
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
    sums = []
    for in_place in (False, True):
        net, statistics, found = attached(in_place=in_place)
        sums.append(found)
        torch.manual_seed(0)
        statistics.begin_pass(range(2))
        for layer, width in ((0, 2), (1, 3), (0, 2)):
            net[layer](torch.randn(4, width).double())
        statistics.end_pass()
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=1e-12)
    assert sums[0][-2:].tolist() == [4, 2]


@pytest.mark.parametrize("called", [(0, 1), (1, 0), (0, 1, 0), (1,)], ids=str)
@pytest.mark.parametrize("g", [1, 2, 3])
def test_statistics_in_their_places_are_those_that_each_layer_would_leave_for_itself(g: int, called: tuple[int, ...]):
    found = []
    for places in (True, False):
        net, statistics, sums = attached()
        statistics._lays_out = places
        torch.manual_seed(0)
        for _ in range(2):
            statistics.begin_pass(range(g))
            for layer in called:
                net[layer](torch.randn(2 * g, (2, 3)[layer]).double())
            statistics.end_pass()
        found.append(sums)
    assert torch.equal(*found)
    assert found[0][-2:].tolist() == [2 * g * called.count(0), 2 * g * called.count(1)]


@pytest.mark.parametrize("affine", [True, False])
def test_parameters_that_are_repeated_for_a_pass_beforehand_give_the_same_gradients(affine: bool):
    torch.manual_seed(0)
    batch, against = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    model = nn.Sequential(*(nn.BatchNorm1d(4, affine=affine) for _ in range(2))).double()
    model = nn.Sequential(*convert_batchnorm(model, per_worker=2).children())
    found = []
    for inside in (True, False):
        _, statistics, _ = attached(model)
        if inside:
            statistics.begin_pass(range(3))
        x = batch.clone().requires_grad_()
        (model(x) * against).sum().backward()
        statistics.detach()
        found.append([x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_a_pass_in_which_a_layer_is_given_other_rows_than_samples_is_refused():
    net, statistics, _ = attached()
    statistics.begin_pass(range(1))
    net[0](torch.randn(6, 2).double())  # three rows for each sample
    with pytest.raises(ValueError, match="a BatchNorm of 2 channels is given 6 rows for 2 samples"):
        statistics.end_pass()


def test_what_a_forward_that_failed_has_left_does_not_count():
    model, statistics, sums = attached()
    statistics.begin_pass(range(2))
    model[0](torch.full((4, 2), 1e9).double() * torch.arange(4).view(4, 1))  # and the second layer was never reached
    statistics.begin_pass(range(2))
    model[0](torch.randn(4, 2).double())
    model[1](torch.randn(4, 3).double())
    statistics.end_pass()
    assert sums[-2:].tolist() == [2, 2]
    assert sums.abs().max() < 100


@pytest.mark.parametrize("in_place", [False, True])
def test_a_layer_that_no_worker_saw_stays(in_place: bool):
    model, statistics, _ = attached(in_place=in_place)
    statistics.begin_pass(range(2))
    model[0](torch.randn(4, 2).double())
    statistics.end_pass()
    statistics.commit(LIVE)
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 0]
    assert model[1].running_mean.tolist() == [0, 0, 0]
    assert model[1].running_var.tolist() == [1, 1, 1]


def test_nothing_moves_in_an_update_that_is_masked():
    model, statistics, sums = attached()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sums.fill_(torch.nan)
    sums[-2:] = 1  # workers have seen both layers
    statistics.commit(torch.tensor(False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_are_left_alone_once_collecting_ends():
    model, statistics, sums = attached()
    statistics.detach()
    model[0](torch.randn(4, 2).double())
    assert sums.tolist() == [0] * statistics.floats
    assert model[0].num_batches_tracked == 1  # a forward alone is an iteration again


def test_layers_with_momenta_of_their_own_take_shares_of_their_own():
    class Rule(Decisions):
        def shares(self, momentum: float) -> Tensor:
            return torch.tensor([0.2, 0.5, 0.3] if momentum == 0.1 else [0.3, 0.5, 0.2])

    model = two_layers()
    statistics = RunningStatistics(model, Rule(RIGHT.recipe))
    statistics.begin_pass(range(1, 3))
    for layer, shares in zip(model, ([0.5, 0.3], [0.5, 0.2]), strict=True):
        assert layer.shares.tolist() == pytest.approx(shares)
    statistics.detach()
    assert [layer.shares for layer in model] == [None, None]


def test_a_cumulative_average_is_refused():
    with pytest.raises(ValueError, match="momentum None"):
        RunningStatistics(GhostBatchNorm1d(2, per_worker=2, momentum=None), RIGHT)


@dataclass(frozen=True)
class Simulated(Group):
    """One process of several, which keeps what it would have summed."""

    gave: list[Tensor] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.ndim:  # else whether anyone asked for a stop
            self.gave.append(tensor.clone())
        return tensor


def evaluated(model: nn.Module, data: TensorDataset, group: Group) -> Evaluation:
    (found,) = evaluate(model, Feed(data, seed=0, loaders=0, device=group.device), Recipe(), group=group)
    return found


def logits(samples: int) -> TensorDataset:
    """Data that is its own logits, of which about two thirds are wrong."""
    draw = torch.Generator().manual_seed(samples)
    return TensorDataset(torch.randn(samples, 3, generator=draw), torch.randint(3, (samples,), generator=draw))


@pytest.mark.parametrize(
    ("samples", "processes"),
    [(50_000, 7), (50_000, 1), (50_000, 256), (1, 7), (255, 2), (256, 2), (257, 2), (10_000, 8), (1000, 3)],
)
def test_every_sample_is_counted_once_by_one_process(samples: int, processes: int):
    data = logits(samples)
    images, labels = data.tensors
    alone = Simulated()
    result = evaluated(nn.Identity(), data, alone)
    assert result.samples == samples
    assert result.errors == int((images.argmax(1) != labels).sum())
    loss = nn.functional.cross_entropy(images.double(), labels).item()
    assert result.loss == pytest.approx(loss, rel=1e-12)
    shares = []
    for rank in range(processes):
        group = Simulated(rank=rank, size=processes)
        evaluated(nn.Identity(), data, group)
        shares += group.gave
    # A chunk's loss has one giver, so that adding zeros to it keeps its bits; counts are whole numbers.
    vectors = torch.stack(shares)
    assert torch.equal(vectors.sum(0), alone.gave[0])
    losses = vectors[:, :, 0, 0]
    assert (losses != 0).sum(0).tolist() == [1] * -(-samples // CHUNK)
    dealt = (losses != 0).sum(1)
    assert dealt.max() - dealt.min() <= 1


def test_evaluation_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (evaluated(model, logits(300), Group()) for _ in range(2))
    assert first == second
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


OTHER_PROCESS = """
import json, sys
import tinytask, torch
from pathlib import Path
from safetensors.torch import load_file
from onehour.models.resnet import resnet8

folder = Path(sys.argv[1])
last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
model = resnet8()
model.load_state_dict(load_file(folder / f"checkpoints/iteration-{last['iteration']:09d}/model.safetensors"))
images, labels = tinytask.few_digits()[1].tensors
with torch.no_grad():
    logits = torch.cat([model.eval()(part) for part in images.split(256)])
wrong = (logits.argmax(1) != labels).sum().item()
print(json.dumps([last["top1_error"], 100 * wrong / len(labels)]))
"""


@pytest.mark.usefixtures("environ", "forked")
def test_the_logged_error_is_that_of_the_saved_file_in_a_new_process(tiny: ModuleType, tmp_path: Path):
    """Loaded into the plain model, and evaluated by a loop of its own."""
    sizes = {"minibatch": 64, "per_worker": 16, "epochs": 3, "warmup": "none", "base_lr": 0.05}
    train("digits", data=tiny.few_digits(), classes=10, out=tmp_path / "run", **sizes)
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "run")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    logged, found = json.loads(said.stdout)
    assert logged == found
    assert logged < 88  # it has learned something
