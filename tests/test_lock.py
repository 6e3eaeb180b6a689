"""Two processes never write one folder, and the lock of a killed one is nobody's."""

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from onehour import Recipe
from onehour.lock import FolderLostError, HeldFolder
from onehour.training.record import move_aside
from onehour.training.recorder import take_folder

HEAD = "import sys, time; from pathlib import Path; from onehour.lock import HeldFolder;"
HOLD = f"{HEAD} lock = HeldFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
TRY = f"{HEAD} HeldFolder(Path(sys.argv[1]), patience=0.2)"
TAKEN = "is being written by another process"


@contextmanager
def holder(folder: Path, code: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a folder, until it is killed."""
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def refused(folder: Path) -> str:
    """What another process that wants the folder says."""
    return subprocess.run([sys.executable, "-c", TRY, str(folder)], stderr=subprocess.PIPE, text=True).stderr


def test_a_second_process_is_refused_and_told_who_holds_it_until_that_is_killed(tmp_path: Path):
    with holder(tmp_path) as process, pytest.raises(ValueError, match=rf"{TAKEN} \(process {process.pid} on"):
        HeldFolder(tmp_path, patience=0.2)
    HeldFolder(tmp_path, patience=0).release()


def test_a_folder_that_was_moved_aside_while_its_lock_was_waited_for_is_locked_under_its_name(tmp_path: Path):
    """The file that was opened first is another folder's then."""
    folder = tmp_path / "run"
    locks: list[HeldFolder] = []
    waiting = threading.Thread(target=lambda: locks.append(HeldFolder(folder)))
    with holder(folder):
        waiting.start()
        time.sleep(0.3)
        folder.rename(tmp_path / "run.1")
    waiting.join(300)
    assert f"{TAKEN} (process {os.getpid()} on" in refused(folder)
    locks[0].release()


def test_a_file_system_without_locks_is_one_message_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", refuses)
    monkeypatch.setattr("onehour.lock.time.sleep", pytest.fail)
    with pytest.raises(
        ValueError, match=r"\.lock cannot be locked: No locks available; give --out on a file system that"
    ):
        HeldFolder(tmp_path)


def test_a_folder_that_became_another_recipes_while_its_lock_was_waited_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def waited(folder: Path) -> HeldFolder:
        monkeypatch.undo()
        take_folder(folder, Recipe(seed=1), warn=print).release()
        return HeldFolder(folder)

    monkeypatch.setattr("onehour.training.recorder.HeldFolder", waited)
    with pytest.raises(ValueError, match=r"another recipe \(seed: 1 → 0\)"):
        take_folder(tmp_path, Recipe(), warn=print)
    assert Recipe.from_toml(tmp_path / "recipe.toml").seed == 1
    HeldFolder(tmp_path, patience=0).release()  # it was let go


def test_a_folder_that_is_being_written_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its process would go on writing under the name that the new run has then: two writers."""
    defaults = HeldFolder.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "patience", 0.2)
    folder = tmp_path / "run"
    with holder(folder):
        with pytest.raises(ValueError, match=TAKEN):
            move_aside(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert move_aside(folder) == tmp_path / "run.1"


def test_a_reader_that_closes_the_lock_does_not_drop_it(tmp_path: Path):
    """A logger that copies the folder, for one."""
    with HeldFolder(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        os.close(os.open(tmp_path / "run" / ".lock", os.O_RDWR))
        with pytest.raises(ValueError, match=TAKEN):
            HeldFolder(tmp_path / "run", patience=0)
        assert TAKEN in refused(tmp_path / "run")


LIVES = """
import ctypes, multiprocessing, os, subprocess, sys, threading, time
from pathlib import Path
from onehour.lock import HeldFolder

def sleep():
    time.sleep(60)

def forked():
    child = os.fork()
    if child == 0:
        sleep()
    return child

def processed(method):
    process = multiprocessing.get_context(method).Process(target=sleep)
    process.start()
    return process.pid

def called():
    return int(os.popen("sleep 60 >/dev/null 2>&1 & echo $!").read())

CHILDREN = {
    "a program with all descriptors": lambda: subprocess.Popen(["sleep", "60"], close_fds=False).pid,
    "a program that the C library starts": lambda: os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ),
    "a program of a shell": called,
    "a fork": forked,
    "multiprocessing's fork": lambda: processed("fork"),
    "multiprocessing's spawn": lambda: processed("spawn"),
}
if __name__ == "__main__":
    held = HeldFolder(Path(sys.argv[2]))
    print(CHILDREN[sys.argv[1]](), flush=True)
    time.sleep(60)
