"""Someone's script, unedited, in this process: observed, and stopped when all was seen.

Its tape, written to a folder, says how it ended; of an error in a line where, what, and what it often means.
"""

from __future__ import annotations

import linecache
import multiprocessing.process
import os
import platform
import re
import runpy
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import dataloader

from onehour.check.observe import Observers
from onehour.check.observe.passes import MOST_UPDATES, following_enumerate
from onehour.check.observe.recorder import TapeRecorder
from onehour.check.observe.source import SCRIPT_FOLDERS, is_users, user_line
from onehour.check.run.isolate import Isolation, switch_off
from onehour.check.run.overlay import Overlay
from onehour.check.tape import ProcessStarted

SEEN_EPOCHS = 2
LATE = 0.85  # the share of its time after which a run ends by itself
PATIENCE = 10.0  # seconds that a process waits for the others to come to their end
SECONDS_OF_UPDATES = 20.0
"""Of CPU after the first update; a run that is not at the end of its epochs then, or after MOST_UPDATES, is stopped."""
_LAUNCHERS = re.compile(r"(?:python|torchrun|accelerate|deepspeed|mpirun|horovodrun)[\d.]*$")


class _ScriptRun:
    """One script's run in this process, which it leaves for good."""

    def __init__(self, request: dict[str, Any], rank: int) -> None:
        self.folder, self.rank = Path(request["folder"]), rank
        self.processes, self.limit = request["processes"], request["limit"]
        self.recorder = TapeRecorder(deep_updates=64, cut=True)
        self.observers = Observers(self.recorder)
        self.prepared = set(sys.modules)
        self.first_update = 0.0
        self.left = threading.Lock()
        self.main = threading.get_ident()

    def start(self, script: Path, kept: list[str]) -> None:
        self.observers.install()
        # A script's own processes are not observed: their tapes would mix with this one.
        os.register_at_fork(after_in_child=lambda: setattr(self.recorder, "finished", True))
        self.recorder.patches.beside(multiprocessing.process.BaseProcess, "start", before=self._started)
        self.recorder.patches.beside(subprocess.Popen, "__init__", before=self._called)
        self.recorder.patches.beside(torch.distributed, "destroy_process_group", before=self._parted)
        timer = threading.Timer(LATE * self.limit, self.late)
        timer.daemon = True
        timer.start()
        switch_off(self.folder / "mlflow")
        home = [os.getcwd(), str(script.parent)]
        Isolation(Overlay(self.folder / "written", home=home, kept=kept)).install(self.recorder.patches)
        self.recorder.on_made, self.recorder.on_pass = self.prepare_modules, self.pass_begins
        self.recorder.on_step = self.stepped

    def prepare_modules(self) -> None:
        """The user's modules get an `enumerate` that follows a cut."""
        fresh = [sys.modules[name] for name in sys.modules.keys() - self.prepared]
        self.prepared.update(sys.modules)
        for module in fresh:
            path = getattr(module, "__file__", None)
            if path and is_users(path) and "enumerate" not in vars(module):
                vars(module)["enumerate"] = following_enumerate

    def pass_begins(self, loader: int) -> None:
        if self.observers.loaders.trained[loader] >= SEEN_EPOCHS:
            self.leave("seen")

    def stepped(self) -> None:
        """A run without epochs is stopped here."""
        updates = self.recorder.updates
        if updates and not self.first_update:
            self.first_update = time.process_time()
        long = updates >= 8 and time.process_time() - self.first_update > SECONDS_OF_UPDATES
        if updates >= MOST_UPDATES or long:
            self.leave("stopped")

    def _started(self, process: Any) -> None:
        if all(frame.f_code.co_filename != dataloader.__file__ for frame, _ in traceback.walk_stack(sys._getframe())):
            self.recorder.tape.add(ProcessStarted(user_line()))

    def _called(self, process: Any, *arguments: Any, **options: Any) -> None:
        command = arguments[0] if arguments else options.get("args")
        first = command[0] if isinstance(command, list | tuple) and command else command
        words = os.fsdecode(first).split() if isinstance(first, str | bytes | os.PathLike) else []
        if words and _LAUNCHERS.search(words[0]):
            self.recorder.tape.add(ProcessStarted(user_line()))

    def _parted(self, *arguments: Any, **options: Any) -> None:
        """Nobody trains together any more; torch sometimes hangs in what comes after."""
        if self.recorder.updates and threading.get_ident() == self.main:
            self.leave("ended")

    def late(self) -> None:
        """The time is nearly over: what was seen is judged, if it is anything; else where the script is."""
        if self.recorder.updates >= 2:
            self.leave("stopped", late=True)
        frames = traceback.walk_stack(sys._current_frames()[self.main])
        frame = next((frame for frame, _ in frames if is_users(frame.f_code.co_filename)), None)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else None
        self.leave("failed", error=f"no step of a torch optimizer in {LATE * self.limit:.0f} seconds", where=where)

    def leave(self, how: str, **facts: Any) -> NoReturn:
        """Write all down and end the process at once: nothing of the script's comes after."""
        self.left.acquire()
        try:
            self.observers.conclude()
        except Exception as error:  # what was seen before is still worth to be judged
            self.recorder.trouble("conclude", error)
        tape, path = self.recorder.tape, self.folder / f"tape-{self.rank}.json"
        tape.end = {"how": how, "updates": self.recorder.updates} | facts
        try:
            tape.save(path)
        except (TypeError, ValueError) as error:  # a value that JSON does not have; what led there is not judged
            tape.events, tape.end = [], {"how": "failed", "updates": 0, "error": in_a_line(error)}
            tape.save(path)
        self.wait_for_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def wait_for_others(self) -> None:
        """A process that leaves while another still reads from it would fail that one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not all(
            (self.folder / f"tape-{rank}.json").exists() for rank in range(self.processes)
        ):
            time.sleep(0.01)


def run_script(request: dict[str, Any], rank: int, kept: list[str]) -> NoReturn:
    """Run a script as `python script arguments` or `python -m module` does, observe it, and leave the process.

    Its folder takes tape-RANK.json. The kernel keeps the files in the `kept` folders as they are.
    """
    script, module = Path(request["script"]), request["module"]
    run = _ScriptRun(request, rank)
    SCRIPT_FOLDERS.add(str(script.parent))
    sys.argv = [str(script), *[f"--local-rank={rank}"] * request["local_rank"], *request["arguments"]]
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
        if (code := error.code) not in (None, 0):
            said = f": {code}{gpu_hint(code, error)}" if isinstance(code, str) else f" with code {code}"
            run.leave("left", error=f"the script exited{said}", where=place(error))
    except KeyboardInterrupt:
        run.leave("failed", error="interrupted")
    except BaseException as error:
        run.leave("failed", error=in_a_line(error), where=place(error))
    run.leave("ended")


_GPU = re.compile(r"cuda|cudnn|nccl|nvidia|\bgpus?\b", re.IGNORECASE)
_NOBODY_TYPES = " (nobody types at the terminal of a script that is checked)"
_NO_GPU = " (this machine has no GPU; let the script choose its device, or check it where there is one)"
_OLD = re.compile(
    r"Weights only load failed|Legacy autograd function|invalid index of a 0-dim tensor"
    r"|Subtraction, the `-` operator, with a bool tensor"
)
_NO_NAME = re.compile(r"(?:module|from|named) '([\w.]+)'")
_NO_KEYWORD = re.compile(r"([\w.]+)\(\) got an unexpected keyword argument")


def in_a_line(error: BaseException) -> str:
    """An error's kind and text, the source of an assertion, and what to do about a GPU or a release that is missing."""
    text = str(error).strip()
    source = _assertion(error)
    said = text.splitlines()[0] if text else source or "without a message"
    line = f"{type(error).__name__}: {said}"[:400]
    if text and source:
        line += f" ({source})"
    if isinstance(error, EOFError):
        return line + _NOBODY_TYPES
    return line + (gpu_hint(text, error) or _release_hint(error, text))


