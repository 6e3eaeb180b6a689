"""How our launcher starts processes, starts them anew, and hears of a failure. Started for real in test_cli.py."""

import json
import os
import signal
import socket
import subprocess
import sys
from typing import ClassVar

import pytest

from onehour.dist.launch import LaunchError, launch, report_failure
from onehour.dist.processes import Failure


def test_only_our_launcher_is_told_of_a_failure():
    ear, mouth = os.pipe()
    assert not report_failure("no", {"ONEHOUR_TELL": str(mouth)})
    assert not report_failure("no", {"ONEHOUR_LAUNCHED": "1"})
    assert report_failure("η is nan", {"ONEHOUR_LAUNCHED": "1", "ONEHOUR_TELL": str(mouth)})
    os.close(mouth)
    assert json.loads(os.read(ear, 999)) == {"message": "η is nan", "final": False}
    os.close(ear)
    assert not report_failure("nobody listens", {"ONEHOUR_LAUNCHED": "1", "ONEHOUR_TELL": str(mouth)})


def test_a_port_in_use_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.dist.launch.Processes", lambda *_: pytest.fail("started"))
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} cannot be used .*give another --port, or 0"):
            launch(["train"], processes=2, port=port, threads=None, job="test")


class Scripted:
    """Processes that end as they are told, one start after the other."""

    ends: ClassVar[list[Failure | None]] = []
    environs: ClassVar[list[list[dict[str, str]]]] = []

    def __init__(self, command: list[str], environs: list[dict[str, str]], stop: object) -> None:
        self.environs.append(environs)

    def wait(self) -> Failure | None:
        return self.ends.pop(0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr("onehour.dist.launch.Processes", Scripted)
    Scripted.ends, Scripted.environs = [], []
    return Scripted


def test_processes_that_fail_are_started_anew_as_often_as_was_said(
    scripted: type[Scripted], capsys: pytest.CaptureFixture[str]
):
    scripted.ends += [Failure("process 1 was ended by SIGKILL", 1), Failure("gone again", 1), None]
    launch(["train"], processes=2, port=0, threads=1, job="test", restarts=2)
    assert capsys.readouterr().err.splitlines() == [
        "onehour: process 1 was ended by SIGKILL; all processes are started anew (1 of 2)",
        "onehour: gone again; all processes are started anew (2 of 2)",
    ]
    assert [environs[1]["TORCHELASTIC_RESTART_COUNT"] for environs in scripted.environs] == ["0", "1", "2"]
    assert [environ["RANK"] for environ in scripted.environs[0]] == ["0", "1"]
    assert all(environ["MASTER_ADDR"] == "127.0.0.1" for environ in scripted.environs[0])


@pytest.mark.parametrize(("restarts", "starts"), [(0, 1), (1, 2)])
def test_one_failure_too_many_is_said_with_its_code(scripted: type[Scripted], restarts: int, starts: int):
    scripted.ends += [Failure("bad input", 2)] * 2
    with pytest.raises(LaunchError, match="bad input") as raised:
        launch(["train"], processes=1, port=0, threads=1, job="test", restarts=restarts)
    assert raised.value.code == 2
    assert len(scripted.environs) == starts


def test_what_ended_on_purpose_is_not_started_anew(scripted: type[Scripted]):
    scripted.ends += [Failure("stopped", 75, on_purpose=True)]
    with pytest.raises(LaunchError, match="stopped") as raised:
        launch(["train"], processes=1, port=0, threads=1, job="test", restarts=5)
    assert raised.value.code == 75


def test_a_launcher_that_died_before_its_process_asked_is_noticed():
    code = "import os; from onehour.dist.launch import end_with_launcher; os.environ['ONEHOUR_LAUNCHED'] = '1';"
    code += "end_with_launcher(); print('lives on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
