"""What a person sees, and what the host learns of an iteration."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from onehour import Recipe, train
from onehour.training.console import Console
from onehour.training.engine import forward
from onehour.training.measure import Metrics, StepTimer
from onehour.training.record import PARTS
from onehour.training.step import HostFlags

RECIPE = Recipe(name="mine", minibatch=512, samples=5120, epochs=90)
RECORD = Metrics(
    epoch=7, iteration=70, position=0, lr=0.2, train_loss=0.0, train_error=12.5, val_loss=0.0, top1_error=25.0
)


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
    timer = StepTimer(torch.device("cpu"))
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

    logits = forward(model, torch.randn(2, 4), Recipe().replace(precision=precision))
    assert logits.dtype == torch.float32
    assert seen == [inside]


def test_what_a_schedule_never_does_is_said_at_the_start(tiny: ModuleType, tmp_path: Path, capsys: Any):
    train(tiny.recipe(milestones=("1", "2")), out=tmp_path / "run")
    assert "warning: milestone 2 is not before the end of the run of 2 epochs" in capsys.readouterr().out
