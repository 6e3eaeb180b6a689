"""`train RUN --continue`: a longer run from where another one came to, in a folder of its own."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onehour.api import train
from onehour.cli import main
from onehour.config import Recipe
from onehour.recipes import digits
from onehour.runs import changed_schedule
from onehour.study.outcome import outcome_lines
from onehour.study.spec import spec_of
from onehour.training.record import Run, StoppedError


@pytest.fixture(scope="module")
def old(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """12 iterations, which are 2 epochs."""
    return train(tiny.recipe(milestones=("1",)), out=tmp_path_factory.mktemp("continued") / "old")


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "onehour.rules.momentum:InsideSGD"])
def test_a_run_that_goes_on_is_the_one_whose_rate_changed_there(tiny: ModuleType, tmp_path: Path, optimizer: str):
    """To the bit, with the velocity corrected for the jump where the rate is inside (Remark 2)."""
    common = {"optimizer": optimizer, "warmup": "none", "decay_factor": 2.0}
    whole = train(tiny.recipe(epochs=3, milestones=("2",), **common), out=tmp_path / "whole")
    train(tiny.recipe(epochs=2, milestones=("9",), **common), out=tmp_path / "old")
    recipe = tiny.recipe(epochs=3, milestones=("9",), base_lr=0.2, **common)
    run = train(recipe, continues=tmp_path / "old", out=tmp_path / "new")
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]
    assert run.metrics == whole.metrics
    assert [round(line["lr"], 12) for line in run.metrics] == [0.1, 0.1, 0.2]


def test_a_stopped_run_goes_on_too_and_so_does_what_goes_on_from_it(tiny: ModuleType, tmp_path: Path):
    common = {"warmup": "none", "milestones": ("9",)}
    whole = train(tiny.recipe(epochs=3, **common), out=tmp_path / "whole")
    stop = iter([False] * 3 + [True]).__next__
    with pytest.raises(StoppedError):
        train(tiny.recipe(**common), out=tmp_path / "old", stop_asked=stop)
    again: dict[str, Any] = {"continues": str(tmp_path / "old"), "out": tmp_path / "new"}
    recipe = tiny.recipe(epochs=3, **common)
    with pytest.raises(StoppedError):
        train(recipe, **again, stop_asked=iter([False] * 3 + [True]).__next__)
    shutil.rmtree(tmp_path / "old")  # it is needed no more, but for its recipe, which the command line reads
    run = train(recipe, **again)
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]
    assert [line["iteration"] for line in run.metrics] == [6, 12, 18]


def test_the_command_leaves_the_old_run_and_says_what_the_schedule_becomes(
    tiny: ModuleType, old: Run, alone: Path, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(old.folder, "old"))
    before, code = files(copy), ["--model", "tinytask:net", "--data", "tinytask:data"]
    command = ["train", "old", "--continue", "--epochs", "5", *code]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "goes on from old at epoch 2 of 5 with rate 0.1, 0.01 from epoch 5/2",
        "the rate jumps up there, from 0.01 to 0.1: warmup and decay are those of a run of 5 epochs; --milestones 1"
        " keeps where the old run drops",
    ]
    assert files(copy) == before
    new = Run(Path("old-5-epochs"))
    assert new.recipe.continues == f"old iteration 12 state {old.summary['state_sha256']}"
    assert (new.recipe.milestones, new.recipe.warmup_epochs) == (("5/2",), 2.5)
    assert [line["epoch"] for line in new.metrics] == [1, 2, 3, 4, 5]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("old-5-epochs is finished")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "old has done 2 epochs, and epochs is 2; give more --epochs"),
        ("--epochs 1", "old has done 2 epochs, and epochs is 1; give more --epochs"),
        ("--epochs 3 --minibatch 16", "--continue changes nothing but the schedule of old (minibatch: 8 → 16); leave"),
        ("--epochs 3 --data tinytask:few_digits", "--continue changes nothing but the schedule of old (data: tinytask"),
        ("--epochs 3 --init old", "train anew from its weights: --init old"),
        ("--epochs 3 --out old", "--out old is the run itself; choose another"),
        ("--epochs 3 --out other", "other is a run of another recipe (continues:  → old iteration 12 state "),
    ],
)
def test_what_cannot_be_is_one_message(tiny: ModuleType, old: Run, alone: Path, refused: Any, flags: str, said: str):
    for name in ("old", "other"):
        shutil.copytree(old.folder, name)
    code = ["--model", "tinytask:net", *([] if "--data" in flags else ["--data", "tinytask:data"])]
    classes = ["--classes", "3"] if "--data" in flags else []
    assert said in refused(["train", "old", "--continue", *code, *classes, *flags.split()])
    assert sorted(path.name for path in alone.iterdir()) == ["old", "other"]


def test_a_run_whose_minibatch_grew_does_not_go_on(tiny: ModuleType, tmp_path: Path):
    grown = tiny.recipe(minibatch=16, ramp=("8:1",), epochs=2)
    old = train(grown, out=tmp_path / "old")
    with pytest.raises(ValueError, match=r"old has a ramp, .* train anew from its weights: --init"):
        train(grown.replace(epochs=4), continues=old.folder, out=tmp_path / "new")


def test_a_run_that_ended_within_an_epoch_does_not_go_on(tiny: ModuleType, tmp_path: Path):
    """The errors of its last iterations would be counted to the wrong evaluation."""
    run = train(tiny.recipe(epochs=1.5), out=tmp_path / "old")
    with pytest.raises(
        ValueError, match=r"old has 1\.5 epochs, and --continue goes on only from whole ones; train anew"
    ):
        train(tiny.recipe(epochs=3), continues=run.folder, out=tmp_path / "new")


def test_what_is_no_run_is_one_message(old: Run, alone: Path, refused: Any):
    assert "digits is not a run's folder" in refused(["train", "digits", "--continue"])
    assert "recipe.toml --out " in refused(["train", str(old.folder)])


def test_a_recipe_that_goes_on_is_not_trained_from_the_start(tiny: ModuleType, old: Run, tmp_path: Path):
    run = train(old.recipe.replace(epochs=3), continues=old.folder, out=tmp_path / "new", trust=True)
    with pytest.raises(
        ValueError, match=r"the recipe goes on from .*old iteration 12 state .* has no checkpoint to continue from"
    ):
        train(run.recipe, out=tmp_path / "elsewhere", trust=True)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="no checkpoint to continue from"):
        train(run.recipe, out=run.folder, fresh=True, trust=True)
    assert spec_of(run.recipe, [8], range(1), ["none"], None).recipe.continues == ""
    assert not any("reference" in line for line in outcome_lines(run))


def test_a_folder_that_was_left_unprepared_is_prepared_again(tiny: ModuleType, old: Run, tmp_path: Path):
    recipe = old.recipe.replace(epochs=3)
    run = train(recipe, continues=old.folder, out=tmp_path / "whole", trust=True)
    shutil.copytree(run.folder, tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoints", "summary.json"))
    again = train(recipe, continues=old.folder, out=tmp_path / "cut", trust=True)
    assert again.summary["state_sha256"] == run.summary["state_sha256"]
    assert again.metrics == run.metrics


def test_a_folder_that_was_left_unprepared_while_the_old_run_went_on_begins_afresh(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(StoppedError):
        train(tiny.recipe(), out=tmp_path / "old", stop_asked=iter([False] * 3 + [True]).__next__)
    again: dict[str, Any] = {"continues": tmp_path / "old", "out": tmp_path / "new"}
    train(tiny.recipe(epochs=3), **again)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    (tmp_path / "new" / "summary.json").unlink()
    train(tiny.recipe(), out=tmp_path / "old")
    with pytest.raises(ValueError, match="give the same command again, with --fresh"):
        train(tiny.recipe(epochs=3), **again)
    assert " iteration 12 " in train(tiny.recipe(epochs=3), **again, fresh=True).recipe.continues


@pytest.mark.parametrize(
    ("old", "new", "epoch", "lines"),
    [
        (
            {},
            {"epochs": 48},
            24,
            [
                "at epoch 24 of 48 with rate 0.16, 0.016 from epoch 32, 0.0016 from epoch 128/3",
                "the rate jumps up there, from 0.0016 to 0.16: warmup and decay are those of a run of 48 epochs;"
                " --milestones 8,16,64/3 keeps where the old run drops",
            ],
        ),
        ({}, {"epochs": 48, "milestones": ("8", "16", "64/3")}, 24, ["at epoch 24 of 48 with rate 0.0016"]),
        (
            {},
            {"epochs": 48},
            1,
            [
                "at epoch 1 of 48 with rate 0.34, warms up to 1.6 at epoch 10, 0.16 from epoch 16, 0.016 from"
                " epoch 32, 0.0016 from epoch 128/3",
                "the rate jumps down there, from 0.4713 to 0.34: warmup and decay are those of a run of 48 epochs;"
                " --milestones 8,16,64/3 keeps where the old run drops",
            ],
        ),
        (
            {"decay": "cosine"},
            {"epochs": 48},
            24,
            [
                "at epoch 24 of 48 with rate 0.8, falls along a cosine to 0 at epoch 48",
                "the rate jumps up there, from 6.693e-06 to 0.8: warmup and decay are those of a run of 48 epochs",
            ],
        ),
    ],
)
def test_the_schedule_is_said_with_its_jump(old: dict[str, Any], new: dict[str, Any], epoch: int, lines: list[str]):
    recipe: Recipe = digits(minibatch=256, **old)
    assert changed_schedule(recipe, recipe.replace(**new), epoch * 32).splitlines() == lines


def test_the_rate_that_the_velocity_was_made_at_goes_along(tiny: ModuleType, old: Run, tmp_path: Path):
    stop = iter([False, True]).__next__
    with pytest.raises(StoppedError):
        train(old.recipe.replace(epochs=4), continues=old.folder, out=tmp_path / "a", trust=True, stop_asked=stop)
    places = sorted((tmp_path / "a" / "checkpoints").iterdir())
    rates = [json.loads((place / "progress.json").read_text()).get("rate") for place in places]
    assert rates == [old.metrics[-1]["lr"], None]
