"""The translations for tools on torch's loop, executed by them: rates, samples, parameter groups, γ, the loss."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from onehour.config import Recipe
from onehour.models.resnet import resnet8
from onehour.planner import plan
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.initialize import init_weights_, last_batchnorms
from onehour.rules.shuffle import SampleStream
from onehour.training.build import build_optimizer
from onehour.translate import translate
from onehour.translate.values import OPTIMIZERS
from tests.translate import act
from tests.translate.act import settings, small

RECIPES = [
    *(
        small(),
        small(warmup="constant"),
        small(decay="cosine", warmup="constant"),
        small(decay="cosine", warmup="none"),
    ),
    *(small(scaling="sqrt"), small(milestones=("3", "5", "31/3")), small(milestones=()), small(base_minibatch=96)),
    *(plan("resnet50", minibatch=8192).recipe, plan("digits", minibatch=256).recipe),
]
# Their own imports warn, and starting processes that import them takes long.
theirs = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]
FRAMEWORKS = [pytest.param(name, marks=theirs) for name in ("accelerate", "lightning", "hf")]


def executed(recipe: Recipe, processes: int | None = None, tool: str = "torch") -> dict[str, Any]:
    """What the translation of a recipe on p processes defines."""
    return act.execute(translate(plan(recipe, processes=processes), tool))


def alone(tool: str, folder: Path) -> tuple[nn.Module, list[float]]:
    """A whole run in this process: the net and its rates."""
    return act.act(tool, executed(small(), 1, tool), folder)


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


def expected(recipe: Recipe) -> list[float]:
    """The recipe's rate at each update."""
    samples = recipe.samples or 0
    updates = recipe.workers.iterations(samples, recipe.epochs)
    return [recipe.schedule(t * recipe.minibatch / samples) for t in range(updates)]


def distance(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of weights; running statistics move once a pass, so they depend on the passes."""
    assert state.keys() == other.keys()
    return max(
        float((state[key] - other[key]).abs().max()) for key in state if "running" not in key and "num" not in key
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_rate_is_ours(recipe: Recipe):
    namespace = executed(recipe)
    assert rates(namespace, namespace["UPDATES"]) == expected(recipe)


@pytest.mark.parametrize("tool", ["torch", *FRAMEWORKS])
def test_a_whole_run_has_our_rates_and_the_weights_of_plain_torch(tool: str, tmp_path: Path):
    """Which they would not be with another mean, a clipped gradient, or other samples."""
    model, seen = alone(tool, tmp_path)
    assert seen == expected(small())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert distance(model.state_dict(), alone("torch", tmp_path)[0].state_dict()) <= 1e-9


@pytest.mark.parametrize("tool", [pytest.param("torch", marks=pytest.mark.slow), *FRAMEWORKS])
def test_two_processes_do_what_one_does(tool: str, tmp_path: Path):
    (tmp_path / "large.py").write_text(translate(plan(small()), tool), encoding="utf-8")
    script = [act.__file__, tool, str(tmp_path / "large.py"), str(tmp_path / "result.pt")]
    world = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(world, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["rates"] == expected(small())
    assert distance(result["state"], alone(tool, tmp_path)[0].state_dict()) <= 1e-9
    for key in ("running_mean", "running_var"):
        assert torch.isfinite(result["state"][f"0.bn.{key}"]).all()


@pytest.mark.parametrize("tool", FRAMEWORKS[1:2])
def test_lightning_goes_on_where_it_stopped(tool: str, tmp_path: Path):
    _, first = act.act(tool, executed(small(), 1, tool), tmp_path, max_steps=123)
    model, second = act.act(tool, executed(small(), 1, tool), tmp_path, resume=True)
    assert (len(first), len(second)) == (123, 377)
    assert first + second == expected(small())
    assert distance(model.state_dict(), alone("torch", tmp_path)[0].state_dict()) <= 1e-9


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_an_update_is_that_of_one_large_minibatch(tmp_path: Path, zero_gamma: bool):
    """Two passes of 24 with plain BatchNorm are one of 48 with BatchNorm over 24, to float64's rounding."""
    recipe = small(zero_gamma=zero_gamma)
    namespace = executed(recipe, processes=1)
    batches = [index for _, index in zip(range(6), namespace["Stream"](0), strict=False)]
    namespace["UPDATES"] = 3
    model, _ = act.act("torch", namespace, tmp_path)
    x, y = act.points().tensors
    ours = convert_batchnorm(init_weights_(act.net(), zero_gamma=zero_gamma), per_worker=24)
    optimizer = build_optimizer(recipe, ours)
    for t in range(3):
        rows = torch.tensor(batches[2 * t : 2 * t + 2]).T.reshape(-1)  # rows j, j + 2 … are worker j's
        for group in optimizer.param_groups:
            group["lr"] = recipe.schedule(t * 48 / 1000)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(ours(x[rows]), y[rows], reduction="sum") / 48).backward()
        optimizer.step()
    for (name, found), wanted in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (found - wanted).abs().max() <= 1e-12, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_model_is_prepared_as_ours_is():
    model, untouched = resnet8(), resnet8()
    executed(plan("digits", channels_last=True, compile=True).recipe)["prepare"](model)
    zero = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    assert zero == set(last_batchnorms(model)) != set()
    assert model.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert model._compiled_call_impl is not None
    executed(plan("digits", zero_gamma=False).recipe)["prepare"](untouched)
    assert all(m.weight.all() for m in untouched.modules() if isinstance(m, nn.BatchNorm2d))
    assert untouched._compiled_call_impl is None


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_optimizers_are_ours_but_for_the_rate_that_is_set(name: str, momentum: float):
    recipe = small(optimizer=name, scaling="sqrt", momentum=momentum, nesterov=False)
    optimizer, _ = executed(recipe)["make_optimizer"](resnet8())
    wanted = build_optimizer(recipe, resnet8())
    assert type(optimizer) is type(wanted)
    assert list(map(settings, optimizer.param_groups)) == list(map(settings, wanted.param_groups))
    sizes = [[[p.shape for p in group["params"]] for group in each.param_groups] for each in (optimizer, wanted)]
    assert sizes[0] == sizes[1]  # who decays


@pytest.mark.parametrize("processes", [1, 2])
def test_the_stream_is_that_of_a_run_and_goes_on_where_it_is_told(processes: int):
    recipe = small(seed=3)
    namespace = executed(recipe, processes)
    streams = [list(namespace["Stream"](rank)) for rank in range(processes)]
    passes = namespace["PASSES"]
    assert {len(stream) for stream in streams} == {500 * passes} == {len(namespace["Stream"](0))}
    ours = SampleStream(samples=1000, minibatch=recipe.workers, seed=3)
    for t in range(500):
        batches = [batch for stream in streams for batch in stream[passes * t : passes * (t + 1)]]
        assert batches == [ours.indices(t, worker).tolist() for worker in range(2)]
    assert list(namespace["Stream"](0, start=123)) == streams[0][123 * passes :]


def test_another_number_of_processes_is_refused():
    with pytest.raises(ValueError, match="made for 2 processes, started in 1"):
        executed(small())["train"](act.net(), act.points())


def test_bf16_is_autocast():
    namespace = executed(small(precision="bf16"), 1)
    namespace["UPDATES"] = 1
    seen = []
    model = act.net().float()
    model[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, y = act.points().tensors
    namespace["train"](model, TensorDataset(x.float(), y))
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
