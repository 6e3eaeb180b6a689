"""A seed that leaves the finite numbers leaves the joined network too: no bit of the others knows of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from onehour import Recipe
from onehour.api import train
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.models.small import resnet8
from onehour.rules.keys import seed_for
from onehour.training.build import build_model, complete
from onehour.training.checkpoint import latest_contents
from onehour.training.decisions import decisions_of
from onehour.training.engine import Part
from onehour.training.record import NonFiniteError, Run, StoppedError
from onehour.training.seeds import Seeds, SeedsFeed, train_seeds
from onehour.training.state import model_state, optimizer_state

BAD = 1


def spoiled(make: Callable[[], nn.Module], spoil: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    """A model function whose model is spoiled for seed 1 alone."""

    def built() -> nn.Module:
        model = make()
        if torch.initial_seed() == seed_for(BAD, "weights"):
            with torch.no_grad():
                spoil(model)
        return model

    return built


def first_weight(value: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        next(model.parameters()).view(-1)[0] = value

    return spoil


def last_layer_large(model: nn.Module) -> None:
    """The first loss is finite, one after it is not."""
    list(model.parameters())[-2].mul_(1e25)


def huge(model: nn.Module) -> None:
    """Activations whose squares overflow: their variance is infinite, and BatchNorm makes zeros of them."""
    next(model.parameters()).mul_(1e25)


def together(recipe: Recipe, data: Data, where: Path, seeds: int = 3, **options: Any) -> list[Run]:
    folders = [where / str(seed) for seed in range(seeds)]
    train_seeds([recipe.replace(seed=seed) for seed in range(seeds)], data, folders, Group(), **options)
    return [Run(folder) for folder in folders]


def small_resnet() -> nn.Module:
    return resnet8(classes=3)


@pytest.mark.parametrize("make", ["net", "resnet8"])
@pytest.mark.parametrize(
    "spoil", [first_weight(torch.nan), first_weight(torch.inf), last_layer_large], ids=["nan", "inf", "grows"]
)
def test_no_bit_of_the_others_knows_of_a_seed_that_is_not_finite(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str, spoil: Callable[[nn.Module], None]
):
    build = tiny.net if make == "net" else small_resnet
    recipe, data = complete(tiny.recipe(epochs=3))
    monkeypatch.setattr(tiny, "net", build)
    expected = together(recipe, data, tmp_path / "right")
    monkeypatch.setattr(tiny, "net", spoiled(build, spoil))
    found = together(recipe, data, tmp_path / "spoiled")
    for seed in (0, 2):
        assert found[seed].finished
        assert found[seed].summary["state_sha256"] == expected[seed].summary["state_sha256"]
        assert found[seed].metrics == expected[seed].metrics
    bad = found[BAD]
    assert not bad.finished
    assert bad.summary["outcome"] == "non-finite"
    assert bad.summary["final_error"] is None
    assert bad.metrics == []
    with pytest.raises(NonFiniteError):  # alone it does the same
        train(recipe.replace(seed=BAD), out=tmp_path / "alone")


def test_metrics_stop_where_the_numbers_do_and_the_last_finite_checkpoint_stays(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All seeds meet bad images from iteration 9 on; epochs are 6 iterations."""
    monkeypatch.setattr("onehour.training.seeds.SAVE_SECONDS", 0.0)
    images, labels = tiny.data()[0].tensors
    recipe, data = complete(tiny.recipe(epochs=4), (TensorDataset(images, labels), tiny.data()[1]))
    calls: list[int] = []

    def spoil() -> bool:
        calls.append(1)
        if len(calls) == 8:
            images[:, 0, 0, 0] = tiny.HUGE
        return False

    runs = together(recipe, data, tmp_path, stop_asked=spoil)
    assert len(calls) < 24  # none is left, so it does not go on to the end
    for run in runs:
        assert run.summary["outcome"] == "non-finite"
        assert [record["iteration"] for record in run.metrics] == [6]
        contents = latest_contents(run.folder)
        assert contents is not None
        assert json.loads(contents[-1])["iteration"] == 6


def test_stopped_before_an_evaluation_a_bad_seed_is_not_saved_and_ends_when_the_run_goes_on(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "net", spoiled(tiny.net, first_weight(torch.nan)))
    recipe, data = complete(tiny.recipe())
    with pytest.raises(StoppedError):
        together(recipe, data, tmp_path, stop_asked=lambda: True)
    assert [latest_contents(tmp_path / str(seed)) is None for seed in range(3)] == [False, True, False]
    runs = together(recipe, data, tmp_path)
    assert [run.summary["outcome"] for run in runs] == ["finished", "non-finite", "finished"]
    assert [len(run.metrics) for run in runs] == [2, 0, 2]


def test_what_is_cleared_is_all_of_that_seed_and_nothing_of_another(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(precision="float64", optimizer="adam"))
    models = [build_model(recipe.replace(seed=seed), data, torch.device("cpu")) for seed in range(3)]
    decisions = [decisions_of(recipe.replace(seed=seed)) for seed in range(3)]
    seeds = Seeds(decisions[0], [Part(model, decisions[0].optimizer(model)) for model in models])
    streams = [decision.stream() for decision in decisions]
    feed = SeedsFeed(data.train, seeds=3, device=torch.device("cpu"), streams=streams)
    batches = feed.passes([range(2)], start=0, stop=2)
    step = step_of(recipe, seeds.model, [range(2)], optimizer=seeds.optimizer, seeds=3)
    step(0, batches)
    before = {name: tensor.clone() for name, tensor in shared(seeds.model, seeds.optimizer).items()}
    seeds.clear(BAD)
    for name, tensor in shared(seeds.model, seeds.optimizer).items():
        for seed, (now, then) in enumerate(zip(tensor.chunk(3), before[name].chunk(3), strict=True)):
            assert torch.equal(now, torch.zeros_like(then) if seed == BAD else then)
    assert step(1, batches).sums.isfinite().all()


def shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is divided among the seeds: all but counts."""
    state = model_state(model) | optimizer_state(optimizer, model)
    return {name: tensor for name, tensor in state.items() if tensor.ndim}


class Root(nn.Module):
    """Nothing is added to its input, by way of √0, whose gradient is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).sqrt()


def test_what_no_loss_tells_is_found_at_the_evaluation(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A single iteration with a finite loss, and a gradient or a variance that is not."""

    def rooted() -> nn.Module:
        conv, *rest = tiny_net().children()
        return nn.Sequential(conv, Root(), *rest)

    tiny_net = tiny.net
    recipe, data = complete(tiny.recipe(minibatch=48, base_minibatch=48, epochs=1))
    for name, net, bad in (("gradient", rooted, {0, 1, 2}), ("variance", spoiled(tiny_net, huge), {BAD})):
        monkeypatch.setattr(tiny, "net", net)
        with pytest.raises(NonFiniteError):
            train(recipe.replace(seed=BAD), out=tmp_path / name / "alone")
        runs = together(recipe, data, tmp_path / name)
        assert {seed for seed, run in enumerate(runs) if run.summary["outcome"] == "non-finite"} == bad
        assert {seed for seed, run in enumerate(runs) if run.metrics == []} == bad
