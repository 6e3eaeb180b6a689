"""Signals that ask a run to stop: before it has begun, while it trains, twice, and in processes that it forks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from onehour.dist.signals import STOPS, StopSignals, asks_to_stop
from onehour.leaving import signals_wait

BUSY = """
import ctypes, sys, time
from onehour.dist.signals import StopSignals
with StopSignals() as asked:
    asked()
    print("ready", flush=True)
    if sys.argv[1] == "waits":  # in C, as for another process: no handler of Python's gets a turn
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    for _ in range(3000):
        time.sleep(0.01)
        if asked() and sys.argv[1] == "obeys":
            sys.exit(3)
"""


def started(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", STOPS)
def test_in_training_a_signal_only_asks(number: signal.Signals):
    process = started("obeys")
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (3, "")


def test_before_training_a_signal_ends_the_process_with_75_and_a_line():
    code = "import signal, time; from onehour.dist.signals import StopSignals\n"
    code += "with StopSignals():\n signal.raise_signal(signal.SIGINT); time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 75
    assert done.stderr == "onehour: stopped before the first iteration; the same command goes on\n"


@pytest.mark.parametrize("how", ["goes on", "waits"])
def test_a_second_signal_ends_it_at_once_and_one_of_the_same_second_does_not(how: str):
    process = started(how)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    while process.poll() is None:  # a busy machine may hear of the first one late
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM


def test_it_is_noted_at_once_in_this_process_and_everything_is_put_back():
    before = [signal.getsignal(number) for number in STOPS]
    with StopSignals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGUSR2)
        assert asked()
        assert asked.asked == signal.SIGUSR2
    assert [signal.getsignal(number) for number in STOPS] == before


def test_one_that_others_act_on_notes_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.dist.signals.APART", 0.1)
    with StopSignals() as stop:
        stop.leave_to_caller()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        for _ in range(100):
            if stop.again is not None:
                break
            time.sleep(0.02)
    assert (stop.asked, stop.again) == (signal.SIGTERM, signal.SIGINT)


def test_a_forked_process_ignores_them_but_for_the_one_that_ends_it():
    with StopSignals() as asked:
        asked()
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert not asked()  # nor does this one hear of them
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_a_signal_that_was_held_back_comes_when_the_process_listens():
    code = "import os, signal, time; time.sleep(0.5); from onehour.dist.signals import StopSignals\n"
    code += "with StopSignals():\n time.sleep(30)"
    with signals_wait(*STOPS):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        process.send_signal(signal.SIGTERM)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process.communicate(timeout=300)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("code", "asks"),
    [(0, False), (1, False), (75, True), (76, False), (-9, False), (-15, True), (130, True), (137, False)],
)
def test_codes_that_say_that_a_process_was_asked(code: int, asks: bool):
    assert asks_to_stop(code) == asks


def test_nohup_is_respected():
    code = "import signal, time; from onehour.dist.signals import StopSignals\n"
    code += "with StopSignals():\n signal.raise_signal(signal.SIGHUP); time.sleep(0.5)"
    assert subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0


HOLDS = """
import ctypes, signal, sys, time
from onehour.dist.signals import StopSignals
with StopSignals() as asked:
    asked()
    for _ in range(int(sys.argv[1])):
        signal.raise_signal(signal.SIGTERM)
    ctypes.PyDLL(None).usleep(1500000)  # holds the interpreter: no other thread gets a turn
    time.sleep(0.5)
    sys.exit(3 if asked() else 4)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_one_that_the_thread_hears_late_does_not_count_twice(signals: int):
    done = subprocess.run([sys.executable, "-c", HOLDS, str(signals)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (3, "")
