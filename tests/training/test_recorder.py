"""A run whose folder is moved, removed or not shared writes nowhere else, says so once, and leaves what goes on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onehour.api import train
from onehour.dist.group import Group
from onehour.dist.launch import Processes, meeting_place
from onehour.dist.launched import LOOPBACK
from onehour.lock import FolderLostError, HeldFolder
from onehour.training.checkpoint import Checkpoints
from onehour.training.record import Run
from onehour.training.recorder import look_for_folder, take_folder

LAST = 12
"""Iterations of the tiny task."""


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny.recipe(), out=tmp_path_factory.mktemp("whole") / "run", save_every=2)


def at(iteration: int, act: Callable[[], object]) -> Callable[[], bool]:
    """Something that happens in the middle of an iteration, 1 being the first."""
    calls = iter(range(1, 1000))

    def stop() -> bool:
        if next(calls) == iteration:
            act()
        return False

    return stop


def state(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for those of the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def same(run: Run, whole: Run) -> bool:
    return run.summary["state_sha256"] == whole.summary["state_sha256"] and run.metrics == whole.metrics


@pytest.mark.parametrize("iteration", [1, 6, 9, LAST])
def test_a_moved_run_stops_is_saved_where_it_is_and_goes_on_there(
    tiny: ModuleType, whole: Run, tmp_path: Path, iteration: int
):
    out, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    with pytest.raises(FolderLostError) as lost:
        train(tiny.recipe(), out=out, save_every=2, stop_asked=at(iteration, lambda: out.rename(moved)))
    assert str(lost.value).startswith(f"{out} was moved to {moved} while it was being written; ")
    assert str(lost.value).endswith(f"; the same command with --out {moved} goes on")
    assert not out.exists()
    assert same(train(tiny.recipe(), out=moved, save_every=2), whole)


def test_where_it_is_saved_is_said(tiny: ModuleType, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(FolderLostError, match=r"; stopped after iteration 5, saved there; the same command"):
        train(tiny.recipe(), out=out, save_every=2, stop_asked=at(3, lambda: out.rename(tmp_path / "moved")))
    assert (tmp_path / "moved" / "checkpoints" / "iteration-000000005").is_dir()
    with pytest.raises(FolderLostError, match="; the run ended as finished; the same command"):
        train(tiny.recipe(), out=out, stop_asked=at(LAST, lambda: out.rename(tmp_path / "finished")))
    assert Run(tmp_path / "finished").finished


@pytest.mark.parametrize("iteration", [2, 6, LAST])
def test_not_a_byte_is_written_beside_its_successor(tiny: ModuleType, whole: Run, tmp_path: Path, iteration: int):
    """Somebody else's run has the name by then."""
    out, before = tmp_path / "run", dict[str, bytes]()

    def replace() -> None:
        out.rename(tmp_path / "moved")
        shutil.copytree(whole.folder, out)
        before.update(state(out))

    with pytest.raises(FolderLostError, match="was moved to"):
        train(tiny.recipe(), out=out, save_every=1, stop_asked=at(iteration, replace))
    assert state(out) == before


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("iteration", [1, 6, 7, LAST])
def test_a_removed_run_stops_at_the_next_write_and_is_not_begun_again(
    tiny: ModuleType, tmp_path: Path, iteration: int, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    with pytest.raises(FolderLostError) as lost:
        train(tiny.recipe(), out=out, save_every=2, stop_asked=at(iteration, lambda: shutil.rmtree(out)))
    assert str(lost.value).startswith(f"{out} was removed, or moved to another disk, while it was being written; ")
    assert "not saved; the same command goes on where --out names a copy of it, else begins anew" in str(lost.value)
    assert not out.exists()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert all("milestones" in line for line in warnings), "nothing else is wrong"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves that are on disk when the next iteration begins: nothing is written while something is removed."""
    save = Checkpoints.save

    def saved(self: Checkpoints, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", saved)


def remove_what_is_seen(out: Path) -> None:
    """As `rm -rf run/*` does."""
    for path in out.glob("[!.]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


PARTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the lock": (lambda out: (out / ".lock").unlink(), "/.lock was removed while "),
    "another lock": (lambda out: ((out / ".lock").unlink(), (out / ".lock").touch()), "another process may write it"),
    "the recipe": (lambda out: (out / "recipe.toml").unlink(), "/recipe.toml was removed while the run wrote"),
    "all but what is hidden": (remove_what_is_seen, "/recipe.toml was removed while the run wrote"),
}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_lost_a_part_of_its_folder_writes_there_no_more_and_the_same_command_goes_on(
    tiny: ModuleType, whole: Run, tmp_path: Path, part: str
):
    out, left = tmp_path / "run", list[list[str]]()
    act, said = PARTS[part]

    def remove() -> None:
        act(out)
        left.append(sorted(state(out)))

    with pytest.raises(FolderLostError, match=said):
        train(tiny.recipe(), out=out, stop_asked=at(8, remove))
    assert sorted(state(out)) == left[0]
    run = train(tiny.recipe(), out=out)
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]


def test_a_run_that_is_moved_back_in_time_goes_on(tiny: ModuleType, whole: Run, tmp_path: Path):
    out, moved = tmp_path / "run", tmp_path / "moved"

    def stop() -> bool:
        call = next(calls)
        if call == 2:
            out.rename(moved)
        elif call == 3:
            moved.rename(out)
        return False

    calls = iter(range(100))
    assert same(train(tiny.recipe(), out=out, stop_asked=stop), whole)


def test_a_trace_is_written_into_the_folder_wherever_it_is(tiny: ModuleType, tmp_path: Path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(FolderLostError, match="was moved to"):
        train(tiny.recipe(), out=out, profile=1, stop_asked=at(3, lambda: out.rename(moved)))
    assert (moved / "trace-0.json").is_file()
    assert not out.exists()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("flags", [[], ["--processes", "2", "--restarts", "2"]])
def test_all_processes_leave_with_one_message_and_are_not_started_anew(
    tiny: ModuleType, whole: Run, tmp_path: Path, environ: dict[str, str], flags: list[str]
):
    (tmp_path / "recipe.toml").write_text(tiny.recipe().to_toml())
    command = [sys.executable, "-m", "onehour", "train", "recipe.toml", "--trust", "--device", "cpu", *flags, "--out"]
    ended = subprocess.run(
        [*command, "run", "--log", "tinytask:Moving"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    (said,) = ended.stderr.splitlines()
    assert (ended.returncode, said.partition("; ")[0]) == (
        2,
        f"onehour: run was moved to {tmp_path}/run-moved while it was being written",
    )
    assert not (tmp_path / "run").exists()
    again = subprocess.run([*command, "run-moved"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert "resumes run-moved at iteration 7" in again.stdout
    assert [record["top1_error"] for record in Run(tmp_path / "run-moved").metrics] == [
        record["top1_error"] for record in whole.metrics
    ]


@pytest.fixture
def headless(tiny: ModuleType, tmp_path: Path, settled: None) -> Path:
    """A run that was stopped, and whose recipe.toml is gone."""
    out = tmp_path / "run"
    with pytest.raises(FolderLostError):
        train(tiny.recipe(), out=out, stop_asked=at(8, lambda: (out / "recipe.toml").unlink()))
    return out


def test_checkpoints_without_their_recipe_are_named_as_what_they_are(headless: Path, refused: Any):
    said = refused(["evaluate", str(headless)])
    assert said.startswith(f"{headless} is a run's folder that has lost its recipe.toml, with checkpoints up")
    assert "iteration-000000006; put it back, or give the train command that began it: it goes on from there" in said


def test_checkpoints_without_their_recipe_go_on_with_that_very_recipe_alone(
    tiny: ModuleType, whole: Run, headless: Path, capsys: pytest.CaptureFixture[str]
):
    before = state(headless)
    with pytest.raises(ValueError, match=r"run holds checkpoints of another recipe, and no recipe\.toml; choose anoth"):
        train(tiny.recipe(seed=1), out=headless)
    assert state(headless) == before
    capsys.readouterr()
    assert same(train(tiny.recipe(), out=headless), whole)
    said = capsys.readouterr().out
    assert f"warning: {headless} had lost its recipe.toml: written again, as its checkpoints are of this recipe" in said


def test_a_record_without_its_recipe_goes_on_with_that_very_recipe_alone(tiny: ModuleType, whole: Run, tmp_path: Path):
    """What an earlier version left where the power went before its first checkpoint."""
    head = {"recipe": whole.recipe.as_dict()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(head) + "\n")
    with pytest.raises(ValueError, match=r"holds other files and no recipe\.toml"):
        train(tiny.recipe(seed=1), out=tmp_path)
    assert same(train(tiny.recipe(), out=tmp_path), whole)


def test_a_run_that_another_process_ended_meanwhile_is_not_written_again(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def waited(folder: Path) -> HeldFolder:
        shutil.copytree(whole.folder, folder)
        return HeldFolder(folder)

    monkeypatch.setattr("onehour.training.recorder.HeldFolder", waited)
    with pytest.raises(ValueError, match=r"another process has just trained .*run to its end; the same command"):
        take_folder(tmp_path / "run", whole.recipe, warn=print)
    assert state(tmp_path / "run") == state(whole.folder)
    HeldFolder(tmp_path / "run", patience=0).release()  # it was let go


LOOKS = """
import os, socket, sys
from pathlib import Path
from onehour.dist.group import joined
from onehour.training.recorder import look_for_folder
socket.gethostname = lambda: f"host{os.environ['RANK']}"
folder = Path(os.environ["FOLDER"])
with joined("cpu") as group:
    found = "seen"
    try:
        look_for_folder(folder, group, patience=float(os.environ["PATIENCE"]))
    except ValueError as error:
        found = f"refused: {error}"
    Path(os.environ["OUT"], f"{group.rank}").write_text(found)
os._exit(0)
"""


def looked(out: Path, folders: list[Path], patience: float = 0.3) -> list[str]:
    """What each process finds, where process r sees folders[r] under the run's name."""
    with meeting_place(0) as port:
        shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(folders)), "OUT": str(out)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "PATIENCE": str(patience)}
        environs = [
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "FOLDER": str(folder)}
            for rank, folder in enumerate(folders)
        ]
        assert Processes([sys.executable, "-c", LOOKS], environs).wait() is None
    return [(out / str(rank)).read_text() for rank in range(len(folders))]


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Two folders, as two hosts have them under one name."""
    for name in "ab":
        (tmp_path / name).mkdir()
    return [tmp_path / "a", tmp_path / "b"]


def test_alone_there_is_nothing_to_look_for(tmp_path: Path):
    look_for_folder(tmp_path, Group())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("forked")
def test_a_folder_that_all_see_leaves_no_trace(tmp_path: Path, places: list[Path]):
    (places[0] / ".seen-by-a-killed-one").touch()
    assert looked(tmp_path, [places[0]] * 2) == ["seen", "seen"]
    assert list(places[0].iterdir()) == []


@pytest.mark.usefixtures("forked")
def test_one_that_a_host_does_not_see_is_refused_with_both_hosts(tmp_path: Path, places: list[Path]):
    found = looked(tmp_path, [places[0], places[1] / "nowhere"])
    assert all(text.startswith("refused: ") for text in found)
    assert "is not shared: process 1 on host1 does not see what process 0 on host0 writes there; give --out" in found[0]
    assert found[0].partition(" is not ")[2] == found[1].partition(" is not ")[2]
    assert list(places[0].iterdir()) == []


@pytest.mark.usefixtures("forked")
def test_a_slow_file_system_is_waited_for(tmp_path: Path, places: list[Path]):
    """A second sees what the first has written a second later, as over a network."""
    copying = (
        f"until ls {places[0]}/.seen-* 2> /dev/null; do sleep 0.05; done; sleep 1; cp {places[0]}/.seen-* {places[1]}"
    )
    copier = subprocess.Popen(["sh", "-c", copying], stdout=subprocess.DEVNULL, env=os.environ)
    assert looked(tmp_path, places, patience=20.0) == ["seen", "seen"]
    copier.wait(timeout=300)
