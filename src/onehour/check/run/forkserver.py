"""A process that has torch imported and forks others: each script starts at once, and none outlives it.

It reads one JSON object a line and answers with one: {"script", "module", "arguments", "local_rank", "folder", "cwd",
"environ", "processes", "limit", "overlayfs"} → {"codes", "tails", "timed_out", "kept"}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from onehour.check.run.namespace import enter
from onehour.leaving import adopt_orphans, before_leaving, signal_with_parent

PEER_SECONDS = 3.0  # seconds that processes may go on when another of their run is gone: they wait for it in vain
TAIL = 16_384  # bytes of what a script printed that are kept
ENDS_OF_INPUT = 1000  # how often a script that asks is told that nobody types
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says in the environment; a script that is run as `python` runs it must not see ours."""
NOT_PERMITTED = 77  # with this code a process ends that may not have a mount namespace
ENDING_SECONDS = 3.0  # seconds that scripts may take to end where a signal ends the command


class CheckError(Exception):
    """The script could not be observed; the text says why, in one line."""


class ForkServer:
    """A process that has torch, and `preload` where they are installed, imported, and starts scripts: a context.

    With `overlayfs` files are kept by a mount namespace where the kernel permits it; else by Python's functions for
    files alone.
    """

    def __init__(self, preload: Sequence[str] = (), *, overlayfs: bool = True) -> None:
        self.preload, self.overlayfs = list(preload), overlayfs

    def __enter__(self) -> ForkServer:
        self._process: Any = subprocess.Popen(  # whose pipes are there
            [sys.executable, "-m", "onehour.check.run.forkserver", *self.preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._ready = False
        self._leaving = before_leaving(self._end_at_once)
        self._leaving.__enter__()
        self._answer()
        self._ready = True
        return self

    def __exit__(self, *error: object) -> None:
        self._leaving.__exit__(None, None, None)
        with self._process, contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _end_at_once(self) -> None:
        """When its input ends it ends what it has started, and itself; before it is ready it has started nothing."""
        os.close(self._process.stdin.fileno())
        until = time.monotonic() + (ENDING_SECONDS if self._ready else 0.0)
        while time.monotonic() < until and not os.waitpid(self._process.pid, os.WNOHANG)[0]:
            time.sleep(0.01)
        os.kill(self._process.pid, signal.SIGKILL)

    def run(self, **request: Any) -> dict[str, Any]:
        """One run of a script; the module's docstring says what it takes and answers."""
        print(json.dumps(request | {"overlayfs": self.overlayfs}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines()
            raise CheckError(f"the process that runs scripts ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)


def serve() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    gc.disable()  # what is imported here stays
    import onehour.check.run.script  # noqa: F401
    from onehour.check.observe.internals import import_compiler
    from onehour.check.observe.source import resolve_loaded_modules
    from onehour.check.run.isolate import names_of_functions

    import_compiler()  # before the first fork
    for module in ("safetensors.torch", *sys.argv[1:]):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    resolve_loaded_modules()
    names_of_functions()
    gc.freeze()
    gc.enable()

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        if _apart(request, requests.fileno(), answers) == NOT_PERMITTED:
            _apart(request | {"overlayfs": False}, requests.fileno(), answers)


def _apart(request: dict[str, Any], asker: int, answers: TextIO) -> int:
    """Answer a request from a process of its own, the only one in a namespace; the code that it ends with."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, NOT_PERMITTED):
            raise SystemExit(f"the run was ended with code {code}")
        return code
    try:
        kept = []
        if request["overlayfs"]:
            needed = [os.path.realpath(path) for path in (request["cwd"], os.path.dirname(request["script"]))]
            try:
                kept = enter(Path(request["folder"]), needed)
            except OSError:
                os._exit(NOT_PERMITTED)
        signal_with_parent(signal.SIGKILL)
        adopt_orphans()
        print(json.dumps(_run(request, asker, kept)), file=answers, flush=True)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


class _Child:
    def __init__(self, request: dict[str, Any], rank: int, kept: list[str]) -> None:
        self.terminal, inside = _terminal()
        self.tail, self.code = b"", None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.terminal)
            _child(request, rank, inside, kept)
        os.close(inside)

    def read(self) -> bool:
        """Keep the end of what it prints; False when nobody can print there any more."""
        try:
            data = os.read(self.terminal, 65_536)
        except OSError:  # as a terminal says it
            return False
        self.tail = (self.tail + data)[-TAIL:]
        return bool(data)

    def drain(self) -> None:
        """Keep what it has printed last; it is gone."""
        os.set_blocking(self.terminal, False)
        while self.read():
            pass

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None


def _terminal() -> tuple[int, int]:
    """Both ends of a terminal of 80 columns that shows nothing by itself, and at which nobody types: its input ends."""
    import termios  # here: whoever only judges needs no system that has it

    outside, inside = os.openpty()
    modes = termios.tcgetattr(inside)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(inside, termios.TCSANOW, modes)
    termios.tcsetwinsize(inside, (24, 80))
    os.write(outside, modes[6][termios.VEOF] * ENDS_OF_INPUT)
    return outside, inside


def _child(request: dict[str, Any], rank: int, terminal: int, kept: list[str]) -> None:
    try:
        os.login_tty(terminal)
        signal_with_parent(signal.SIGKILL)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        os.chdir(request["cwd"])
        for name in LAUNCHED:
            os.environ.pop(name, None)
        os.environ.update(request["environ"])
        sys.path[1:1] = filter(None, request["environ"].get("PYTHONPATH", "").split(os.pathsep))
        if "WORLD_SIZE" in request["environ"]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        from onehour.check.observe.digests import seed_all
        from onehour.check.run.script import run_script

        seed_all()
        run_script(request, rank, kept)
    except BaseException as error:
        print(f"onehour: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(70)


def _run(request: dict[str, Any], asker: int, kept: list[str]) -> dict[str, Any]:
    children = [_Child(request, rank, kept) for rank in range(request["processes"])]
    deadline = time.monotonic() + request["limit"]
    timed_out = False
    alone_since: float | None = None
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.terminal, selectors.EVENT_READ, child)
        selector.register(asker, selectors.EVENT_READ, None)
        while sum(child.ended() for child in children) < len(children):
            if alone_since is None and any(child.ended() for child in children):
                alone_since = time.monotonic()
            if time.monotonic() > deadline or (alone_since and time.monotonic() > alone_since + PEER_SECONDS):
                timed_out = time.monotonic() > deadline
                break
            for key, _ in selector.select(timeout=0.02):
                if key.data is None:  # who asked is gone, and nobody waits for an answer
                    deadline = 0.0
                elif not key.data.read():
                    selector.unregister(key.fileobj)
                    time.sleep(0.005)
        _end_all(children)
        for key in list(selector.get_map().values()):
            if key.data is not None:
                key.data.drain()
    for child in children:
        os.close(child.terminal)
    return {
        "codes": [child.code for child in children],
        "tails": [child.tail.decode("utf-8", errors="replace") for child in children],
        "timed_out": timed_out,
        "kept": bool(kept),
    }


def _end_all(children: list[_Child]) -> None:
    """End every process that a script has left: those of its session, and those that came to us as orphans."""
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    for _ in range(200):
        below = _children_of(os.getpid())
        for pid in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended = [child.ended() for child in children]
        for pid in below - {child.pid for child in children}:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if all(ended) and not _children_of(os.getpid()):
            return
        time.sleep(0.01)


def _children_of(parent: int) -> set[int]:
    """The processes below one, at any depth (Linux; elsewhere none are found, and sessions alone are ended)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = (entry / "stat").read_text()
            parents[int(entry.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    below: set[int] = set()
    edge = {parent}
    while edge:
        edge = {pid for pid, above in parents.items() if above in edge} - below
        below |= edge
    return below


if __name__ == "__main__":
    serve()
