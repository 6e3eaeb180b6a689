"""A stop that is asked for during an evaluation does not wait for its end, and the evaluation is made up for."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from onehour.api import train
from onehour.config import Recipe
from onehour.training.record import Run, StoppedError
from onehour.training.watchdog import Stopping


def stop_in_evaluation(recipe: Recipe, out: Path, evaluation: int) -> None:
    """A signal comes in the evaluation that has this number, from 1 on."""
    looks = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stopping, "is_asked", lambda self: False)
        patched.setattr(Stopping, "is_signalled", lambda self: next(looks) == evaluation)
        with pytest.raises(StoppedError, match=f"stopped after iteration {6 * evaluation} and saved"):
            train(recipe, out=out)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_stopped_in_an_evaluation_leaves_the_bits_of_an_undisturbed_one(
    tiny: ModuleType, tmp_path: Path, evaluation: int, capsys: pytest.CaptureFixture[str]
):
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    iteration = 6 * evaluation
    stop_in_evaluation(tiny.recipe(), tmp_path / "run", evaluation)
    assert [record["iteration"] for record in Run(tmp_path / "run").metrics] == [6][: evaluation - 1]
    saved = tmp_path / "run" / "checkpoints" / f"iteration-{iteration:09d}" / "progress.json"
    assert json.loads(saved.read_text())["evaluated"] is False
    capsys.readouterr()
    run = train(tiny.recipe(), out=tmp_path / "run")
    assert capsys.readouterr().out.count("images/s") == 2 - evaluation  # none followed the one that was made up for
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]


def test_an_evaluation_that_was_made_up_for_is_not_recorded_twice(tiny: ModuleType, tmp_path: Path):
    """Killed after it, before the next checkpoint."""
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    stop_in_evaluation(tiny.recipe(), tmp_path / "run", 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(whole.metrics[0]) + "\n")
    train(tiny.recipe(), out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
