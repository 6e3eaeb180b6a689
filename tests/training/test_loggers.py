"""One seam of three methods for anyone's tracker; one that fails never stops a run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from onehour.api import train
from onehour.training.console import load_logger


@pytest.fixture
def told(tiny: ModuleType) -> list[tuple[str, Any]]:
    tiny.Remembering.told.clear()
    return tiny.Remembering.told


def test_a_logger_hears_the_recipe_each_evaluation_and_the_summary(
    tiny: ModuleType, tmp_path: Path, told: list[tuple[str, Any]]
):
    run = train(tiny.recipe(), out=tmp_path / "run", log="tinytask:Remembering")
    assert [method for method, _ in told] == ["start", "log", "log", "finish"]
    recipe, folder = told[0][1]
    assert recipe == run.recipe.as_dict()
    assert folder == tmp_path / "run"
    for record, (_, heard) in zip(run.metrics, told[1:3], strict=True):
        assert record.items() <= heard.items()
        assert heard["images_per_second"] > 0
    assert told[3][1] == run.summary


@pytest.mark.parametrize(
    ("method", "heard"),
    [("start", ["start"]), ("log", ["start", "log"]), ("finish", ["start", "log", "log", "finish"])],
)
def test_a_logger_that_dies_is_named_once_and_the_run_goes_on(
    tiny: ModuleType,
    tmp_path: Path,
    told: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    heard: list[str],
):
    monkeypatch.setattr(tiny.Dying, "dies_in", method)
    run = train(tiny.recipe(), out=tmp_path / "run", log="tinytask:Dying")
    assert run.finished
    assert [name for name, _ in told] == heard
    said = capsys.readouterr().err
    assert said == f"warning: Dying.{method} failed (no network); the run goes on without it\n"


def test_a_logger_is_no_part_of_what_is_learned(tiny: ModuleType, tmp_path: Path, told: list[tuple[str, Any]]):
    digests = {
        train(tiny.recipe(), out=tmp_path / str(log), log=log).summary["weights_sha256"]
        for log in (None, "tinytask:Remembering")
    }
    assert len(digests) == 1
    assert told


def test_tensorboard_gets_event_files(tiny: ModuleType, tmp_path: Path):
    pytest.importorskip("tensorboard")
    run = train(tiny.recipe(), out=tmp_path / "run", log="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    errors = [(event.step, event.value) for event in events.Scalars("top1_error")]
    assert errors == [(record["iteration"], pytest.approx(record["top1_error"])) for record in run.metrics]


def test_wandb_is_told_by_its_own_interface(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    session = SimpleNamespace(
        log=lambda record, step: calls.append((step, record["top1_error"])),
        summary={},
        finish=lambda: calls.append("finish"),
    )
    fake: Any = ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or session
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = train(tiny.recipe(), out=tmp_path / "run", log="wandb")
    options, *logged, last = calls
    assert options["config"] == run.recipe.as_dict()
    assert logged == [(record["iteration"], record["top1_error"]) for record in run.metrics]
    assert last == "finish"
    assert session.summary == run.summary


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tensorbord", "no logger is called 'tensorbord'; expected tensorboard"),
        ("nowhere:Logger", "nowhere cannot be imported"),
        ("tinytask:Remembring", "has no 'Remembring'; expected Remembering"),
        ("tinytask:Silent", "logger tinytask:Silent has no method finish"),
    ],
)
def test_a_logger_that_cannot_be_used_is_refused(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_logger(spec)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"pip install 'onehour\[{name}\]'"):
        load_logger(name)
