"""The translation into plain torch, executed: its rates, parameter groups, γ, samples, loss."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from onehour.config import ADAPTIVE, Recipe
from onehour.models.small import resnet8
from onehour.planner import plan
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.decay import parameter_groups
from onehour.rules.initialize import last_batchnorms
from onehour.rules.shuffle import SampleStream
from onehour.training.build import build_optimizer
from onehour.translate import translate

VARIANTS = {
    "as it is": {},
    "constant warmup": {"warmup": "constant"},
    "no warmup": {"warmup": "none"},
    "cosine": {"decay": "cosine"},
    "cosine after constant warmup": {"decay": "cosine", "warmup": "constant"},
    "cosine without warmup": {"decay": "cosine", "warmup": "none"},
    "square root": {"scaling": "sqrt"},
    "fixed": {"scaling": "fixed"},
    "a drop inside the warmup": {"milestones": ("3", "5", "31/3"), "decay_factor": 0.7},
    "too many drops inside the warmup": {"milestones": ("3", "5", "31/3")},
    "one drop": {"milestones": ("7/2",), "decay_factor": 0.3},
    "no drop": {"milestones": ()},
    "base above": {"base_minibatch": 96},
}


@pytest.fixture
def executed(acting: ModuleType) -> Callable[..., dict[str, Any]]:
    """What the translation of a recipe on p processes defines."""
    return lambda recipe, processes=None: acting.execute(translate(plan(recipe, processes=processes), "torch"))


def rates(namespace: dict[str, Any], count: int) -> list[float]:
    """What the translation's optimizer has at each of `count` updates, stepped as its loop steps it."""
    optimizer, scheduler = namespace["make_optimizer"](nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    found = []
    for _ in range(count):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "minibatch"), [("resnet50", 8192), ("digits", 32), ("digits", 256)])
def test_every_rate_of_a_named_recipe_is_ours(executed, farthest, name: str, minibatch: int):
    planned = plan(name, minibatch=minibatch)
    namespace = executed(planned.recipe)
    assert namespace["ITERATIONS"] == planned["iterations"].value
    assert farthest(planned.recipe, rates(namespace, namespace["ITERATIONS"])) <= 1e-9


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_rate_of_a_variant_is_ours(executed, farthest, small, changes: dict[str, Any]):
    recipe = small(**changes)
    assert farthest(recipe, rates(executed(recipe), 500)) <= 1e-9


def test_rates_fall_where_fractions_say(executed):
    namespace = executed(plan("digits", minibatch=256).recipe)  # 32 iterations an epoch
    found = rates(namespace, 768)
    drops = [t for t, (a, b) in enumerate(pairwise(found), start=1) if b < a]
    assert drops == [256, 512, 683]  # epochs 8, 16, and the first iteration at or after 64/3


def test_a_whole_run_takes_our_rate_at_every_update(acting, executed, farthest, small, tmp_path: Path):
    model, seen = acting.act("torch", executed(small(), processes=1), tmp_path)
    assert len(seen) == 500
    assert farthest(small(), seen) <= 1e-9
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_an_update_is_that_of_one_large_minibatch(acting, executed, small, tmp_path: Path, zero_gamma: bool):
    """Two passes of 24 with plain BatchNorm are one of 48 with BatchNorm over 24, to float64's rounding."""
    recipe = small(zero_gamma=zero_gamma)
    namespace = executed(recipe, processes=1)
    batches = [index for _, index in zip(range(6), namespace["Stream"](0), strict=False)]
    namespace["ITERATIONS"] = 3
    model, _ = acting.act("torch", namespace, tmp_path)

    points, ours = acting.Points(1000), convert_batchnorm(acting.net(), per_worker=24)
    for batchnorm in last_batchnorms(ours).values() if zero_gamma else ():
        nn.init.zeros_(batchnorm.weight)
    optimizer = build_optimizer(recipe, ours)
    for t in range(3):
        rows = torch.tensor(batches[2 * t : 2 * t + 2]).T.reshape(-1)  # rows j, j + 2 … are worker j's
        for group in optimizer.param_groups:
            group["lr"] = recipe.schedule(t * 48 / 1000)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(ours(points.x[rows]), points.y[rows], reduction="sum") / 48).backward()
        optimizer.step()
    for (name, found), expected in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (found - expected).abs().max() <= 1e-12, name


