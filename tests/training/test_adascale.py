"""Runs with AdaScale: against a loop written from the paper, resumed, equal to the base's at its minibatch, refused."""

import copy
import math
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
from onehour.execution import Execution
from onehour.planner import plan
from onehour.rules.shuffle import SampleStream
from onehour.training.decisions import decisions_of
from onehour.translate import translate

K, S = 4, 2


def recipe(tiny: ModuleType, **changes: Any) -> Recipe:
    """Four workers of 4; the base's minibatch is of two."""
    common = {"minibatch": 16, "base_minibatch": 8, "base_lr": 0.1, "epochs": 3, "milestones": ("2",)}
    return tiny.recipe(**({"scaling": "adascale"} | common | changes))


def direct(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The algorithm of §3 with appendix B.3's estimates from four workers; SGD with Nesterov's momentum."""
    norm, stream = model[1], SampleStream(samples=48, minibatch=16, seed=0)  # type: ignore[index]
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    mean, variance = torch.zeros(4).double(), torch.ones(4).double()
    tau, t, sigmas, squares, rates = 0.0, 0, list[float](), list[float](), list[float]()
    norm.momentum = 1.0
    while tau < 3 * 48 / 8:
        workers, means, variances = list[dict[str, torch.Tensor]](), [], []
        for worker in range(K):
            chosen = torch.from_numpy(stream.indices(t))[worker::K]
            model.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            workers.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            means.append(norm.running_mean.clone())
            variances.append(norm.running_var.clone())
        total = {name: torch.stack([own[name] for own in workers]).mean(0) for name in workers[0]}
        square = float(sum(g.square().sum() for g in total.values()))
        each = float(sum(g.square().sum() for own in workers for g in own.values()))
        sigma = (each / (K - 1) - K / (K - 1) * square) * S / K  # of two workers, which a base minibatch has
        sigmas.append(max(sigma, 1e-6))
        squares.append(max(square - sigma / S, 0))
        a, b = sum(sigmas) / len(sigmas), sum(squares) / len(squares)  # t < 1/(1 − 0.998)
        r = (a + b) / (a / S + b)
        rate = r * 0.1 * (0.1 if math.floor(tau) * 8 / 48 >= 2 else 1)
        mean, variance = (0.9 * old + 0.1 * sum(new) / K for old, new in ((mean, means), (variance, variances)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = total[name] + (0 if name.startswith("1.") else 1e-4 * p)
                velocity[name] = 0.9 * velocity[name] + gradient
                p -= rate * (gradient + 0.9 * velocity[name])
        tau, t = tau + r, t + 1
        rates.append(rate)
    norm.running_mean, norm.running_var = mean, variance
    return {"state": model.state_dict(), "iterations": t, "tau": tau, "rates": rates}


@pytest.mark.parametrize("reduce", ["fast", "canonical"])
def test_a_run_is_the_papers_algorithm(tiny: ModuleType, tmp_path: Path, reduce: str):
    torch.manual_seed(0)
    given, start = recipe(tiny, precision="float64", reduce=reduce), tiny.net().double()
    images, labels = tiny.data()[0].tensors
    expected = direct(copy.deepcopy(start).train(), images.double(), labels)
    run = train(given, model=start, out=tmp_path / "run")
    last = run.metrics[-1]
    assert run.summary["iterations"] == last["iteration"] == expected["iterations"]
    assert 9 < expected["iterations"] < 18  # between those at this minibatch, and the base's
    assert last["base_iterations"] == pytest.approx(expected["tau"], rel=1e-12)
    assert [record["lr"] for record in run.metrics] == pytest.approx(
        [expected["rates"][record["iteration"] - 1] for record in run.metrics], rel=1e-12
    )
    weights = load_file(max(run.folder.glob("checkpoints/iteration-*")) / "model.safetensors")
    for name in (name for name in weights if not name.endswith("num_batches_tracked")):
        torch.testing.assert_close(weights[name], expected["state"][name], rtol=0, atol=1e-12)


def test_at_the_base_minibatch_it_is_the_usual_run(tiny: ModuleType, tmp_path: Path):
    changes: dict[str, Any] = {"minibatch": 8, "per_worker": 8}
    ours, usual = (
        train(recipe(tiny, scaling=scaling, **changes), out=tmp_path / scaling) for scaling in ("adascale", "linear")
    )
    assert ours.summary["state_sha256"] == usual.summary["state_sha256"]
    assert ours.metrics[-1]["base_iterations"] == ours.summary["iterations"] == 18


def test_epochs_that_are_no_whole_images_end_evaluated_and_saved(tiny: ModuleType, tmp_path: Path):
    run = train(recipe(tiny, minibatch=4, base_minibatch=4, epochs=2.09), out=tmp_path / "run")  # of 100.32 images
    assert run.summary["iterations"] == run.metrics[-1]["iteration"] == 25
    assert (run.folder / "checkpoints" / "iteration-000000025").is_dir()


def test_what_it_is_not_defined_with_is_refused(tiny: ModuleType):
    for changes, message in (
        ({"optimizer": "adam"}, "derived for SGD's step; use optimizer sgd, not adam"),
        ({"ramp": ("8:1",), "ema": 0.9}, "not defined with ramp, ema"),
        ({"minibatch": 4}, "grows the rate from base_minibatch 8 on; use a minibatch of at least that, not 4"),
        ({"per_worker": 16}, "the gradients of two workers at least"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(tiny, **changes)
    with pytest.raises(ValueError, match="leave ramp and adascale out"):
        Execution(noise=True).refuse(recipe(tiny))
    known = recipe(tiny, samples=48, classes=3)
    with pytest.raises(ValueError, match="no hours can be said"):
        plan(known, images_per_second=10)
    with pytest.raises(ValueError, match="scaling adascale is not translated"):
        translate(plan(known), "torch")


def test_a_plan_says_what_is_known_before(tiny: ModuleType):
    planned = plan(recipe(tiny, samples=48))
    assert planned["iterations"].value == 18
    assert planned["iterations"].rule.startswith("at most, where every r is 1; at least ⌈3 · N / kn⌉ = 9")
    assert planned["target_lr"].value == 0.1
    assert "1 ≤ r ≤ kn/8 by gradients" in planned["target_lr"].rule


def test_an_end_within_an_epoch_is_no_second_evaluation_of_the_epoch_before(tiny: ModuleType):
    """Three iterations of 16 are an epoch of 48."""
    decisions = decisions_of(recipe(tiny, samples=48))
    assert [decisions.evaluated_epoch(done) for done in (0, 3, 12, 13)] == [0, 1, 4, 13 / 3]
