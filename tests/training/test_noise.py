"""The gradient noise of a run: right to rounding, the same wherever workers run, and without a trace in the run."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from torch.nn import functional as F
from wires import on_threads

from onehour import Recipe
from onehour.api import train
from onehour.data.loader import Feed
from onehour.data.sources import Data, complete
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.execution import Execution
from onehour.noise import noise_scale
from onehour.runs import _completed, _facts
from onehour.training import measure as measuring
from onehour.training.build import build_model
from onehour.training.decisions import decisions_of
from onehour.training.feeds import pick_share
from onehour.training.measure import MINIBATCHES, GradientNoise, peak_epochs
from onehour.training.record import StoppedError

CPU, ALONE = torch.device("cpu"), Group()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many points as there are iterations for."""
    monkeypatch.setattr(measuring, "SHARE", 1)


def start_of(tiny: ModuleType, reduce: str = "fast") -> tuple[Recipe, Data, nn.Module]:
    """k = 4 workers of 4, in float64 where the order of adding may differ."""
    precision = "float64" if reduce == "fast" else "float32"
    recipe, data = complete(tiny.recipe(minibatch=16, base_minibatch=16, reduce=reduce, precision=precision))
    return recipe, data, build_model(recipe, data, CPU)


def point(start: tuple[Recipe, Data, nn.Module], group: Group = ALONE, *, together: int = 1) -> list[float]:
    """A point at these weights."""
    recipe, data, model = start
    decisions, own = decisions_of(recipe), passes(pick_share(recipe, group), together)
    step = step_of(recipe, copy.deepcopy(model).train(), own, group=group, draws=False)
    feed = Feed(data.train, seed=recipe.seed, loaders=0, device=CPU, stream=decisions.stream())
    noise = GradientNoise(decisions, step)
    taken = noise.measure(0, feed.passes(own, start=0, stop=MINIBATCHES))
    assert len(taken) == MINIBATCHES * len(own)
    (found,) = noise.points
    return found


def test_a_point_is_its_transcription(tiny: ModuleType):
    recipe, data, model = start = start_of(tiny)
    plain = tiny.net().double()  # BatchNorm2d itself, a worker at a time
    plain.load_state_dict(model.state_dict())
    images, labels = data.train.tensors
    stream, gradients = decisions_of(recipe).stream(), list[Tensor]()
    for minibatch in range(MINIBATCHES):
        plain.zero_grad()
        for worker in range(4):
            own = torch.from_numpy(stream.indices(minibatch, worker))
            (F.cross_entropy(plain(images[own].double()), labels[own]) / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]))
    products = torch.stack(gradients) @ torch.stack(gradients).T
    square = (products.sum() - products.trace()) / (MINIBATCHES * (MINIBATCHES - 1))
    trace = 16 * (products.trace() / MINIBATCHES - square)
    assert point(start) == pytest.approx([0, trace.item(), square.item()], rel=1e-10)


@pytest.mark.parametrize("together", [2, 4])
def test_workers_of_a_pass_change_rounding_alone(tiny: ModuleType, together: int):
    start = start_of(tiny)
    assert point(start, together=together) == pytest.approx(point(start), rel=1e-12)


@pytest.mark.parametrize("reduce", ["fast", "canonical"])
def test_processes_do_not_change_it(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, reduce: str):
    start = start_of(tiny, reduce)
    alone = point(start)
    for found in on_threads(monkeypatch, 2, lambda group: point(start, group)):
        assert found == (pytest.approx(alone, rel=1e-12) if reduce == "fast" else alone)


def longer(tiny: ModuleType, **changes: Any) -> Recipe:
    """6 epochs of 6 iterations, all at one rate: points at 6, 14 and 22 where there may be many."""
    return tiny.recipe(**({"epochs": 6} | changes))


def test_the_summary_has_the_noise_scale(
    tiny: ModuleType, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measuring, "MINIBATCHES", 2)
    run = train(longer(tiny), out=tmp_path / "run", noise=True)
    assert len(run.noise) == 15
    noise = noise_scale((trace, square) for _, trace, square in run.noise)
    found = [run.summary[name] for name in ("noise_scale", "noise_scale_low", "noise_scale_high")]
    assert found == [noise.scale, noise.low, noise.high]


