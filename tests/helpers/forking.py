"""Python's processes without Python's start: forked from one that has torch imported and has computed nothing.

Each that imports torch costs two seconds of a core, and the tests start hundreds. Where the start is not what a test is
about, `Forked` stands for subprocess.Popen: the process has the arguments, environment, folder and descriptors that it
was given, no others, and is a child of whoever asked. It cannot be told by its command line. Autograd refuses to work
in a process that was forked after a backward pass, so a process that only forks is started for it.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing import resource_tracker, util
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NoReturn

POPEN, SPAWN = subprocess.Popen, util.spawnv_passfds  # type: ignore[attr-defined]
PR_SET_CHILD_SUBREAPER = 36
PRELOADED = (
    *("onehour.cli.train", "onehour.cli.sweep", "onehour.cli.verify", "onehour.cli.report", "onehour.runs"),
    *("onehour.training.loop", "onehour.dist.group", "onehour.dist.launch", "onehour.sweeps.pool", "onehour.api"),
    *("onehour.dist.watchdog", "onehour.data.images", "torch.distributed"),
    *("torch._dynamo", "torch.nn.parallel", "numpy.random"),  # torch's first optimizer imports a compiler
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin"),  # of a run's curve
)


def start(command: Sequence[str], descriptors: dict[int, int], **given: Any) -> int:
    """Fork a process that runs a command of Python's; its id.

    Args:
        descriptors: its own, and which of ours each is.
        given: env, cwd, session.
    """
    request = given | {"command": list(command), "parent": os.getpid(), "descriptors": list(descriptors)}
    if Forked.forker is None:  # in a process that was forked, which launches others and computes nothing
        own = [os.dup(descriptor) for descriptor in descriptors.values()]  # a lock closes its own in a forked process
        number = os.fork() or become(request, own)
        for descriptor in own:
            os.close(descriptor)
        return number
    reaper = ctypes.CDLL(None).prctl
    reaper(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(Forked.forker, [json.dumps(request).encode()], list(descriptors.values()))
        number = int(Forked.forker.recv(99))
    finally:
        reaper(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return number


def serve(asked: socket.socket) -> None:
    """Fork until nobody asks any more; who forked ends, so that the process is a child of whoever asked."""
    for name in PRELOADED:
        if find_spec(name.partition(".")[0]) is not None:  # frameworks are tested without matplotlib
            importlib.import_module(name)
    sys.path.remove(str(Path(__file__).parent))  # theirs may say so themselves
    while True:
        text, descriptors, *_ = socket.recv_fds(asked, 2**18, 99)
        if not text:
            return
        reading, writing = os.pipe()
        if (between := os.fork()) == 0:
            number = os.fork() or become(json.loads(text), descriptors)
            os.write(writing, str(number).encode())
            os._exit(0)
        os.waitpid(between, 0)  # from now on who asked is the parent
        asked.send(os.read(reading, 99))
        for descriptor in (reading, writing, *descriptors):
            os.close(descriptor)


def become(request: dict[str, Any], given: list[int]) -> NoReturn:
    """The life of a process."""
    code = 1
    try:
        while os.getppid() != request["parent"]:
            time.sleep(0.0005)
        Forked.forker = None
        subprocess.Popen, util.spawnv_passfds = Forked, spawned  # type: ignore[assignment, attr-defined, misc]
        gc.freeze()  # whoever owned a descriptor here must not close it a second time
        _take(request["descriptors"], given)
        _forget()
        os.environ.clear()
        os.environ.update(request["env"])
        if request["cwd"] is not None:
            os.chdir(request["cwd"])
        if request["session"]:
            os.setsid()
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        code = _code(request["command"])
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = 120  # as Python's
        os._exit(code)


def _take(numbers: list[int], given: list[int]) -> None:
    """Have the given descriptors under these numbers, and no others."""
    above = max(numbers) + 1  # where none of them is closed once it is in its place
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in given]
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))
    for number, descriptor in zip(numbers, kept, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _forget() -> None:
    """What the process that forks has for itself."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    atexit._clear()
    atexit.register(util._exit_function)  # type: ignore[attr-defined]
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None


def _code(command: list[str]) -> int:
    """Run what a command of Python's says; the code to leave with."""
    options, what, arguments = _parsed(command)
    first = [] if "-P" in options or "PYTHONSAFEPATH" in os.environ else [""]
    asked = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    try:
        if what in ("-m", "-c"):
            sys.path[:0] = first + asked
            sys.argv = [what, *arguments[1:]]
            if what == "-m":
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                sys.modules["__main__"] = ModuleType("__main__")
                exec(compile(arguments[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.path[:0] = [str(Path(what).resolve().parent), *asked]
            sys.argv = [what, *arguments]
            runpy.run_path(what, run_name="__main__")
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            print(left.code, file=sys.stderr)
            return 1
        return left.code or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _parsed(command: list[str]) -> tuple[list[str], str, list[str]]:
    """Options, `-m`, `-c` or a script, and what follows."""
    options, words = [], command[1:]
    while words[0].startswith("-") and words[0] not in ("-m", "-c"):
        options.append(words.pop(0))
        if options[-1] == "-W":
            words.pop(0)
    return options, words[0], words[1:]


class Forked(subprocess.Popen[Any]):
    """subprocess.Popen, whose processes are forked where they are Python's."""

    forker: ClassVar[socket.socket | None] = None
    """Where to ask for a process."""

    def _execute_child(self, *given: Any) -> None:
        theirs = POPEN._execute_child  # type: ignore[attr-defined]
        asked = inspect.signature(theirs).bind(self, *given).arguments
        command = asked["args"]
        if asked["shell"] or asked["preexec_fn"] or isinstance(command, str | bytes) or command[0] != sys.executable:
            theirs(self, *given)
            return
        ends = [asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        standard = {0: ends[0], 1: ends[3], 2: ends[5]}
        descriptors = {number: number if end == -1 else end for number, end in standard.items()}
        descriptors |= {number: number for number in asked["pass_fds"]}
        cwd = None if asked["cwd"] is None else os.fspath(asked["cwd"])
        env = dict(os.environ if asked["env"] is None else asked["env"])
        words = [os.fspath(word) for word in command]
        self.pid = start(words, descriptors, cwd=cwd or os.getcwd(), env=env, session=asked["start_new_session"])
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]


def spawned(path: bytes, command: Sequence[Any], descriptors: Sequence[int]) -> int:
    """For multiprocessing.util.spawnv_passfds: a process of the context "spawn"."""
    words = [os.fsdecode(word) for word in command]
    if not any("spawn_main" in word for word in words):
        return SPAWN(path, command, descriptors)
    mapping = {number: number for number in (0, 1, 2, *descriptors)}
    return start([sys.executable, *words[1:]], mapping, cwd=os.getcwd(), env=dict(os.environ), session=False)


if __name__ == "__main__":
    import forking  # not this module, whose name is another's in each process

    forking.serve(socket.socket(fileno=int(sys.argv[1])))
