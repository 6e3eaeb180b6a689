"""What a person sees and what trackers are told, and what the host learns of an iteration."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from onehour import Recipe, train
from onehour.dist.devices import HostFlags, StepTimer
from onehour.training.console import Console, load_logger
from onehour.training.measure import Metrics
from onehour.training.record import PARTS
from onehour.training.task import CLASSIFICATION

RECIPE = Recipe(name="mine", minibatch=512, samples=5120, epochs=90)
RECORD = Metrics(epoch=7, iteration=70, position=0, lr=0.2, train_loss=0.0, train_error=12.5, val_loss=0.0, error=25.0)


def show(*, quiet: bool = False, start: int = 0) -> None:
    console = Console(RECIPE, quiet=quiet)
    console.start(start, 900, processes=2, folder="runs/mine", rules="n = 32")
    console.step(start + 1)
    console.evaluated(RECORD, 12345.6)
    console.close()


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    show()
    first, second, rules, third = capsys.readouterr().out.splitlines()
    assert first == (
        "mine: minibatch 512 = 16 workers × 32 on 2 processes, rate 0.1 → 0.2, 90 epochs, 900 iterations, seed 0"
    )
    assert second == "writes runs/mine"
    assert rules == "n = 32"
    for part in ("epoch   7/90", "iteration     70", "12.50 %", "25.00 %", "12,346 images/s"):
        assert part in third


def test_a_resumed_run_says_from_where(capsys: pytest.CaptureFixture[str]):
    show(start=40)
    assert "resumes runs/mine at iteration 40" in capsys.readouterr().out


def test_processes_but_the_first_are_quiet(capsys: pytest.CaptureFixture[str]):
    show(quiet=True)
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    show()
    assert "training" in capsys.readouterr().out


@pytest.mark.parametrize(("stop", "halted"), [(0.0, False), (1.0, False), (3.0, True), (0.0, True)])
def test_the_host_reads_both_flags(stop: float, halted: bool):
    flags = HostFlags(torch.device("cpu"))
    assert flags.read(torch.tensor(stop), torch.tensor([not halted])) == (stop > 0, halted)


def test_a_timer_adds_the_laps_of_a_step_and_forgets_them_when_read(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 5.0, 5.5, 7.0, 7.5, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer(PARTS, torch.device("cpu"))
    for parts in (("data", "compute", "data"), ("update", "reduction")):
        timer.begin()
        for part in parts:
            timer.lap(part)
        timer.end()
    first, second = timer.steps()
    assert list(first) == list(PARTS)
    assert first == {"data": 1500.0, "compute": 4000.0, "reduction": 0.0, "update": 0.0}
    assert second == {"data": 0.0, "compute": 0.0, "reduction": 1500.0, "update": 500.0}
    assert timer.steps() == []


@pytest.mark.parametrize(("precision", "inside"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_coarsely_but_logits_are_float32(precision: str, inside: torch.dtype):
    seen = []
    layer = torch.nn.Linear(4, 3)

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(layer(images).dtype)
        return layer(images)

    logits = CLASSIFICATION.logits(model, torch.randn(2, 4), Recipe().replace(precision=precision))
    assert logits.dtype == torch.float32
    assert seen == [inside]


def test_what_a_schedule_never_does_is_said_at_the_start(tiny: ModuleType, tmp_path: Path, capsys: Any):
    train(tiny.recipe(milestones=("1", "2")), out=tmp_path / "run")
    assert "warning: milestone 2 is not before the end of the run of 2 epochs" in capsys.readouterr().out


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
