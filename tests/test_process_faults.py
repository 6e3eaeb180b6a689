"""The campaigns on processes in short: a kill, signals, a restart, jobs together, command lines."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from campaigns import cli, interrupts, kills, restarts, signals, soak, together


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the campaigns keep what they make: undisturbed runs, inputs."""
    return tmp_path_factory.mktemp("campaigns")


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_goes_on_and_ends_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch, processes: int):
    monkeypatch.setattr(kills, "IN_MEMORY", ("--data", "tinytask:few_digits", "--classes", "10"))
    found = kills.disturbed(replace(kills.SCENARIOS[2], processes=(processes,)), 0)
    assert found["ok"], found
    assert sum(found["kinds"].values()) == 1
    assert len(found["codes"]) == 2 or "loader or helper" in found["kinds"]


@pytest.mark.slow
def test_a_run_that_is_signalled_stops_goes_on_and_ends_as_if_nothing_had_been():
    found = signals.disturbed(0, epochs=1, each=1)
    assert found["ok"], found
    assert found["runs"] == 1


@pytest.mark.parametrize("case", [3, 4, 12, 0], ids=["plan", "report", "doctor", "train"])
def test_a_command_that_is_interrupted_while_it_imports_says_one_line(case: int):
    found = interrupts.interrupted(case, span=0.3)
    assert found["ok"], found


@pytest.mark.slow
def test_a_killed_process_is_back_and_takes_a_step():
    found = restarts.restarted(0, kills=1)
    assert found["ok"], found
    assert found["kills"][0]["started"] < found["kills"][0]["seconds"]


@pytest.mark.slow
def test_jobs_on_one_host_do_not_meet():
    found = together.together(jobs=3)
    assert found["ok"], found


def test_no_command_line_and_no_recipe_file_ends_in_a_traceback():
    with cli.furnished() as folder:
        found = cli.block(range(60), folder)
    assert found["ok"], found["said"]


@pytest.mark.slow  # two minutes of waiting
def test_nothing_grows_while_processes_are_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", "")  # so that what the campaign sets is put back
    found = soak.soaked(minutes=2.0, every=20.0)
    assert found["ok"], found
    assert found["runs"] >= 4


@pytest.mark.parametrize("number", range(98, 106))
def test_a_forked_process_writes_into_the_descriptor_that_it_was_given(popen: type[subprocess.Popen[Any]], number: int):
    reading, writing = os.pipe()
    os.dup2(writing, number)
    with popen([sys.executable, "-c", f"import os; os.write({number}, b'here')"], pass_fds=[number]) as process:
        os.close(number)
        os.close(writing)
        assert os.read(reading, 9) == b"here"
    os.close(reading)
    assert process.returncode == 0