"""
KINDS = [line.split('"')[1] for line in LIVES.splitlines() if line.startswith('    "')]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lock_of_a_killed_holder_is_free_at_once_though_a_child_of_it_lives(tmp_path: Path, kind: str):
    (tmp_path / "lives.py").write_text(LIVES)
    command = [sys.executable, str(tmp_path / "lives.py"), kind, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(ValueError, match=TAKEN):
            HeldFolder(tmp_path / "run", patience=0)
        os.kill(child, 0)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        try:
            # A child that has not had a turn since its start lets go in its first one.
            HeldFolder(tmp_path / "run", patience=5).release()
            os.kill(child, 0)  # it lived all the time
        finally:
            os.kill(child, 9)


def test_nobody_forks_a_lock_that_is_just_being_taken(tmp_path: Path):
    """Children forked while another thread takes locks have none of them."""
    ended = threading.Event()
    children: list[int] = []

    def fork() -> None:
        while not ended.is_set() and len(children) < 10:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        for number in range(40):
            folder = tmp_path / str(number % 7)
            HeldFolder(folder, patience=0).release()
        ended.set()
        thread.join()
        assert children
        for number in range(7):
            HeldFolder(tmp_path / str(number), patience=0).release()
    finally:
        ended.set()
        thread.join()
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)


@pytest.mark.usefixtures("forked")
def test_one_that_was_handed_to_a_process_lasts_as_long_as_that(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with HeldFolder(tmp_path / "run", patience=0) as held:
        process = context.Process(target=keep, args=(held, theirs))
        process.start()
        theirs.close()  # so that its end is heard
        assert ours.recv() == tmp_path / "run"
    with pytest.raises(ValueError, match=TAKEN):
        HeldFolder(tmp_path / "run", patience=0)
    ours.send("end")
    process.join()
    HeldFolder(tmp_path / "run", patience=0).release()


def keep(held: HeldFolder, connection: Any) -> None:
    """What the spawned process does; a program that it starts does not have the lock."""
    held.check()
    with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
        connection.send(held.path)
        connection.recv()
        held.release()
        HeldFolder(held.path, patience=0).release()
        program.kill()


def test_an_earlier_versions_lock_excludes_this_one_and_the_other_way_round(tmp_path: Path):
    earlier = "import fcntl, os, sys, time; file = os.open(sys.argv[1] + '/.lock', os.O_RDWR | os.O_CREAT);"
    earlier += "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print('held', flush=True); time.sleep(60)"
    with holder(tmp_path, earlier), pytest.raises(ValueError, match=TAKEN):
        HeldFolder(tmp_path, patience=0)
    with HeldFolder(tmp_path):
        done = subprocess.run([sys.executable, "-c", earlier, str(tmp_path)], capture_output=True, text=True)
        assert "BlockingIOError" in done.stderr


def test_of_twenty_at_once_one_holds_and_the_others_are_told_once(tmp_path: Path):
    code = f"{TRY.replace('0.2', '0.0')}; print('held', flush=True); sys.stdin.read()"
    code = code.replace("HeldFolder(Path", "held = HeldFolder(Path")
    command = [sys.executable, "-c", code, str(tmp_path / "a" / "run")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(20)]
    ended = [process for process in processes if process.stdout is not None and not process.stdout.readline()]
    assert len(ended) == 19
    for process in processes:
        _, said = process.communicate("")
        assert said.count(TAKEN) == (process in ended)


def lost(held: HeldFolder) -> str:
    with pytest.raises(FolderLostError) as error:
        held.check()
    return str(error.value)


def test_a_holder_notices_what_becomes_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a b")
    with HeldFolder(run) as held:
        held.check()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        held.check()  # a name that was relative to where it began
        monkeypatch.chdir(tmp_path)
        Path("runs").rename("old")  # a folder above it
        now = f"{tmp_path}/old/a b"
        assert lost(held) == (
            f"runs/a b was moved to {now} while it was being written; the same command with --out '{now}' goes on"
        )
        run.mkdir(parents=True)  # another has its name
        assert lost(held).startswith(f"runs/a b was moved to {now} while")
        (held.inside / "mine").touch()
        assert (Path(now) / "mine").exists()
        assert not list(run.iterdir())
        run.rmdir()
        run.symlink_to(now)  # its name leads to it again
        held.check()
        run.unlink()
        shutil.rmtree(now)
        assert lost(held).startswith("runs/a b was removed, or moved to another disk, while it was being written; ")
        with pytest.raises(FileNotFoundError):
            (held.inside / "mine").touch()


def test_a_holder_notices_that_its_lock_guards_nothing_any_more(tmp_path: Path):
    with HeldFolder(tmp_path) as held:
        (tmp_path / ".lock").unlink()
        assert "/.lock was removed while" in lost(held)
        with HeldFolder(tmp_path, patience=0) as other:
            other.check()
            assert "another process may write it; the same command goes on from what was saved before" in lost(held)


def test_a_disk_that_does_not_answer_takes_no_folder_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def silent(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    with HeldFolder(tmp_path) as held:
        monkeypatch.setattr(os, "stat", silent)
        held.check()
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path: Path, kind: str):
    place, other = tmp_path / "run" / ".lock", tmp_path / "other"
    place.parent.mkdir()
    other.write_text("precious")
    {"link": lambda: place.symlink_to(other), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    with pytest.raises((ValueError, IsADirectoryError)):
        HeldFolder(place.parent, patience=0)
    assert other.read_text() == "precious"
