"""Every file operation of a save fails in turn, and a disk is really full: a verified checkpoint stays, one warning.

    python -m campaigns.disk [--only NAME]

ENOSPC, EDQUOT and EIO at each operation, once or from there on, in four situations: the first save of a run, one that
thins, the same iteration again, and one that finds what a killed process left. The same for a report that replaces
another one. Then saves on a tmpfs with too little room; where none may be mounted, under a limit of the size of files
(RLIMIT_FSIZE), which is said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from campaigns.ledger import run
from campaigns.writer import RECIPE, digest, expected, fill, fresh, progress_of
from onehour.dist.group import Group
from onehour.study import report as report_room
from onehour.training.checkpoint import Checkpoints
from onehour.training.state import Network

CAMPAIGN = "disk: faults"
REPORTS = "disk: reports"
FULL = "disk: full"
ERRNOS = {"ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EIO": errno.EIO}
OPERATIONS = (
    *("open", "write", "fsync", "close", "mkdir", "rename", "link", "unlink", "rmdir"),
    *("stat", "lstat", "listdir", "scandir"),
)
WIDTH = 24
QUICK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where faults are made up, a disk need not be waited for."""
Prepare = Callable[[Path], int]


class Faults:
    """Counts the file operations below a folder, and lets the i-th fail.

    Args:
        folder: others are let through.
        at: which one, from 0; None for none.
        number: the errno.
        lasting: all from there on that need what is lacking: room for ENOSPC and EDQUOT, the disk itself for EIO.
    """

    GROWING = ("write", "mkdir", "fsync", "create", "link")

    def __init__(self, folder: Path, at: int | None = None, number: int = errno.EIO, *, lasting: bool = False) -> None:
        self.folder, self.at, self.number, self.lasting = str(folder), at, number, lasting
        self.seen: list[str] = []
        self._opened: set[int] = set()

    def fails(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Whether this operation does."""
        kind = "create" if name == "open" and arguments[1] & os.O_CREAT else name
        self.seen.append(kind)
        place = len(self.seen) - 1
        if self.at is None or place < self.at:
            return False
        later = self.lasting and (self.number == errno.EIO or kind in self.GROWING)
        return place == self.at or later

    @contextmanager
    def active(self) -> Iterator[Faults]:
        """While this lasts."""
        with contextlib.ExitStack() as stack:
            for name in OPERATIONS:
                stack.enter_context(mock.patch.object(os, name, self._around(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "dup", self._doubled(os.dup)))
            yield self

    def _doubled(self, real: Callable[[int], int]) -> Callable[[int], int]:
        """A second descriptor is followed as the first is."""

        def dup(descriptor: int) -> int:
            made = real(descriptor)
            if descriptor in self._opened:
                self._opened.add(made)
            return made

        return dup

    def _is_ours(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        held = options.get("dir_fd", options.get("src_dir_fd"))
        if held is not None:
            return held in self._opened
        place = arguments[0] if arguments else "."
        return place in self._opened if isinstance(place, int) else os.fsdecode(place).startswith(self.folder)

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if not self._is_ours(arguments, options):
                return real(*arguments, **options)
            if not self.fails(name, arguments):
                returned = real(*arguments, **options)
                if name == "open":
                    self._opened.add(returned)
                elif name == "close":
                    self._opened.discard(arguments[0])
                return returned
            if name == "write":  # half of it is there, as on a disk that fills
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if name == "close":
                real(*arguments)
            raise OSError(self.number, os.strerror(self.number), str(arguments[0]))

        return operation


def save(checkpoints: Checkpoints, iteration: int) -> bool:
    """One save, as a run does it; whether it is on disk."""
    model, optimizer = fresh(WIDTH)
    fill(model, optimizer, iteration)
    network = Network(model, optimizer)
    checkpoints.save(network, progress_of(iteration))
    network.finish_copy()
    return checkpoints.wait()


def opened(folder: Path, said: list[str]) -> Checkpoints:
    """A run's checkpoints."""
    return Checkpoints(folder, RECIPE, Group(), warn=said.append)


def found(folder: Path) -> tuple[int, str]:
    """The iteration that the next start loads, 0 for none, and what is wrong with that start."""
    said: list[str] = []
    model, optimizer = fresh(WIDTH)
    checkpoints = opened(folder, said)
    progress = checkpoints.load(Network(model, optimizer))
    iteration = progress["iteration"] if progress else 0
    names = os.listdir(checkpoints.store.folder) if checkpoints.store.folder.exists() else []
    # What a start passes over, and warns of, stays aside until its iteration is saved again.
    if any(not name.startswith(("iteration-", ".damaged-") if said else "iteration-") for name in names):
        return iteration, f"left over: {sorted(names)}"
    if iteration and (digest(model, optimizer) != expected(iteration, WIDTH) or progress != progress_of(iteration)):
        return iteration, f"iteration {iteration} is not what was saved"
    return iteration, f"warned: {said}" if said else ""


def first(folder: Path) -> int:
    """A run's first save."""
    folder.mkdir(parents=True)
    return 0


def thinning(folder: Path) -> int:
    """A save that drops an older one."""
    checkpoints = opened(folder, [])
    for iteration in (1, 2):
        assert save(checkpoints, iteration)
    checkpoints.close()
    return 2


def again(folder: Path) -> int:
    """The iteration is there already, damaged."""
    thinning(folder)
    assert save(opened(folder, []), 3)
    (folder / "checkpoints" / "iteration-000000003" / "progress.json").write_text("{}")
    return 2


def leftover(folder: Path) -> int:
    """A killed process left two folders."""
    thinning(folder)
    newest = folder / "checkpoints" / "iteration-000000002"
    for prefix in (".writing-", ".dropping-"):
        shutil.copytree(newest, newest.with_name(f"{prefix}iteration-000000009"))
    return 2


SITUATIONS: dict[str, Prepare] = {"first": first, "thinning": thinning, "again": again, "leftover": leftover}


@cache
def operations(situation: str) -> tuple[str, ...]:
    """Every file operation of the save of iteration 3."""
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(name) / "run"
        SITUATIONS[situation](folder)
        checkpoints = opened(folder, [])
        with Faults(folder).active() as faults:
            assert save(checkpoints, 3)
        return tuple(faults.seen)


def cases() -> list[tuple[str, str, bool, int]]:
    """(situation, errno, lasting, which operation) of all of them."""
    kinds = product(SITUATIONS, ERRNOS, (False, True))
    return [(*kind, at) for kind in kinds for at in range(len(operations(kind[0])))]


def faulty(situation: str, name: str, lasting: bool, at: int) -> tuple[str, str]:
    """What is wrong after a save in which an operation failed, empty if nothing, and which operation that was."""
    with tempfile.TemporaryDirectory(dir=QUICK) as place:
        folder = Path(place) / "run"
        before = SITUATIONS[situation](folder)
        said: list[str] = []
        checkpoints = opened(folder, said)
        with Faults(folder, at, ERRNOS[name], lasting=lasting).active() as faults:
            saved = save(checkpoints, 3)
        known = ["iteration-000000003: progress.json has 2 bytes"] if situation == "again" and not saved else []
        return judged(folder, checkpoints, said, before, saved, os.strerror(ERRNOS[name]), known), (
            *faults.seen,
            *["not reached"] * at,
        )[at]


@dataclass(frozen=True)
class Drawn:
    """A picture that took no time."""

    name: str
    content: bytes

    def files(self) -> dict[str, bytes]:
        """As a picture's."""
        return {f"{self.name}.svg": self.content}


def write_drawn(folder: Path, kind: str, names: tuple[str, ...]) -> None:
    """Report a curve, with a page and pictures that say nothing else than `kind`."""
    curve = folder.with_name("a.csv")
    curve.write_text("epoch,error\n1,50\n2,40\n")
    drawn = (f"{report_room.MARKS[report_room.PAGE]} {kind}", [Drawn(name, kind.encode()) for name in names])
    with mock.patch.object(report_room, "render", return_value=drawn):
        report_room.write_report([curve], folder)


OLD_REPORT, NEW_REPORT = ("old", ("curves", "error-against-time")), ("new", ("curves", "arms-at-64"))


def written_files(folder: Path) -> dict[str, bytes]:
    """What a report shows, without what a killed or failed command has left aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / ".writing")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def reported(name: str | None, lasting: bool, at: int | None) -> tuple[str, tuple[str, ...]]:
    """What is wrong after a report in which an operation failed, empty if nothing; and all its operations."""
    with tempfile.TemporaryDirectory(dir=QUICK) as place:
        folder, other = Path(place) / "report", Path(place) / "other"
        write_drawn(other, *NEW_REPORT)
        write_drawn(folder, *OLD_REPORT)
        old, new = written_files(folder), written_files(other)
        said, number = "", ERRNOS[name] if name else 0
        with Faults(folder, at, number, lasting=lasting).active() as faults:
            try:
                write_drawn(folder, *NEW_REPORT)
            except (ValueError, OSError) as error:
                said = str(error)
        found, seen = written_files(folder), tuple(faults.seen)
        if said and os.strerror(number) not in said:
            return f"said {said}", seen
        dead = lasting and number == errno.EIO  # a disk on which nothing works puts nothing back; each file is whole
        if found not in ((old, new) if said else (new,)) and not dead:
            return f"said {said!r}, and holds {sorted(found)}", seen
        if dead and any(content not in (old.get(file), new.get(file)) for file, content in found.items()):
            return "a file is not whole", seen
        write_drawn(folder, *NEW_REPORT)
        left = sorted(path.name for path in folder.iterdir())
        again = written_files(folder) == new and left == sorted(path.name for path in other.iterdir())
        return "" if again else f"the next report leaves {left}", seen


def judged(
    folder: Path, checkpoints: Checkpoints, said: list[str], before: int, saved: bool, reason: str, known: list[str]
) -> str:
    """What is wrong after a save that may have failed; empty if nothing.

    Args:
        before: the iteration that was saved before it.
        known: what the next start may warn of, since it was damaged before.
    """
    warned = [text for text in said if str(folder) in text and "bytes are needed" in text and reason in text]
    if (len(warned), len(said)) != ((0, 0) if saved else (1, 1)):
        return f"saved {saved}, and warned {said}"
    iteration, wrong = found(folder)
    if wrong and not (known and known[0] in wrong):
        return wrong
    if iteration not in ((3,) if saved else (before, 3)):
        return f"saved {saved}, {before} was there before, and {iteration} is found"
    if not save(checkpoints, 4) or found(folder) != (4, ""):
        return f"the next save is not found: {found(folder)}"
    return ""


@contextmanager
def small_disk(size: int) -> Iterator[Path | None]:
    """A tmpfs of so many bytes; None where none may be mounted."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        try:
            mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
        except OSError:
            mounted = False
        try:
            yield Path(place) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", place], check=True)


def ballast(folder: Path, left: int) -> Path:
    """Fill a disk but for `left` bytes; the file that does."""
    path = folder / "ballast"
    free = shutil.disk_usage(folder).free - left
    path.write_bytes(bytes(max(0, free)))
    return path


def filled(case: int) -> tuple[str, str]:
    """What is wrong after a save for which there is a random part of the room, empty if nothing; and where."""
    draw = random.Random(f"{FULL} {case}")
    share = draw.uniform(0, 1.1)
    with small_disk(2**20) as place, tempfile.TemporaryDirectory() as other:
        folder = (place or Path(other)) / "run"
        before = thinning(folder)
        said: list[str] = []
        checkpoints = opened(folder, said)
        needed = sum(path.stat().st_size for path in folder.rglob("iteration-000000002/*"))
        if place is None:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * needed / 2), limits[1]))
            saved = save(checkpoints, 3)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return judged(folder, checkpoints, said, before, saved, os.strerror(errno.EFBIG), []), "RLIMIT_FSIZE"
        file = ballast(place, int(share * (needed + 6 * 4096)))
        saved = save(checkpoints, 3)
        file.unlink()
        return judged(folder, checkpoints, said, before, saved, os.strerror(errno.ENOSPC), []), "tmpfs"


def told(said: str, kind: str, **about: Any) -> dict[str, Any]:
    """A case, for the ledger."""
    return {"ok": not said, "said": f"{about}: {said}" if said and about else said, "kind": kind, **about}


def save_case(situation: str, name: str, lasting: bool, at: int) -> dict[str, Any]:
    """A save in which an operation fails."""
    said, operation = faulty(situation, name, lasting, at)
    return told(said, operation, situation=situation, errno=name, lasting=lasting, at=at, operation=operation)


def report_case(name: str, lasting: bool, at: int) -> dict[str, Any]:
    """A report in which an operation fails."""
    said, seen = reported(name, lasting, at)
    return told(said, seen[at], errno=name, lasting=lasting, at=at, operation=seen[at])


def everything() -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    """All saves, all reports, and a hundred full disks."""
    for case, about in enumerate(cases()):
        yield CAMPAIGN, case, partial(save_case, *about)
    places = range(len(reported(None, False, None)[1]))
    for case, about in enumerate(product(ERRNOS, (False, True), places)):
        yield REPORTS, case, partial(report_case, *about)
    for case in range(100):
        yield FULL, case, lambda case=case: told(*filled(case))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run("disk", everything()))
