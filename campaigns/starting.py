"""What the campaigns on processes share: a run as a person starts it, its family of processes, what must be equal."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.ledger import OUT

__all__ = ["LOADED", "TRAIN", "Started", "emptied", "family", "ready", "state", "trainers", "undisturbed"]

TRAIN = [
    *("train", "digits", "--minibatch", "128", "--warmup-epochs", "1"),
    *("--threads", "1", "--device", "cpu", "--save-every", "8"),
]
LOADED = ("--data", "tinytask:listed_digits", "--classes", "10", "--loaders", "1")
"""Flags for half of the digits, from a loader process for each training process."""
HELPERS = Path(__file__).parents[1] / "tests" / "helpers"
PATIENCE = 300.0


@dataclass
class Started:
    """A command that was started, with what it says going to a file.

    Args:
        folder: the run's.
        flags: of `onehour train`.
    """

    folder: Path
    flags: tuple[str, ...]

    def __post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed at the end
        command = [sys.executable, "-m", "onehour", *TRAIN, *self.flags, "--out", str(self.folder)]
        every = os.environ | {"PYTHONPATH": str(HELPERS)}
        self.process = subprocess.Popen(command, env=every, stdout=self._log, stderr=self._log, start_new_session=True)
        self.since = time.monotonic()

    @property
    def pid(self) -> int:
        """Of the launcher, or of the only process."""
        return self.process.pid

    def wait(self, timeout: float = PATIENCE) -> int | None:
        """Its exit code; None if it runs still."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        """Both its streams, so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def left(self, seconds: float = 5.0) -> list[int]:
        """Its processes that are there still; they have some time to go."""
        ready(lambda: not self._of_folder(), seconds)
        return self._of_folder()

    def _of_folder(self) -> list[int]:
        text = str(self.folder).encode() + b"\0"
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if text in command_line(pid)]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what is left of it."""
        for pid in {self.pid, *self._of_folder()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


def ready(is_so: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Whether something becomes so in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def parents() -> dict[int, int]:
    """Every process of the machine, with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    found, parent_of = [pid], parents()
    for member in found:  # which grows
        found += [child for child, parent in parent_of.items() if parent == member]
    return found


def command_line(pid: int) -> bytes:
    """Of a process, without the -P that a launcher gives; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0-P\0", b"\0", 1)
    except OSError:
        return b""


def state(folder: Path) -> dict[str, str]:
    """What must be equal."""
    metrics = (folder / "metrics.jsonl").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    return {"state": summary["state_sha256"], "metrics": hashlib.sha256(metrics).hexdigest()}


def trainers(launcher: int) -> list[int]:
    """The training processes of a launcher, in the order in which they were started; itself if it has none."""
    command = command_line(launcher)
    found = [pid for pid, parent in parents().items() if parent == launcher and command_line(pid) == command]
    return sorted(found) or [launcher]


def undisturbed(name: str, *flags: str) -> tuple[dict[str, str], float]:
    """The state of a run that nothing disturbs, and the seconds that it takes; made once."""
    folder = OUT / "undisturbed" / name
    if not (folder / "seconds.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with Started(folder, flags) as run:
            if run.wait() != 0:
                raise AssertionError(run.said())
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - run.since))
    return state(folder), json.loads((folder / "seconds.json").read_text())


@contextmanager
def emptied(campaign: str) -> Iterator[Path]:
    """A folder for a case, beside the ledgers; nothing is in it, and it goes with the case."""
    folder = (OUT / f"{campaign}-{os.getpid()}").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
