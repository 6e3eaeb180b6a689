"""Before a signal ends a process: what is being written is finished, and temporary folders go."""

import subprocess
import sys
from pathlib import Path

import pytest

WRITES = """
import signal, time
from onehour.dist.signals import StopSignals
from onehour.leaving import undisturbed
with StopSignals(text="stopped"):
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        print("written", flush=True)
    print("never", flush=True)
    time.sleep(30)
"""
SCRATCH = """
import signal, time
from onehour.dist.signals import StopSignals
from onehour.leaving import scratch
with StopSignals(text="stopped"), scratch("example-") as folder:
    print(folder.exists(), flush=True)
    signal.raise_signal(signal.SIGTERM)
    time.sleep(30)
"""
NESTED = """
import signal, time
from onehour.dist.signals import StopSignals
with StopSignals(text="outer"):
    with StopSignals(text="inner") as inner:
        inner()
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # of the same second: it was asked once
    time.sleep(0.5)
    print(inner.asked, flush=True)
"""
SWALLOWS = """
import signal, time
from onehour.dist.signals import StopSignals
class Noisy:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(30)
with StopSignals(text="stopped"):
    Noisy()
    time.sleep(30)
"""


def ended(code: str, tmp: Path) -> tuple[int, str, str]:
    """How a process that runs this ends: its code and what it says."""
    every = {"TMPDIR": str(tmp), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=every)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (WRITES, (75, "written\n", "onehour: stopped\n")),
        (SCRATCH, (75, "True\n", "onehour: stopped\n")),
        (NESTED, (0, "2\n", "")),
        (SWALLOWS, (75, "", "onehour: stopped\n")),
    ],
    ids=["what is undisturbed is done", "a temporary folder goes", "two of a second ask once", "in a finalizer"],
)
def test_a_signal_ends_a_process_once_what_must_be_is_done(tmp_path: Path, code: str, end: tuple[int, str, str]):
    assert ended(code, tmp_path) == end
    assert list(tmp_path.iterdir()) == []