def gpu_hint(text: str, error: BaseException) -> str:
    """What to do where an error is about a GPU, and there is none; else nothing."""
    if torch.cuda.is_available() or isinstance(error, OSError):
        return ""
    inside = any("/torch/cuda/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return _NO_GPU if inside or _GPU.search(text) else ""


def place(error: BaseException) -> str | None:
    """The user's line that an error came from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _assertion(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "") if frames and isinstance(error, AssertionError) else ""
    return " ".join(line.split()) if line.startswith("assert") else None


def _release_hint(error: BaseException, text: str) -> str:
    """Whose installed release has not what the script wants; nothing where an error means something else."""
    if isinstance(error, SyntaxError):
        old = "Missing parentheses in call to" in text or re.search(r"\basync\s*=", error.text or "")
        package = "sys" if old else None
    elif isinstance(error, AttributeError | ImportError):
        package = _lacking(error, text)
    elif isinstance(error, TypeError) and (match := _NO_KEYWORD.match(text)):
        package = _home(match[1].split(".")[0], error)
    else:
        package = "torch" if _OLD.search(text) else None
    if package is None:
        return ""
    if package in sys.stdlib_module_names:
        name, release = "Python", platform.python_version()
    else:
        name, release = package, getattr(sys.modules[package], "__version__", "")
        with suppress(PackageNotFoundError):
            release = version(package)
    return f" (the script seems too old for the installed {name} {release})"


def _lacking(error: AttributeError | ImportError, text: str) -> str | None:
    """The package of which a module has no such name, or an object no such attribute."""
    match = _NO_NAME.search(text)
    name = match[1] if match else None
    if isinstance(error, AttributeError) and not isinstance(error.obj, ModuleType | None):
        kind = error.obj if isinstance(error.obj, type) else type(error.obj)
        name = None if issubclass(kind, nn.Module) else kind.__module__
    if isinstance(error, ModuleNotFoundError) and "." not in (name or ""):
        return None  # not installed
    return _installed(name)


def _installed(module: str | None) -> str | None:
    """The package of a module that is loaded and not the user's own."""
    package = (module or "").split(".")[0]
    loaded = sys.modules.get(package)
    if loaded is None or package in ("__main__", "builtins") or is_users(getattr(loaded, "__file__", None) or "<>"):
        return None
    return package


def _home(name: str, error: BaseException) -> str | None:
    """The package of what the user's failing line calls by a name, or by that of a module in front of it."""
    frame: FrameType | None = None
    line = ""
    for found, number in traceback.walk_tb(error.__traceback__):
        if is_users(found.f_code.co_filename):
            frame, line = found, linecache.getline(found.f_code.co_filename, number)
    match = re.search(rf"((?:\w+\.)*)\b{re.escape(name)}\b", line)
    if frame is None or match is None:
        return None
    known: dict[str, Any] = frame.f_globals | frame.f_locals
    value: Any = None
    for part in [*match[1].split(".")[:-1], name]:
        value = known.get(part)
        known = vars(value) if isinstance(value, ModuleType) else {}
    return _installed(getattr(value, "__module__", None))
