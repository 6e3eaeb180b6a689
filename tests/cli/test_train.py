"""How `onehour train` ends where its processes, its disk or its own output do not do what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onehour.cli import main
from onehour.config import Recipe
from onehour.dist.group import PeerLateError, PeerLostError
from onehour.training.record import Run

pytestmark = pytest.mark.usefixtures("forked")


@pytest.mark.parametrize("flags", [("--processes", "2"), ("--restarts", "1")])
@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (None, 75, "stopped, and RUN took no note of it: is its disk full? The same command goes on from the last"),
        ("non-finite", 4, "RUN ended as non-finite"),
        ("finished", 0, ""),
    ],
)
def test_a_stop_that_a_full_disk_could_not_note_is_not_taken_for_an_end(
    command: list[str],
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, str],
    outcome: str | None,
    code: int,
    says: str,
):
    def launch(arguments: list[str], **_: Any) -> None:
        """Its processes have left with 0 each, and no outcome.json."""
        (alone / "run").mkdir()
        (alone / "run" / "recipe.toml").write_text(Recipe().to_toml())
        if outcome is not None:
            (alone / "run" / "summary.json").write_text(json.dumps({"outcome": outcome}))

    monkeypatch.setattr("onehour.cli.train.launch", launch)
    monkeypatch.setattr("onehour.study.outcome.outcome_lines", lambda run: [])
    assert main([*command, *flags]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"onehour: {says}".replace("RUN", str(alone / "run")) if says else "")
    assert len(said.err.splitlines()) == bool(says)


@pytest.fixture
def trains(command: list[str], environ: dict[str, str]) -> list[str]:
    """A command whose standard output rich and the interpreter write themselves."""
    return [sys.executable, "-m", "onehour", *command, "--device", "cpu"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_whose_output_finds_a_full_disk_comes_to_its_end(trains: list[str], alone: Path, processes: str):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*trains, "--processes", processes], stdout=full, stderr=full, timeout=300)
    assert done.returncode == 0
    assert Run(alone / "run").finished
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(trains, stdout=full, stderr=full, timeout=300).returncode == 0  # the finished run


@pytest.mark.parametrize("after", ["", "epoch   2"])
def test_a_run_whose_output_nobody_reads_any_more_comes_to_its_end(trains: list[str], alone: Path, after: str):
    process = subprocess.Popen(trains, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while after and not process.stdout.readline().startswith(after):
        pass
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 0
    assert Run(alone / "run").finished
    process.stderr.close()


def test_a_stop_keeps_its_exit_code_where_nothing_can_be_said(trains: list[str], alone: Path):
    (alone / "stopper.py").write_text(STOPPER)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*trains, "--log", "stopper:Stopper"], stdout=full, stderr=full, timeout=300)
    assert done.returncode == 75


STOPPER = """
import os, signal
class Stopper:
    def start(self, recipe, folder): pass
    def log(self, record): os.kill(os.getpid(), signal.SIGTERM)
    def finish(self, summary): pass
"""


@pytest.mark.parametrize(("error", "told"), [(PeerLateError, True), (PeerLostError, False)])
@pytest.mark.parametrize("ours", [True, False])
def test_our_launcher_is_told_of_one_that_is_late_and_sees_itself_who_is_gone(
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[PeerLostError],
    *,
    told: bool,
    ours: bool,
):
    def run(*_: object, **__: object) -> None:
        raise error("process 1 waited")

    ear, mouth = os.pipe()
    monkeypatch.setattr("onehour.runs.run", run)
    monkeypatch.setattr("onehour.cli.train.end_with_launcher", lambda: None)
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (launched | {"ONEHOUR_TELL": str(mouth)}).items():
        monkeypatch.setenv(name, value)
    if ours:
        monkeypatch.setenv("ONEHOUR_LAUNCHED", "1")
    assert main(command) == 1
    os.close(mouth)
    heard = os.read(ear, 999)
    os.close(ear)
    assert heard == (b'{"message": "process 1 waited", "final": false}' if ours and told else b"")
    assert capsys.readouterr().err == ("" if ours else "onehour: process 1 waited\n")
