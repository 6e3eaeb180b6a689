"""batchnorm = "keep": the network's own BatchNorm over n, its statistics the mean over all workers (§2.3)."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from wires import on_threads

from onehour import Recipe
from onehour.api import train
from onehour.data.sources import complete
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.execution import Execution
from onehour.planner import plan
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.build import build_model
from onehour.training.console import effects
from onehour.training.decisions import Decisions
from onehour.training.feeds import pick_share, pick_workers_per_pass
from onehour.training.seeds import refuse_joining
from onehour.training.statistics import KeptStatistics

N, K = 4, 5
CPU = torch.device("cpu")
CUBED = "norm.running_mean"


class Cubing(nn.BatchNorm2d):
    """What no trial proves: it looks at the whole pass by itself, and its statistics have a rule of their own."""

    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean((0, 2, 3))
        if self.training:
            self.running_mean = 0.5 * self.running_mean + mean.detach() ** 3  # pyright: ignore[reportOperatorIssue]
            self.num_batches_tracked += 1  # pyright: ignore[reportOperatorIssue]
        return input - mean.view(-1, 1, 1)


class Net(nn.Module):
    """With a layer that no pass uses."""

    def __init__(self, layer: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)
        self.norm: Any = layer(4)
        self.unused = layer(4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(images)).relu().flatten(1))


def images(iteration: int) -> Tensor:
    """Of all workers, (k, n, 1, 4, 4); their means differ."""
    draw = torch.Generator().manual_seed(iteration)
    return torch.randn(K, N, 1, 4, 4, generator=draw, dtype=torch.float64) + torch.arange(K).view(-1, 1, 1, 1, 1)


def trained(group: Group, model: nn.Module, iterations: int = 3, **changes: Any) -> dict[str, Tensor]:
    """What a model holds after some iterations."""
    common: dict[str, Any] = {"minibatch": K * N, "per_worker": N, "base_minibatch": K * N, "samples": 100}
    recipe = Recipe(**common, precision="float64", **changes)
    step = step_of(recipe, model.train(), passes(pick_share(recipe, group), 1), group=group)
    for iteration in range(iterations):
        given = images(iteration)
        step(iteration, iter([(given[workers.start], torch.arange(N) % 3) for workers in step.passes]))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_torchs_own_learns_what_ghosts_do_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch, processes: int):
    expected = trained(Group(), convert_batchnorm(Net(), N))
    models = [Net() for _ in range(processes)]
    for found in on_threads(monkeypatch, processes, lambda g: trained(g, models[g.rank], batchnorm="keep")):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert [int(expected[f"{layer}.num_batches_tracked"]) for layer in ("norm", "unused")] == [3, 0]


def test_with_a_rule_of_its_own_it_is_the_mean_over_the_workers_of_what_a_pass_leaves():
    convolution = Net().conv
    means = torch.stack([convolution(worker).mean((0, 2, 3)) for worker in images(0)]).detach()
    found = trained(Group(), Net(Cubing), iterations=1, batchnorm="keep")
    torch.testing.assert_close(found[CUBED], (means**3).mean(0), rtol=0, atol=1e-12)
    assert (found[CUBED] - means.mean(0) ** 3).abs().max() > 1e-3, "not the rule of the mean"


def test_canonical_gives_the_same_bits_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch):
    rule: dict[str, Any] = {"batchnorm": "keep", "reduce": "canonical"}
    alone, models = trained(Group(), Net(Cubing), **rule), [Net(Cubing) for _ in range(3)]
    for found in on_threads(monkeypatch, 3, lambda g: trained(g, models[g.rank], **rule)):
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_masked_update_and_a_forward_that_failed_leave_what_the_iteration_began_with():
    model = Net()
    statistics = KeptStatistics(model, Decisions(Recipe(samples=1024)))
    sums = torch.zeros(statistics.floats, dtype=torch.float64)
    statistics.attach(sums)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for live in (False, True):
        sums.zero_()
        statistics.begin_pass(range(1))
        model(images(0)[0] + 1e6)  # and the pass failed behind it
        statistics.begin_pass(range(1))
        model(images(0)[0])
        statistics.end_pass()
        statistics.commit(torch.tensor(live))
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) is not live
    assert int(model.norm.num_batches_tracked) == 1
    assert model.norm.running_mean.abs().max() < 100


def test_a_run_that_keeps_it_finds_what_one_with_ghosts_does(tiny: ModuleType, tmp_path: Path):
    recipes = [tiny.recipe(batchnorm=kind, precision="float64") for kind in ("ghost", "keep")]
    ghost, kept = (train(recipe, out=tmp_path / recipe.batchnorm) for recipe in recipes)
    assert kept.metrics == [pytest.approx(each, rel=1e-9) for each in ghost.metrics]
    assert kept.metrics[-1]["top1_error"] < 50


def test_the_network_is_left_as_it_is_and_that_is_said(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(batchnorm="keep", weight_decay=0))
    model = build_model(recipe, data, CPU)
    assert [type(layer) for layer in model.children()] == [type(layer) for layer in tiny.net().children()]
    said = "the network's own BatchNorm, one worker a pass, hence over n = 4 in 1 layers"
    assert effects(recipe, model).startswith(said)
    assert pick_workers_per_pass(Execution(), recipe, data, model, "cpu") == 1
    assert pick_workers_per_pass(Execution(), recipe.replace(batchnorm="ghost"), data, model, "cpu") == 2


def test_a_plan_says_it_and_a_recipe_only_where_it_is_asked_for():
    kept = Recipe(batchnorm="keep")
    assert plan(kept)["per_worker"].rule.endswith("; the network's own BatchNorm sees it, one worker a pass")
    assert kept.as_dict()["batchnorm"] == "keep"
    assert "batchnorm" not in Recipe().as_dict(), "recipes that exist keep their digest"
    with pytest.raises(ValueError, match="pitfall batchnorm-stats-k-times is for batchnorm ghost"):
        kept.replace(pitfall="batchnorm-stats-k-times")


def test_what_would_see_more_than_n_is_refused(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(batchnorm="keep"))
    with pytest.raises(ValueError, match="batchnorm keep takes one worker a pass: leave --workers-per-pass out, or"):
        Execution(workers_per_pass=2).refuse(recipe)
    assert pick_workers_per_pass(Execution(), recipe, data, nn.Linear(1, 1), "cpu") == 1
    with pytest.raises(ValueError, match="0 is a SyncBatchNorm, whose statistics are those of all processes"):
        build_model(recipe, data, CPU, nn.Sequential(nn.SyncBatchNorm(1)))
    with pytest.raises(
        ValueError, match="batchnorm keep, reduce canonical, compile and channels_last are for single runs"
    ):
        refuse_joining(recipe, data, Group())