class Writing(nn.Module):
    """Writes into its input, draws random numbers, and counts its batches in a buffer that decides its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.dropout, self.linear = nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        images.mul_(1 + self.seen / 100)
        return self.linear(self.dropout(self.flat(images)))


@pytest.mark.parametrize("model", [None, Writing])
def test_a_run_has_the_same_bits_with_and_without(
    tiny: ModuleType, tmp_path: Path, often: None, model: Callable[[], nn.Module] | None
):
    plain = train(longer(tiny), model=model, out=tmp_path / "plain")
    run = train(longer(tiny), model=model, out=tmp_path / "noise", noise=True)
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]
    without = [{name: value for name, value in line.items() if name != "noise"} for line in run.metrics]
    assert without == plain.metrics
    assert [iteration for iteration, *_ in run.noise] == [6, 14, 22]
    assert plain.noise == []


@pytest.mark.parametrize("stop", [6, 8])
def test_a_resumed_run_has_the_record_of_an_undisturbed_one(tiny: ModuleType, tmp_path: Path, often: None, stop: int):
    whole = train(longer(tiny), out=tmp_path / "whole", noise=True)
    asked = iter(range(1, 100))
    with pytest.raises(StoppedError):
        train(longer(tiny), out=tmp_path / "run", noise=True, stop_asked=lambda: next(asked) == stop)
    progress = json.loads((tmp_path / f"run/checkpoints/iteration-{stop:09d}/progress.json").read_text())
    assert len(progress.get("noise", [])) == (stop == 8)
    train(longer(tiny), out=tmp_path / "run", noise=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert len(whole.noise) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, range(1, 30)),
        ({"milestones": ("61/2", "60")}, range(1, 30)),  # not the epoch in which the rate drops
        ({"minibatch": 32}, range(5, 30)),  # behind the warmup
        ({"decay": "cosine"}, range(1, 45)),
        ({"milestones": ("1",)}, range(1, 1)),
        ({"milestones": ("30", "60"), "decay_factor": 0.6}, range(1, 60)),
    ],
)
def test_the_peak_ends_where_the_rate_falls_below_its_half(changes: dict[str, Any], expected: range):
    recipe = Recipe(samples=4800, minibatch=16, per_worker=4, base_minibatch=16).replace(**changes)
    assert peak_epochs(decisions_of(recipe)) == expected


def test_points_are_spread_over_the_peak_and_cost_a_sixtieth_of_the_iterations(tiny: ModuleType):
    recipe = Recipe(samples=8192, minibatch=32, per_worker=16, base_minibatch=32, epochs=24, milestones=("8", "16"))
    own = passes(range(2), 1)
    said: list[str] = []
    noise = GradientNoise(decisions_of(recipe), step_of(recipe, tiny.net(), own), warn=said.append)
    due = [iteration for iteration in range(24 * 256) if noise.is_due(iteration)]
    assert len(due) == 24 * 256 // (60 * MINIBATCHES)
    assert 256 <= due[0] < 512
    assert 7 * 256 < due[-1] <= 8 * 256 - MINIBATCHES
    assert said == []
    GradientNoise(decisions_of(recipe.replace(epochs=3)), step_of(recipe, tiny.net(), own), warn=said.append)
    assert said == ["--noise has iterations for 0 of the 8 points at the peak rate that advise needs"]


def test_images_that_may_be_skipped_are_refused(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="--noise reads minibatches ahead, and with bad_images skip"):
        train(tiny.recipe(bad_images="skip"), noise=True, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_processes_agree_on_whether_it_is_measured(tiny: ModuleType):
    for noise in (False, True):
        given, execution = tiny.recipe(), Execution(processes=2, noise=noise, device="cpu")
        facts = _facts(given, execution, *_completed(given, execution, None, None), ())
        assert facts["measurement"] == {"noise": noise}
