"""A mount namespace: what is written in it is seen in it alone, whoever writes, and one folder is shared."""

import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onehour.check.run.namespace import enter

NOBODY = 65534


def in_child(action: Callable[[], Any], folder: Path) -> Any:
    """What an action gives, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            answer = action()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        (folder / "answer").write_text(json.dumps(answer))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads((folder / "answer").read_text())


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everyone can reach, with a folder for the run, and one of someone's files."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "run").mkdir()
        (place / "own, by:me").mkdir()
        (place / "own, by:me" / "notes.txt").write_text("old")
        yield place


def writes(place: Path) -> list[str]:
    """Enter, write in both folders, and say what was seen."""
    own = place / "own, by:me"
    assert any(f"{own}/".startswith(kept) for kept in enter(place / "run", [str(own)]))
    os.chdir(own)
    os.system("echo new > notes.txt; echo told > ../run/told; mkdir folder; rmdir folder; mkdir folder")
    return [(own / "notes.txt").read_text(), *sorted(os.listdir())]


SEEN = ["new\n", "folder", "notes.txt"]


def test_only_the_shared_folder_is_written_outside(place: Path):
    assert in_child(lambda: writes(place), place / "run") == SEEN
    assert [path.name for path in (place / "own, by:me").iterdir()] == ["notes.txt"]
    assert (place / "own, by:me" / "notes.txt").read_text() == "old"
    assert (place / "run" / "told").read_text() == "told\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; anyone else is one already")
def test_who_may_not_mount_has_a_namespace_of_users(place: Path):
    for path in (place, *place.rglob("*")):
        os.chown(path, NOBODY, NOBODY)

    def as_nobody() -> list[str]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as a program that this user has started
        seen = writes(place)
        with pytest.raises(PermissionError):  # as outside, whatever may be done in such a namespace
            os.mkdir("/onehour-test")
        os.chmod("notes.txt", 0o400)
        with pytest.raises(PermissionError):
            (place / "own, by:me" / "notes.txt").write_text("newer")
        return seen

    assert in_child(as_nobody, place / "run") == SEEN
    assert (place / "own, by:me" / "notes.txt").read_text() == "old"


def test_a_folder_that_cannot_be_kept_is_refused(place: Path):
    assert in_child(lambda: enter(place / "run", ["/dev/shm"]), place / "run") == "OSError: /dev/shm cannot be kept"
