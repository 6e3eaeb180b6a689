"""Hostile files in every place where a file is read: nothing is executed, nothing written elsewhere, one message.

    python tests/faults/hostile.py [--only NAME]

Each case makes its files in a folder of its own and runs a command in it, in a process that notes every file that it
opens for writing and every command that it starts. The command must leave with 2 and say one line that a terminal can
print; what lies outside of the run's folder must be as it was. The cases are in hostile_cases.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from onehour.cli import main as onehour
from onehour.study import picture

sys.path.insert(0, str(Path(__file__).parent))
import hostile_data  # noqa: F401 - adds its cases
import hostile_folders  # noqa: F401
from hostile_cases import CASES, base_run
from summary import OUT, add, lines, report

CAMPAIGN = "hostile"
SECONDS = 60
MEMORY = 16 * 2**30
"""Bytes of address space: what a bomb may take before it fails."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "pickle.find_class")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: its exit code; None if it was still running.
        said: standard error.
        printed: standard output.
        events: what it did that a command on a hostile file must not do.
    """

    code: int | None
    said: str
    printed: str
    events: list[str]


def run(arguments: list[str], here: Path, allowed: Path) -> Outcome:
    """A command in a process of its own, forked, since importing torch takes 2 s.

    Args:
        here: where it runs.
        allowed: the one folder that it may write into.
    """
    files = {name: here.parent / f"{here.name}.{name}" for name in ("said", "printed", "events")}
    child = os.fork()
    if child == 0:
        _act(arguments, here, allowed, files)
    code, until = None, time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in files.items()}
    return Outcome(code, texts["said"], texts["printed"], texts["events"].splitlines())


def _act(arguments: list[str], here: Path, allowed: Path, files: dict[str, Path]) -> NoReturn:
    for number, name in ((1, "printed"), (2, "said")):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    events = os.open(files["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.chdir(here)
    os.environ["MPLCONFIGDIR"] = str(allowed)  # it makes folders in one's home else
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.open = _opening(os.open)
    sys.addaudithook(lambda event, about: _note(event, about, allowed.resolve(), events))
    picture.FORMATS = ("svg",)  # the others take a report's time, and are written in the same way
    code = 1
    try:
        code = onehour(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note(event: str, about: tuple[Any, ...], allowed: Path, events: int) -> None:
    place: Any = about
    if event == "open" and isinstance(about[2], int) and about[2] & WRITES:
        if isinstance(about[0], int):  # an open file, which was noted when it was opened
            return
        place = _place(_within(OPENING[-1], about[0]), follow=not about[2] & os.O_NOFOLLOW)
    elif event in CHANGES and not isinstance(about[0], int):
        place = _place(_within(_folder_of(event, about), about[0]), follow=False)
    elif event not in STARTS or (event == "pickle.find_class" and str(about[0]).startswith("onehour.")):
        return  # a look in a process of its own answers with our own classes
    if isinstance(place, Path) and (place.is_relative_to(allowed) or place.is_relative_to("/dev")):
        return
    os.write(events, f"{event} {place}\n".encode("utf-8", "backslashreplace"))


OPENING = [-1]
"""The folder that os.open is given, which Python tells no hook."""


def _opening(real: Callable[..., int]) -> Callable[..., int]:
    def opened(*arguments: Any, dir_fd: int | None = None, **options: Any) -> int:
        OPENING.append(-1 if dir_fd is None else dir_fd)
        try:
            return real(*arguments, dir_fd=dir_fd, **options)
        finally:
            OPENING.pop()

    return opened


def _folder_of(event: str, about: tuple[Any, ...]) -> int:
    """The folder, held open, that a changed name is in; -1 for the current one."""
    return {"os.rename": about[-2], "os.link": about[-2], "os.truncate": -1}.get(event, about[-1])


def _within(folder: int, name: Any) -> str:
    return os.path.join(f"/proc/self/fd/{folder}" if folder >= 0 else "", os.fsdecode(name))


def _place(path: str, *, follow: bool) -> Path:
    """Where a path leads; of a link that is not followed, where it lies."""
    if follow:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(os.path.dirname(path))) / os.path.basename(path)


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its bytes or, of a large or odd one, its size and time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        plain = path.is_file() and not path.is_symlink() and status.st_size < 2**20
        found[str(path)] = path.read_bytes() if plain else (status.st_mode, status.st_size)
    return found


def attempt(name: str, base: Path, place: Path) -> str:
    """Run a case in an empty folder; what is wrong, empty if nothing.

    The folder holds `here`, where the command runs, and in it `run`, the only folder that it may write into.
    """
    here, outside = place / "here", place / "outside"
    outside.mkdir(parents=True)
    here.mkdir()
    (outside / "precious").write_text("mine")
    case = CASES[name]
    if case.needs_run:
        shutil.copytree(base, here / "run")
    arguments = case.make(here)
    before = contents(outside) | {path: found for path, found in contents(here).items() if not _is_runs(path, here)}
    outcome = run(arguments, here, here / "run")
    after = contents(outside) | {path: found for path, found in contents(here).items() if not _is_runs(path, here)}
    said = [line for line in outcome.said.splitlines() if line]
    checks = {
        "executed": any(place.rglob("executed")),
        f"left with {outcome.code}, not {case.code}": outcome.code != case.code,
        f"said {len(said)} lines": len(said) != (1 if case.code else 0),
        "no message of ours": any(not line.startswith("onehour: ") for line in said),
        "cannot be printed": not all(line.isprintable() for line in [*said, *outcome.printed.splitlines()]),
        f"did {outcome.events[:3]}": bool(outcome.events),
        "changed files elsewhere": before != after,
    }
    wrong = [text for text, holds in checks.items() if holds]
    return f"{', '.join(wrong)}: {outcome.said[-600:]}" if wrong else ""


def _is_runs(path: str, here: Path) -> bool:
    return Path(path).is_relative_to(here / "run")


def main() -> int:
    """Run what is missing; 1 if any case failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ledger = OUT / f"{CAMPAIGN}.jsonl"
    done = {entry["case"] for entry in lines(ledger) if entry["ok"]}
    with tempfile.TemporaryDirectory() as name:
        base = base_run(Path(name) / "base")
        for number, case in enumerate(CASES):
            if options.only in case and (case not in done or options.only):
                wrong = attempt(case, base, Path(name) / str(number))
                add(ledger, CAMPAIGN, case, ok=not wrong, said=wrong)
    return report(ledger)


if __name__ == "__main__":
    sys.exit(main())
