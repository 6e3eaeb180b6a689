"""What several tests share: the helpers beside them, started worlds of processes, a place of one's own."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

ALL = "ONEHOUR_TEST_ALL" in os.environ
"""As `make test-all` sets it: every process is started anew, and properties are tried on more examples."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

for _name in ("SIGHUP", "SIGINT"):  # nohup and background jobs ignore them, and children inherit that
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Tests see no GPU but those that are for one, and Triton's kernels run on the CPU."""
    settings.register_profile("onehour", deadline=None, max_examples=100 if ALL else 30)
    settings.load_profile("onehour")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not importlib.import_module("torch").cuda.is_available():
        raise pytest.UsageError("these tests need a GPU, and torch sees none here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those for a GPU are only run by `-m gpu`."""
    if config.option.markexpr != "gpu":
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where others' libraries are tested, a skip fails."""
    report = yield
    if report.skipped and item.config.option.markexpr in ("frameworks", "vision"):
        report.outcome = "failed"
    return report


HELPERS = Path(__file__).parent / "helpers"
sys.path.insert(0, str(HELPERS))  # so that "tinytask:net" is importable here, as it is for a user's own module
sys.path.append(str(HELPERS.parents[1]))  # and `campaigns`, as from where they are started

SECONDS = 600
"""For the worlds, on a machine that others use too; alone it takes 20."""


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/helpers/tinytask.py: a task of a few images, and what can go wrong with one."""
    return importlib.import_module("tinytask")


@pytest.fixture(scope="session")
def worlds() -> ModuleType:
    """tests/helpers/worlds.py, for what one process does with what others left."""
    return importlib.import_module("worlds")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a subprocess that can import the helpers."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS), prepend=os.pathsep)
    return dict(os.environ)


@pytest.fixture(scope="session")
def popen() -> Iterator[type[subprocess.Popen[Any]]]:
    """What starts Python's processes without importing torch anew: forks of a process that has it, as long as asked.

    By `make test-all` it is subprocess.Popen itself.
    """
    if ALL:
        yield subprocess.Popen
        return
    forking = importlib.import_module("forking")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(HELPERS / "forking.py"), str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as started:
        theirs.close()
        forking.Forked.forker = ours
        yield forking.Forked
        started.kill()


@pytest.fixture
def forked(popen: type[subprocess.Popen[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test starts of Python's processes is forked, but by `make test-all`."""
    if not ALL:
        monkeypatch.setattr(subprocess, "Popen", popen)
        monkeypatch.setattr("multiprocessing.util.spawnv_passfds", importlib.import_module("forking").spawned)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new folder to run a command in; the signal handlers that it sets are put back."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, popen: type[subprocess.Popen[Any]]) -> Callable[[int], Path]:
    """The folder in which p = 1, 2, 3 or 4 processes have acted tests/helpers/worlds.py, once for every test worker."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "worlds"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            place.mkdir()
            _act(place, popen)
    said = [path.read_text(encoding="utf-8")[-4000:] for path in place.glob("world-*/output-*")]
    assert (place / "done").exists(), "\n\n".join([*said, (place / "output").read_text(encoding="utf-8")])
    return lambda processes: place / f"world-{processes}"


def _act(place: Path, popen: type[subprocess.Popen[Any]]) -> None:
    command = [sys.executable, str(HELPERS / "worlds.py"), str(place), *map(str, _free_ports(4))]
    with (place / "output").open("w") as output:
        started = popen(command, stdout=output, stderr=output, cwd=place, start_new_session=True)
        try:
            if started.wait(SECONDS) == 0:
                (place / "done").touch()
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@pytest.fixture
def command(tiny: ModuleType, alone: Path) -> list[str]:
    """`onehour train` of the tiny task, in a folder of its own."""
    return ["train", "digits", *tiny.FLAGS, "--out", str(alone / "run")]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Calls a command that leaves with 2, and gives the one line that it says."""

    def said(arguments: list[str]) -> str:
        capsys.readouterr()
        assert importlib.import_module("onehour.cli").main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in error
        (line,) = error.splitlines()
        assert line.startswith("onehour: ")
        return line.removeprefix("onehour: ")

    return said


@pytest.fixture
def port() -> int:
    """One that is free."""
    return _free_ports(1)[0]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
