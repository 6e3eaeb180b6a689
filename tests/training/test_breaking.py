"""A stop that is asked for during an evaluation does not wait for its end, and the evaluation is made up for."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from onehour.api import train
from onehour.dist.signals import StopSignals
from onehour.training import run as run_module
from onehour.training.breaking import Breakable
from onehour.training.record import Run
from onehour.training.run import StoppedError


class InEvaluation(StopSignals):
    """Asked for in the evaluation number `at`, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def chunk(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.fixture
def asked_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop is seen where an evaluation looks for it."""

    def breakable(feed, group, stop):
        return Breakable(feed, group, stop.chunk if isinstance(stop, InEvaluation) else stop)

    monkeypatch.setattr(run_module, "Breakable", breakable)


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.usefixtures("asked_in_evaluation")
def test_a_run_stopped_in_an_evaluation_leaves_the_bits_of_an_undisturbed_one(
    tiny: ModuleType, tmp_path: Path, evaluation: int, capsys: pytest.CaptureFixture[str]
):
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    iteration = 6 * evaluation
    with pytest.raises(StoppedError, match=f"stopped after iteration {iteration} and saved"):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=InEvaluation(evaluation))
    assert [record["iteration"] for record in Run(tmp_path / "run").metrics] == [6][: evaluation - 1]
    saved = tmp_path / "run" / "checkpoints" / f"iteration-{iteration:09d}" / "progress.json"
    assert json.loads(saved.read_text())["evaluated"] is False
    capsys.readouterr()
    run = train(tiny.recipe(), out=tmp_path / "run")
    assert capsys.readouterr().out.count("images/s") == 2 - evaluation  # none followed the one that was made up for
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]


@pytest.mark.usefixtures("asked_in_evaluation")
def test_an_evaluation_that_was_made_up_for_is_not_recorded_twice(tiny: ModuleType, tmp_path: Path):
    """Killed after it, before the next checkpoint."""
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=InEvaluation(1))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(whole.metrics[0]) + "\n")
    train(tiny.recipe(), out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
