"""Someone's script, unedited, in this process: observed, stopped when all was seen, its tape written to a folder."""

from __future__ import annotations

import json
import multiprocessing.process
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from onehour.check.observe import Observers
from onehour.check.observe.passes import MOST_UPDATES, following_enumerate
from onehour.check.observe.recorder import Patches, TapeRecorder
from onehour.check.observe.source import SCRIPT_FOLDERS, is_users, user_line
from onehour.check.run.failures import gpu_hint, in_a_line, place
from onehour.check.run.isolate import Isolation
from onehour.check.run.overlay import Overlay
from onehour.check.run.services import switch_off
from onehour.check.tape import ProcessStarted

SEEN_EPOCHS = 2
LATE = 0.85
"""The share of its time after which a run ends by itself."""
PATIENCE = 10.0
"""Seconds that a process waits for the others to come to their end."""
SECONDS_OF_UPDATES = 20.0
"""Of CPU after the first update; a run that is not at the end of its epochs then, or after MOST_UPDATES, is stopped."""
_LAUNCHERS = re.compile(r"(?:python|torchrun|accelerate|deepspeed|mpirun|horovodrun)[\d.]*$")


class _ScriptRun:
    """One script's run in this process, which it leaves for good."""

    def __init__(self, folder: Path, rank: int, processes: int, limit: float) -> None:
        self.folder, self.rank, self.processes, self.limit = folder, rank, processes, limit
        self.recorder = TapeRecorder(deep_updates=64, cut=True)
        self.recorder.rank = rank
        self.observers = Observers(self.recorder)
        self.patches = Patches()
        self.first_update = 0.0
        self.left = threading.Lock()
        self.main = threading.get_ident()

    def start(self, script: Path, kept: list[str]) -> None:
        self.observers.install()
        # A script's own processes are not observed: their tapes would mix with this one.
        os.register_at_fork(after_in_child=lambda: setattr(self.recorder, "finished", True))
        self.patches.around(multiprocessing.process.BaseProcess, "start", self._started)
        self.patches.around(subprocess.Popen, "__init__", self._called)
        self.patches.around(torch.distributed, "destroy_process_group", self._parted)
        timer = threading.Timer(LATE * self.limit, self.late)
        timer.daemon = True
        timer.start()
        switch_off(self.folder / "mlflow")
        home = [os.getcwd(), str(script.parent)]
        Isolation(Overlay(self.folder / "written", home=home, kept=kept)).install(self.patches)
        self.observers.loaders.on_pass = self.pass_begins
        watch = self.observers.optimizers.on_step
        self.observers.optimizers.on_step = lambda optimizer: (watch(optimizer), self.stepped())
        self.observers.optimizers.on_made = self.prepare_modules
        self.observers.loaders.on_made = self.prepare_modules

    def prepare_modules(self) -> None:
        """The user's modules get an `enumerate` that follows a cut."""
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None)
            if path and is_users(path) and "enumerate" not in vars(module):
                vars(module)["enumerate"] = following_enumerate

    def pass_begins(self, loader: int) -> None:
        """All was seen when a loader begins to train a third time."""
        if self.observers.loaders.trained.get(loader, 0) >= SEEN_EPOCHS:
            self.leave("seen")

    def stepped(self) -> None:
        """A run without epochs is stopped here."""
        updates = self.recorder.updates
        if updates and not self.first_update:
            self.first_update = time.process_time()
        long = updates >= 8 and time.process_time() - self.first_update > SECONDS_OF_UPDATES
        if updates >= MOST_UPDATES or long:
            self.leave("stopped")

    def _started(self, original: Any, process: Any) -> None:
        loads = sys.modules["torch.utils.data.dataloader"].__file__
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename != loads:
            frame = frame.f_back
        if frame is None:  # it is none of a DataLoader's
            self.recorder.tape.add(ProcessStarted(user_line()))
        original(process)

    def _called(self, original: Any, process: Any, *arguments: Any, **options: Any) -> None:
        command = arguments[0] if arguments else options.get("args")
        first = command[0] if isinstance(command, list | tuple) and command else command
        words = os.fsdecode(first).split() if isinstance(first, str | bytes | os.PathLike) else []
        if words and _LAUNCHERS.search(words[0]):
            self.recorder.tape.add(ProcessStarted(user_line()))
        original(process, *arguments, **options)

    def _parted(self, original: Any, *arguments: Any, **options: Any) -> Any:
        """Nobody trains together any more; torch sometimes hangs in what comes after."""
        if self.recorder.updates and threading.get_ident() == self.main:
            self.leave("ended")
        return original(*arguments, **options)

    def late(self) -> None:
        """The time is nearly over: what was seen is judged, if it is anything; else where the script is."""
        if self.recorder.updates >= 2:
            self.leave("stopped", late=True)
        frame = sys._current_frames().get(self.main)
        while frame is not None and not is_users(frame.f_code.co_filename):
            frame = frame.f_back
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else None
        self.leave("failed", error=f"no step of a torch optimizer in {LATE * self.limit:.0f} seconds", where=where)

    def leave(self, how: str, **facts: Any) -> NoReturn:
        """Write all down and end the process at once: nothing of the script's comes after."""
        self.left.acquire()
        try:
            self.observers.conclude()
        except Exception as error:  # what was seen before is still worth to be judged
            self.recorder.trouble("conclude", error)
        self.recorder.tape.save(self.folder / f"tape-{self.rank}.json")
        status = self.folder / f"status-{self.rank}.json"
        text = json.dumps({"how": how, "updates": self.recorder.updates} | facts)
        status.with_suffix(".partial").write_text(text, encoding="utf-8")
        status.with_suffix(".partial").replace(status)
        self.wait_for_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def wait_for_others(self) -> None:
        """A process that leaves while another still reads from it would fail that one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not all(
            (self.folder / f"status-{rank}.json").exists() for rank in range(self.processes)
        ):
            time.sleep(0.01)


def run_script(
    script: Path,
    arguments: list[str],
    folder: Path,
    *,
    module: str | None = None,
    rank: int = 0,
    processes: int = 1,
    limit: float = 120.0,
    kept: list[str],
) -> NoReturn:
    """Run a script as `python script arguments` does, observe it, and leave the process.

    Args:
        script: an absolute path.
        arguments: its own.
        folder: takes tape-RANK.json and status-RANK.json.
        module: the script's name, if it is run as `python -m module` does.
        rank: of this process among those of the run.
        processes: how many there are.
        limit: seconds after which it is ended from outside.
        kept: folders whose files the kernel keeps as they are.
    """
    run = _ScriptRun(folder, rank, processes, limit)
    SCRIPT_FOLDERS.add(str(script.parent))
    sys.argv = [str(script), *arguments]
    sys.path[0] = os.getcwd() if module else str(script.parent)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    run.start(script, kept)
    known = {"enumerate": following_enumerate}
    try:
        if module:
            runpy.run_module(module, known, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(script), known, run_name="__main__")
    except SystemExit as error:
        code = error.code
        if code in (None, 0):
            run.leave("ended")
        said = f": {code}{gpu_hint(code, error)}" if isinstance(code, str) else f" with code {code}"
        run.leave("left", error=f"the script exited{said}", where=place(error))
    except KeyboardInterrupt:
        run.leave("failed", error="interrupted")
    except BaseException as error:
        run.leave("failed", error=in_a_line(error), where=place(error))
    run.leave("ended")
