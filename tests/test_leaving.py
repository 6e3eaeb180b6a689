"""Before a signal ends a process: what is being written is finished, and temporary folders go."""

import subprocess
import sys

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


def ended(code: str, tmp: object) -> tuple[int, str, str]:
    """How a process that runs this ends: its code and what it says."""
    every = {"TMPDIR": str(tmp), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=every)
    return done.returncode, done.stdout, done.stderr


def test_what_is_undisturbed_is_done_to_its_end_and_nothing_after_it(tmp_path):
    assert ended(WRITES, tmp_path) == (75, "written\n", "onehour: stopped\n")


def test_a_temporary_folder_goes(tmp_path):
    assert ended(SCRATCH, tmp_path) == (75, "True\n", "onehour: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_two_signals_of_one_second_ask_once_whoever_listens(tmp_path):
    assert ended(NESTED, tmp_path) == (0, "2\n", "")


def test_a_signal_where_python_swallows_errors_is_a_line_too(tmp_path):
    assert ended(SWALLOWS, tmp_path) == (75, "", "onehour: stopped\n")
