"""Averaged weights: their recursion, what masks it, that nothing else changes, and both sets of weights afterwards."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from steps import step_of
from torch import Tensor, nn

from onehour.api import train
from onehour.cli import main
from onehour.config import Recipe
from onehour.entry import asked_for
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.evaluate import OpenedWeights
from onehour.training.record import Run
from onehour.training.state import AveragedWeights
from onehour.training.weights import read_weights, write_weights

DECAY, TIMES = 0.9, 3


def stepping(images: list[Tensor]) -> Iterator[tuple[AveragedWeights, Tensor]]:
    """An average after each iteration of 3 workers, and a copy of the weights then; ρ belongs to a third of kn."""
    torch.manual_seed(0)
    model = convert_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 2).double().train()
    options = {"minibatch": 6, "per_worker": 2, "base_minibatch": 2, "base_lr": 0.1, "warmup": "none"}
    recipe = Recipe.from_dict({**options, "samples": 60, "precision": "float64", "ema": DECAY})
    step = step_of(recipe, model, [range(3)], ema=recipe.target_ema)
    average = step.network.average
    assert average is not None
    for iteration, batch in enumerate(images):
        yield average, model.get_parameter("0.weight").detach().clone()
        step(iteration, iter([(batch, torch.tensor([0, 1, 2, 0, 1, 1]))]))
    yield average, model.get_parameter("0.weight").detach().clone()


def test_it_is_the_recursion_with_the_decay_of_so_many_updates_and_no_other():
    images = [torch.randn(6, 3, dtype=torch.float64) for _ in range(20)]
    expected, at_base, found = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for iteration, (average, weight) in enumerate(stepping(images)):
        found = average.state()["ema/0.weight"]
        first = iteration == 0
        expected = weight if first else DECAY**TIMES * expected + (1 - DECAY**TIMES) * weight
        at_base = weight if first else DECAY * at_base + (1 - DECAY) * weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - at_base).abs().max() > 1e-3


def test_an_update_that_is_masked_moves_nothing():
    images = [torch.randn(6, 3, dtype=torch.float64) for _ in range(4)]
    images[2][4] = math.nan
    seen = [average.state()["ema/0.weight"].clone() for average, _ in stepping(images)]
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(seen[2], seen[4])


def test_tied_weights_have_one_average_under_both_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    state = AveragedWeights(model, 0.5).state()
    assert list(state) == ["ema/0.weight", "ema/1.weight", "ema/1.bias"]
    assert state["ema/0.weight"] is state["ema/1.weight"]


@pytest.fixture(scope="module")
def run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny.recipe(ema=0.9), out=tmp_path_factory.mktemp("averaged") / "run")


def test_the_run_itself_is_what_it_is_without(tiny: ModuleType, run: Run, tmp_path: Path):
    without = train(tiny.recipe(), out=tmp_path / "run")
    assert run.summary["weights_sha256"] == without.summary["weights_sha256"]
    for mine, other in zip(run.metrics, without.metrics, strict=True):
        assert mine.items() >= other.items()
        assert mine.keys() - other.keys() == {"ema_val_loss", "ema_top1_error"}
        assert mine["ema_val_loss"] != mine["val_loss"]
    assert run.summary.keys() - without.summary.keys() == {"ema_final_error"}
    assert run.summary["state_sha256"] != without.summary["state_sha256"]


def test_both_sets_of_weights_are_evaluated_and_exported(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    last, found, recipe = run.metrics[-1], {}, asked_for(run.recipe, trust=True)
    for ema, prefix in ((False, ""), (True, "ema_")):
        file = write_weights(read_weights(run.folder, ema=ema), tmp_path / f"{prefix}weights.safetensors")
        found[ema] = load_file(file)
        assert OpenedWeights(file, recipe=recipe).evaluate().loss == last[f"{prefix}val_loss"]
    differs = {name for name, tensor in found[True].items() if not torch.equal(tensor, found[False][name])}
    assert differs == {name for name in found[False] if name.endswith(("weight", "bias"))}
    assert main(["evaluate", str(run.folder), "--ema", "--json", "--trust"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == last["ema_val_loss"]


def test_what_has_no_average_says_so(tiny: ModuleType, run: Run, tmp_path: Path):
    other = train(tiny.recipe(epochs=1), out=tmp_path / "run")
    with pytest.raises(ValueError, match="keeps no average of its weights: its recipe has no ema"):
        OpenedWeights(other.folder, recipe=other.recipe, ema=True).evaluate()
    with pytest.raises(ValueError, match=r"--ema is for a run's folder.* is a file"):
        read_weights(write_weights(read_weights(run.folder), tmp_path / "a.pt"), ema=True)
