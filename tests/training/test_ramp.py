"""Runs whose minibatch grows: against a loop written from the definition, resumed in each phase, what is refused."""

import copy
from itertools import count, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from onehour.api import train
from onehour.config import Recipe
from onehour.data.samples import following
from onehour.dist.watchdog import GRACE, Watchdog
from onehour.execution import Execution
from onehour.planner import plan
from onehour.rules.shuffle import permutation
from onehour.training.decisions import decisions_of
from onehour.training.record import Run, StoppedError
from onehour.training.step import Step

RAMP = ("4:1/3", "8:5/4")
"""k = 1 for 4 iterations, k = 2 for 6 (of them 48 of 60 samples begin before 5/4), then k = 4."""


def recipe(tiny: ModuleType, **changes: Any) -> Recipe:
    common: dict[str, Any] = {"minibatch": 16, "base_minibatch": 4, "base_lr": 0.05, "epochs": 3, "ramp": RAMP}
    return tiny.recipe(**(common | {"milestones": ("2",)} | changes))


def direct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Every number anew: which samples, how many workers, and the rate, an update after another."""
    norm, stream = model[1], torch.cat([torch.from_numpy(permutation(48, 0, epoch)) for epoch in range(5)])  # type: ignore[index]
    decayed = [p for p in model.parameters() if p is not norm.weight and p is not norm.bias]
    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    position, updates = 0, 0
    norm.momentum = 1.0
    while position < 3 * 48:
        k = 1 if position * 3 < 48 else 2 if position * 4 < 5 * 48 else 4
        epoch, target = position / 48, 0.05 * k
        rate = 0.05 + (target - 0.05) * epoch if epoch < 1 else target * (0.1 if epoch >= 2 else 1)
        model.zero_grad()
        means, variances = [], []
        for worker in range(k):
            chosen = stream[position + worker : position + 4 * k : k]
            (F.cross_entropy(model(images[chosen]), labels[chosen], reduction="sum") / (4 * k)).backward()
            means.append(norm.running_mean.clone())
            variances.append(norm.running_var.clone())
        mean, variance = (0.9 * old + 0.1 * sum(new) / k for old, new in ((mean, means), (variance, variances)))
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                gradient = p.grad + (1e-4 * p if any(p is other for other in decayed) else 0)
                velocity[p] = 0.9 * velocity[p] + gradient
                p -= rate * (gradient + 0.9 * velocity[p])
        position, updates = position + 4 * k, updates + 1
    norm.running_mean, norm.running_var = mean, variance
    return model.state_dict() | {"updates": updates, "position": position}


@pytest.mark.parametrize("reduce", ["fast", "canonical"])
def test_a_run_is_the_loop_of_the_definition(tiny: ModuleType, tmp_path: Path, reduce: str):
    torch.manual_seed(0)
    given, start = recipe(tiny, precision="float64", reduce=reduce), tiny.net().double()
    images, labels = tiny.data()[0].tensors
    expected = direct(copy.deepcopy(start).train(), images.double(), labels)
    run = train(given, model=start, out=tmp_path / "run")
    assert run.summary["iterations"] == expected["updates"] == decisions_of(run.recipe).iterations
    last = run.metrics[-1]
    assert (last["position"], last["lr"]) == (expected["position"], pytest.approx(0.02))
    weights = load_file(next(run.folder.glob(f"checkpoints/iteration-{expected['updates']:09d}")) / "model.safetensors")
    for name in (name for name in weights if not name.endswith("num_batches_tracked")):
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{"ema": 0.9}, {"reduce": "canonical", "optimizer": "sgd"}], ids=["ema", "canonical"]
)
def test_a_run_resumed_in_the_middle_and_at_the_ends_of_phases_has_the_bits_of_an_undisturbed_one(
    tiny: ModuleType, tmp_path: Path, changes: dict[str, Any]
):
    whole = train(recipe(tiny, **changes), out=tmp_path / "whole")
    for stop in (2, 4, 7, 10, 12):
        asked = count(1 + done(tmp_path / "run"))
        with pytest.raises(StoppedError):
            train(
                recipe(tiny, **changes),
                out=tmp_path / "run",
                stop_asked=lambda asked=asked, stop=stop: next(asked) == stop,
            )
    run = train(recipe(tiny, **changes), out=tmp_path / "run")
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def done(folder: Path) -> int:
    """How many iterations a run that was stopped has done."""
    kept = sorted(path.name for path in folder.glob("checkpoints/iteration-*"))
    return int(kept[-1].removeprefix("iteration-")) if kept else 0


def test_training_errors_are_shares_of_the_images_that_the_iterations_took(tiny: ModuleType, tmp_path: Path):
    """The second epoch has iterations of two minibatches; a rate of almost nothing learns nothing."""
    run = train(recipe(tiny, base_lr=1e-30, weight_decay=0), out=tmp_path / "run")
    ramp = decisions_of(run.recipe).ramp
    ends = [0, *(record["iteration"] for record in run.metrics)]
    images = [ramp.position(b) - ramp.position(a) for a, b in pairwise(ends)]
    assert [line["images"] for line in run.timing] == images
    for record, taken in zip(run.metrics, images, strict=True):
        wrong = record["train_error"] * taken / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-9)


def test_the_sample_after_a_bad_one_is_that_of_its_worker_and_goes_on_into_the_next_phase(tiny: ModuleType):
    stream = decisions_of(recipe(tiny, samples=48, classes=3)).stream()
    every = [pair for t in range(12) for pair in zip(*map(list, stream.epochs_and_indices(t)), strict=True)]
    found = following(stream, 12)
    # k = 1 up to position 16, then k = 2 up to 64, from where k is 4.
    assert [next(found) for _ in range(4)] == [every[s] for s in (13, 14, 15, 16)]
    found = following(stream, 59)
    assert [next(found) for _ in range(5)] == [every[s] for s in (61, 63, 65, 69, 73)]


def test_what_cannot_have_a_ramp_is_refused(tiny: ModuleType):
    for changes, message in (
        ({"ramp": ("16:1",)}, "ramp 16:1 must end below minibatch 16, to which it grows, and before epoch 3"),
        ({"ramp": ("8:3",)}, "ramp 8:3 must end below"),
        ({"ramp": ("6:1",)}, "ramp's minibatch 6 is not a multiple of per_worker 4"),
        ({"pitfall": "overlapping-shards"}, "a pitfall, and a run that goes on from another, have one minibatch"),
        ({"optimizer": "adam", "scaling": "sqrt"}, "adam's averages would change their β in mid-run"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(tiny, **changes)
    with pytest.raises(ValueError, match="leave ramp and adascale out"):
        Execution(noise=True).refuse(recipe(tiny))
    with pytest.raises(ValueError, match="2 processes cannot share 1 workers"):
        plan(recipe(tiny), processes=2)


def test_a_plan_says_it_and_its_epochs_keep_their_shares_of_a_run(tiny: ModuleType):
    planned = plan(recipe(tiny, samples=48))
    assert planned["minibatch_until_epoch_5/4"].value == 8
    assert planned["iterations"].rule.startswith("4 of 4 + 6 of 8 + 5 of 16")
    assert recipe(tiny).replace(epochs=6).ramp == ("4:2/3", "8:5/2")
    assert Recipe.from_dict(recipe(tiny).as_dict()) == recipe(tiny)
    assert "ramp" not in Recipe().as_dict()
    assert recipe(tiny).remarks == []


def test_the_first_iteration_of_a_phase_may_compile_anew(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    patience, call = list[float](), Step.__call__
    dogs = list[Watchdog]()
    monkeypatch.setattr(Watchdog, "__enter__", lambda dog: dogs.append(dog) or dog)

    def looked(step: Step, *args: Any, **options: Any) -> Any:
        patience.append(dogs[-1]._patience)
        return call(step, *args, **options)

    monkeypatch.setattr(Step, "__call__", looked)
    train(recipe(tiny), out=tmp_path / "run")
    assert [done for done, patient in enumerate(patience) if patient == GRACE] == [0, 4, 10]


def test_a_run_is_read_with_its_ramp(tiny: ModuleType, tmp_path: Path):
    run = train(recipe(tiny), out=tmp_path / "run")
    assert Run(run.folder).recipe.ramp == RAMP