def test_groups_are_ours(executed):
    shared = nn.LayerNorm(4)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(resnet8(), nn.Linear(4, 4), nn.GroupNorm(2, 4), shared, nn.InstanceNorm1d(4, affine=True))
    optimizer, _ = executed(plan("digits").recipe)["make_optimizer"](model)
    found, expected = optimizer.param_groups, parameter_groups(model, weight_decay=1e-4)
    as_ids = [[([id(p) for p in g["params"]], g["weight_decay"]) for g in groups] for groups in (found, expected)]
    assert as_ids[0] == as_ids[1]


def test_gamma_is_zero_where_ours_is(executed):
    namespace, model = executed(plan("digits").recipe), resnet8()
    namespace["prepare"](model)
    zero = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    assert zero == set(last_batchnorms(model))
    assert zero
    untouched = resnet8()
    executed(plan("digits", zero_gamma=False).recipe)["prepare"](untouched)
    assert all(m.weight.all() for m in untouched.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_speed_is_prepared_too(executed):
    model = resnet8()
    executed(plan("digits", channels_last=True, compile=True).recipe)["prepare"](model)
    assert model.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("name", [*ADAPTIVE, "sgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_optimizers_are_ours_but_for_the_rate_that_is_set(executed, small, name: str, momentum: float):
    recipe = small(optimizer=name, scaling="sqrt", momentum=momentum, nesterov=False)
    optimizer, _ = executed(recipe)["make_optimizer"](resnet8())
    expected = build_optimizer(recipe, resnet8())
    assert type(optimizer) is type(expected)
    how = {"lr", "initial_lr", "params", "fused", "foreach"}  # where and how fast it computes, not what
    for found, wanted in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {k: v for k, v in found.items() if k not in how} == {k: v for k, v in wanted.items() if k not in how}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_stream_is_that_of_a_run(executed, small, processes: int):
    recipe = small(seed=3)
    namespace = executed(recipe, processes)
    streams = [list(namespace["Stream"](rank)) for rank in range(processes)]
    passes = namespace["PASSES"]
    assert {len(stream) for stream in streams} == {500 * passes} == {len(namespace["Stream"](0))}
    ours = SampleStream(samples=1000, minibatch=recipe.workers, seed=3)
    for t in range(500):
        batches = [batch for stream in streams for batch in stream[passes * t : passes * (t + 1)]]
        assert batches == [ours.indices(t, worker).tolist() for worker in range(2)]


def test_minibatches_are_the_same_on_any_number_of_processes(executed, small):
    one, two = (executed(small(), processes) for processes in (1, 2))
    whole = list(one["Stream"](0))
    halves = [list(two["Stream"](rank)) for rank in range(2)]
    for t in range(500):
        assert sorted(whole[2 * t] + whole[2 * t + 1]) == sorted(halves[0][t] + halves[1][t])


def test_a_stream_goes_on_where_it_is_told(executed, small):
    namespace = executed(small(), 1)
    stream = namespace["Stream"]
    assert list(stream(0, start=123)) == list(stream(0))[123 * namespace["PASSES"] :]


def test_other_seeds_are_other_orders(executed, small):
    orders = {tuple(next(iter(executed(small(seed=seed))["Stream"](0)))) for seed in (0, 1, 2, 2**62, -5)}
    assert len(orders) == 5


def test_another_number_of_processes_is_refused(acting, executed, small):
    with pytest.raises(ValueError, match="made for 2 processes, started in 1"):
        executed(small())["train"](acting.net(), acting.Points(1000))


def test_bf16_is_autocast(acting, small, executed):
    namespace = executed(small(precision="bf16"), 1)
    namespace["ITERATIONS"] = 1
    seen = []
    model = acting.net().float()
    model[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    points = acting.Points(1000)
    points.x = points.x.float()
    namespace["train"](model, points)
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_recipe_of_these_tests_has_boundaries_between_iterations(small):
    recipe: Recipe = small()
    assert plan(recipe)["iterations_per_epoch"].value == pytest.approx(20 + 5 / 6)
    assert recipe.warms_up
