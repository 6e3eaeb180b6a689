"""How a run ended, against the recipe's committed reference."""

import json
import statistics
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import t

from onehour.api import train
from onehour.recipes import RECIPES
from onehour.study import outcome
from onehour.study.outcome import Reference, draw_curve, outcome_lines, reference_of
from onehour.training.record import Run

REFERENCE = Reference(minibatch=32, mean=3.6, std=0.2, seeds=5, low=3.0, high=4.2, power=0.29)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMMITTED = json.loads((resources.files("onehour.study") / "references.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny.recipe(), out=tmp_path_factory.mktemp("outcome") / "run")


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (3.0, "not distinguishable from the reference; a run 2 std worse would be told apart in 29 %"),
        (3.6, "not distinguishable from the reference; a run 2 std worse would be told apart in 29 %"),
        (4.2, "not distinguishable from the reference; a run 2 std worse would be told apart in 29 %"),
        (4.21, "distinguishable from the reference: it is worse"),
        (60.6, "distinguishable from the reference: it is worse"),
        (2.99, "distinguishable from the reference: it is better"),
    ],
)
def test_a_run_is_told_from_the_reference_outside_the_prediction_interval(error: float, verdict: str):
    assert REFERENCE.verdict(error) == verdict


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_reference_is_the_base_entry_of_its_results(name: str):
    """Mean, std with n − 1 and 95 % prediction interval, from the final error of each seed, with scipy's t."""
    reference = reference_of(name)
    assert reference is not None
    results = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    runs = [run for run in results if run["minibatch"] == reference.minibatch]
    errors = [run["final_error"] for run in runs]
    assert len({run["seed"] for run in runs}) == len(runs) == reference.seeds >= 5
    mean, std = statistics.mean(errors), statistics.stdev(errors)
    end, wider = t.ppf(0.975, len(errors) - 1), (1 + 1 / len(errors)) ** 0.5
    half = end * std * wider
    found = (reference.mean, reference.std, reference.low, reference.high)
    assert found == pytest.approx((mean, std, mean - half, mean + half), rel=1e-9)
    # One more run and n of the reference, drawn: the run 2 std worse.
    draws = np.random.default_rng(0).normal(size=(200_000, len(errors) + 1))
    rest = draws[:, 1:]
    outside = np.abs(draws[:, 0] + 2 - rest.mean(axis=1)) > end * wider * rest.std(axis=1, ddof=1)
    assert outside.mean() == pytest.approx(reference.power, abs=0.005)


def test_the_end_of_a_run_with_a_reference(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outcome, "reference_of", lambda name: REFERENCE if name == "tiny" else None)
    monkeypatch.setitem(RECIPES, "tiny", lambda: run.recipe)
    lines = list(outcome_lines(run))
    assert [line.split()[0] for line in lines] == ["final", "reference", "verdict", "speed", "run", "curve"]
    assert lines[0] == f"final error  {run.final_error:.2f} % (median of the last 2 epochs)"
    assert "3.60 ± 0.20 % at minibatch 32 (5 seeds)" in lines[1]
    assert "between 3.00 and 4.20 %" in lines[1]
    assert lines[2] == "verdict      distinguishable from the reference: it is worse"
    assert "images/s" in lines[3]
    assert run.summary["bottleneck"] in lines[3]
    assert str(run.folder) in lines[4]
    assert str(run.folder / "curve.png") in lines[5]
    content = (run.folder / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_the_end_of_a_run_without_a_reference(run: Run):
    assert reference_of("resnet50") is None
    lines = list(outcome_lines(run))
    assert [line.split()[0] for line in lines] == ["final", "speed", "run", "curve"]


def test_another_task_or_length_has_no_reference(run: Run, monkeypatch: pytest.MonkeyPatch):
    """A run of fewer epochs is not worse than the reference; it is something else."""
    monkeypatch.setattr(outcome, "reference_of", lambda name: REFERENCE)
    monkeypatch.setitem(RECIPES, "tiny", lambda: run.recipe.replace(epochs=run.recipe.epochs + 1))
    assert "verdict" not in " ".join(outcome_lines(run))


def test_an_unfinished_run_says_so(tmp_path: Path, run: Run):
    (tmp_path / "recipe.toml").write_text(run.recipe.to_toml())
    assert list(outcome_lines(Run(tmp_path))) == [f"{tmp_path} ended as unfinished"]
    (tmp_path / "summary.json").write_text('{"outcome": "non-finite"}')
    assert list(outcome_lines(Run(tmp_path))) == [f"{tmp_path} ended as non-finite"]


def test_without_matplotlib_the_line_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert draw_curve(run) is None
    assert list(outcome_lines(run))[-1] == "curve        needs matplotlib: pip install 'onehour[report]'"


@pytest.mark.slow
def test_constant_warmup_at_16_times_the_base_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The paper's figure 2b: the verdict is worth something only if it can say no."""
    broken = train("digits", minibatch=512, warmup="constant", out=tmp_path / "constant")
    assert "verdict      distinguishable from the reference: it is worse" in list(outcome_lines(broken))
