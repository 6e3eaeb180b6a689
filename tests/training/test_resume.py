"""The same command goes on where a run was stopped, and leaves the bits of an undisturbed one."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tinytask import after
from torch import nn

from onehour.api import train
from onehour.dist.devices import build_of
from onehour.dist.group import Group
from onehour.training.checkpoint import Checkpoints, Store, Stored
from onehour.training.evaluate import OpenedWeights
from onehour.training.feeds import Skipping
from onehour.training.record import Run, StoppedError, first_began

CHECKPOINT = "checkpoints/iteration-{:09d}"


def never() -> bool:
    raise AssertionError("an iteration was run")


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The undisturbed run: 12 iterations, an evaluation at 6 and 12."""
    return train(tiny.recipe(), out=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped at iteration 8, with the checkpoints of 6 and 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(StoppedError, match="stopped after iteration 8 and saved"):
        train(tiny.recipe(), out=folder, stop_asked=after(8))
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def assert_same(run: Run, whole: Run) -> None:
    for key in ("weights_sha256", "state_sha256", "final_error", "iterations", "epochs"):
        assert run.summary[key] == whole.summary[key]
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_a_run_stopped_in_mid_epoch_is_unfinished_and_saved(copy: Path):
    run = Run(copy)
    assert not run.finished
    assert run.summary == {}
    assert [record["iteration"] for record in run.metrics] == [6]
    progress = json.loads((copy / CHECKPOINT.format(8) / "progress.json").read_text())
    assert (progress["iteration"], progress["position"]) == (8, 64)


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 8, 11])
def test_a_resumed_run_leaves_the_bits_of_an_undisturbed_one(tiny: ModuleType, whole: Run, tmp_path: Path, stop: int):
    with pytest.raises(StoppedError):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=after(stop))
    assert_same(train(tiny.recipe(), out=tmp_path / "run"), whole)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_velocity_with_the_rate_inside_goes_on_from_the_rate_it_was_made_at(
    tiny: ModuleType, tmp_path: Path, stop: int
):
    recipe = tiny.recipe(optimizer="onehour.rules.momentum:InsideSGD", base_minibatch=4)
    whole = train(recipe, out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(recipe, out=tmp_path / "run", stop_asked=after(stop))
    assert_same(train(recipe, out=tmp_path / "run"), whole)


def test_every_process_hears_that_a_stop_is_saved_before_any_leaves(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Be it for too many bad images: launchers end process 0 when another has left."""
    calls: list[object] = []
    wait, broadcast = Checkpoints.wait, Group.broadcast

    def waited(self: Checkpoints) -> bool:
        calls.append("waited")
        return wait(self)

    def told(self: Group, payload: bytes | None) -> bytes | None:
        calls.append(payload)
        return broadcast(self, payload)

    def refused(self: Skipping, done: int, saved: str) -> None:
        assert calls[-3:] == ["waited", b"saved", b""]  # the folder is not lost
        raise ValueError(saved)

    for kind, name, replaced in ((Checkpoints, "wait", waited), (Group, "broadcast", told)):
        monkeypatch.setattr(kind, name, replaced)
    monkeypatch.setattr(Skipping, "refuse_too_many", refused)
    data = tiny.Skipped(tiny.data()[0]), tiny.listed()[1]
    with pytest.raises(ValueError, match="saved; the same command goes on from there"):
        train(tiny.recipe(bad_images="skip"), data=data, loaders=0, out=tmp_path / "run", stop_asked=after(3))


def test_a_run_may_be_stopped_again_and_again(tiny: ModuleType, whole: Run, tmp_path: Path):
    for _ in range(3):
        with pytest.raises(StoppedError):
            train(tiny.recipe(), out=tmp_path / "run", stop_asked=after(3))
    run = train(tiny.recipe(), out=tmp_path / "run")
    assert_same(run, whole)
    sessions = json.loads((run.folder / "environment.json").read_text())["sessions"]
    assert [session["from_iteration"] for session in sessions] == [0, 3, 6, 9]


def test_a_stop_asked_at_the_last_iteration_finishes_the_run(tiny: ModuleType, whole: Run, tmp_path: Path):
    assert_same(train(tiny.recipe(), out=tmp_path / "run", stop_asked=after(12)), whole)


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tiny: ModuleType, whole: Run, tmp_path: Path):
    def die() -> bool:
        if next(calls) == 11:
            raise KeyboardInterrupt
        return False

    calls = iter(range(1, 100))
    with pytest.raises(KeyboardInterrupt):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=die, save_every=4)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000000006", "iteration-000000008"]
    assert_same(train(tiny.recipe(), out=tmp_path / "run", save_every=4), whole)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny: ModuleType, whole: Run, copy: Path, file: str):
    flip(copy / CHECKPOINT.format(8) / file)
    starts = []
    run = train(tiny.recipe(), out=copy, stop_asked=lambda: bool(starts.append(1)))
    assert len(starts) == 6  # from iteration 6, not 8
    assert_same(run, whole)


def flip(path: Path) -> None:
    """A bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_newer_checkpoint_that_can_be_read_again_leaves_no_hole_in_the_record(
    tiny: ModuleType, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The record was cut to the one before it."""
    calls = iter(range(1, 99))
    with pytest.raises(KeyboardInterrupt):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=lambda: next(calls) == 7 and interrupted(), save_every=4)
    verified = Store.verified

    def refuses(self: Store, folder: Path) -> Stored:
        if folder.name.endswith("6"):
            raise ValueError("model.safetensors cannot be read: Input/output error")
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", refuses)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=interrupted)
    monkeypatch.undo()
    assert_same(train(tiny.recipe(), out=tmp_path / "run"), whole)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def interrupted() -> bool:
    raise KeyboardInterrupt


def test_where_no_checkpoint_can_be_trusted_the_run_says_so_and_starts_nothing(tiny: ModuleType, copy: Path):
    for number in (6, 8):
        flip(copy / CHECKPOINT.format(number) / "model.safetensors")
    with pytest.raises(ValueError, match=r"can be trusted \(iteration-000000008: model.safetensors differs.*--fresh"):
        train(tiny.recipe(), out=copy, stop_asked=never)


def test_the_record_is_cut_to_what_the_checkpoint_knows(tiny: ModuleType, whole: Run, copy: Path):
    """Killed between an evaluation and its checkpoint."""
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "iteration": 12, "top1_error": 0.0}) + "\n")
    assert_same(train(tiny.recipe(), out=copy), whole)


def test_a_finished_run_is_not_run_again(tiny: ModuleType, tmp_path: Path):
    first = train(tiny.recipe(), out=tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = train(tiny.recipe(), out=tmp_path / "run", stop_asked=never)
    assert again.summary == first.summary
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == times


def test_a_run_that_another_process_finished_while_this_one_waited_stays_as_it_is(
    tiny: ModuleType, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tiny.recipe(), out=tmp_path / "run")
    monkeypatch.setattr("onehour.runs.finished_run", lambda *_: None)
    assert_same(train(tiny.recipe(), out=tmp_path / "run", stop_asked=never), whole)


def test_fresh_starts_over_and_keeps_the_old_folders_under_numbered_names(tiny: ModuleType, tmp_path: Path):
    for seed in (0, 1, 2):
        train(tiny.recipe(seed=seed, epochs=1), out=tmp_path / "run", fresh=True)
    seeds = {path.name: Run(path).recipe.seed for path in tmp_path.iterdir()}
    assert seeds == {"run": 2, "run.1": 0, "run.2": 1}
    assert all(Run(path).finished for path in tmp_path.iterdir())


@pytest.mark.parametrize(("agent", "process", "over"), [(-60, 60, False), (60, 120, True), (-60, -30, True)])
def test_fresh_under_torchrun_starts_over_once_a_job(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: float, process: float, *, over: bool
):
    """A host that comes or goes starts all processes anew, with the same flags and no number of the restart; the agent
    is older than the run then. In another job it is younger; in a script that trains twice both are older.
    """
    with pytest.raises(StoppedError):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=after(3))
    began = first_began(tmp_path / "run")
    ages = {os.getppid(): began + agent, os.getpid(): began + process}
    monkeypatch.setattr("onehour.runs.process_began", ages.get)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    train(tiny.recipe(), out=tmp_path / "run", fresh=True)
    assert (tmp_path / "run.1").exists() == over
    assert (Run(tmp_path / "run").environment["from_iteration"] == 0) == over


@pytest.mark.parametrize(("agent", "goes_on"), [(-60, False), (60, True)])
def test_only_a_stop_of_this_job_keeps_a_restart_under_torchrun_from_training(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: float, *, goes_on: bool
):
    """torchrun's name of a job is "none", unless told: a stop of an earlier one is older than this one's agent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(StoppedError):
        train(tiny.recipe(), out=tmp_path / "run", stop_asked=after(3))
    stopped = (tmp_path / "run" / "outcome.json").stat().st_mtime
    monkeypatch.setattr("onehour.runs.process_began", lambda _: stopped + agent)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if goes_on:
        assert train(tiny.recipe(), out=tmp_path / "run").finished
    else:
        with pytest.raises(StoppedError, match="stopped after iteration 3"):
            train(tiny.recipe(), out=tmp_path / "run", stop_asked=never)


def test_another_recipe_is_refused_with_what_differs(tiny: ModuleType, copy: Path):
    before = (copy / "recipe.toml").read_bytes()
    with pytest.raises(ValueError, match="is a run of another recipe") as refused:
        train(tiny.recipe(seed=1, base_lr=0.3), out=copy, stop_asked=never)
    message = str(refused.value)
    assert "seed: 0 → 1" in message
    assert "base_lr: 0.1 → 0.3" in message
    assert "epochs" not in message
    assert "--fresh" in message
    assert (copy / "recipe.toml").read_bytes() == before


def test_a_folder_of_other_files_is_refused(tiny: ModuleType, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files and no recipe\.toml"):
        train(tiny.recipe(), out=tmp_path, stop_asked=never)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_model_under_the_same_name_is_refused(tiny: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny, "net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    with pytest.raises(ValueError, match="is of another model"):
        train(tiny.recipe(), out=copy, stop_asked=never)


def test_where_it_runs_may_change_between_two_halves(tiny: ModuleType, stopped: Path, tmp_path: Path):
    """Workers a pass, loaders and how often it saves are no part of the recipe."""
    recipe = tiny.recipe(precision="float64")
    whole = train(recipe, out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(recipe, out=tmp_path / "run", stop_asked=after(8), workers_per_pass=1)
    run = train(recipe, out=tmp_path / "run", workers_per_pass=2, save_every=1)
    assert [record["top1_error"] for record in run.metrics] == [record["top1_error"] for record in whole.metrics]
    assert run.metrics[-1]["val_loss"] == pytest.approx(whole.metrics[-1]["val_loss"], abs=1e-12)


def test_another_build_is_named_when_a_canonical_run_goes_on(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Its bits are promised for one build alone; never silently."""
    recipe = tiny.recipe(reduce="canonical")
    with pytest.raises(StoppedError):
        train(recipe, out=tmp_path / "run", stop_asked=after(3))
    monkeypatch.setattr("onehour.training.loop.build_of", lambda device: {**build_of(device), "torch": "9.9"})
    capsys.readouterr()
    train(recipe, out=tmp_path / "run")
    said = capsys.readouterr().out
    assert "warning: the bits may differ" in said
    assert "→ 9.9" in said


def test_a_run_is_not_resumed_where_labels_mean_other_classes(tiny: ModuleType, tmp_path: Path):
    def named(*classes: str) -> Any:
        sides = tiny.listed()
        for side in sides:
            side.classes = classes
        return sides

    options: dict[str, Any] = {"out": tmp_path / "run", "loaders": 0}
    with pytest.raises(StoppedError):
        train(tiny.recipe(), data=named("a", "b", "c"), stop_asked=after(2), **options)
    renamed = named("b", "c", "z")
    with pytest.raises(ValueError, match=r"class 0 of .*run was 'a' when it was trained, and in the data it is 'b'"):
        train(tiny.recipe(), data=renamed, **options)
    assert train(tiny.recipe(), data=named("a", "b", "c"), **options).finished
    with pytest.raises(ValueError, match=r"class 0 of .*run was 'a'"):
        train(tiny.recipe(epochs=3), data=renamed, continues=tmp_path / "run", out=tmp_path / "more", loaders=0)
    assert train(tiny.recipe(), data=renamed, fresh=True, **options).class_names == ["b", "c", "z"]
    recipe = Run(tmp_path / "run").recipe
    with pytest.raises(ValueError, match=r"class 0 of .*run was 'b' when it was trained, and in the data it is 'a'"):
        OpenedWeights(tmp_path / "run", recipe=recipe, data=named("a", "b", "c"))
