"""How our launcher starts processes, starts them anew, passes signals on, and hears of a failure."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from torch._C._distributed_c10d import TCPStore

from onehour.dist.launch import LaunchError, Processes, launch, meeting_place, report_failure
from onehour.dist.launched import LOOPBACK
from onehour.dist.signals import StopSignals


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

    ends: ClassVar[list[LaunchError | None]] = []
    environs: ClassVar[list[list[dict[str, str]]]] = []

    def __init__(self, command: list[str], environs: list[dict[str, str]], stop: object) -> None:
        self.environs.append(environs)

    def wait(self) -> LaunchError | None:
        return self.ends.pop(0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr("onehour.dist.launch.Processes", Scripted)
    Scripted.ends, Scripted.environs = [], []
    return Scripted


def test_processes_that_fail_are_started_anew_as_often_as_was_said(
    scripted: type[Scripted], capsys: pytest.CaptureFixture[str]
):
    scripted.ends += [LaunchError("process 1 was ended by SIGKILL", 1), LaunchError("gone again", 1), None]
    launch(["train"], processes=2, port=0, threads=1, job="test", restarts=2)
    assert capsys.readouterr().err.splitlines() == [
        "onehour: process 1 was ended by SIGKILL; all processes are restarted (1 of 2)",
        "onehour: gone again; all processes are restarted (2 of 2)",
    ]
    assert [environs[1]["TORCHELASTIC_RESTART_COUNT"] for environs in scripted.environs] == ["0", "1", "2"]
    assert [environ["RANK"] for environ in scripted.environs[0]] == ["0", "1"]
    assert all(environ["MASTER_ADDR"] == "127.0.0.1" for environ in scripted.environs[0])


@pytest.mark.parametrize(("on_purpose", "restarts", "starts"), [(False, 0, 1), (False, 1, 2), (True, 5, 1)])
def test_one_failure_too_many_or_on_purpose_is_said_with_its_code(
    scripted: type[Scripted], on_purpose: bool, restarts: int, starts: int
):
    scripted.ends += [LaunchError("bad input", 2, on_purpose)] * 2
    with pytest.raises(LaunchError, match="bad input") as raised:
        launch(["train"], processes=1, port=0, threads=1, job="test", restarts=restarts)
    assert raised.value.code == 2
    assert len(scripted.environs) == starts


def test_a_launcher_that_died_before_its_process_asked_is_noticed():
    code = "import os; from onehour.dist.launch import end_with_launcher; os.environ['ONEHOUR_LAUNCHED'] = '1';"
    code += "end_with_launcher(); print('lives on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


TELL = "import json, os, sys; os.write(int(os.environ['ONEHOUR_TELL']), json.dumps({'message': 'minibatch'}).encode())"


def run(*codes: str, stop: StopSignals | None = None) -> Processes:
    """A process for each piece of Python."""
    script = "import os, sys; exec(os.environ['CODE'])"
    return Processes([sys.executable, "-c", script], [{"CODE": code} for code in codes], stop)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (["pass", "pass"], None),
        (["sys.exit(1)", f"{TELL}; sys.exit(2)"], LaunchError("minibatch", 2)),
        (["sys.exit(1)", "os.kill(os.getpid(), 9)"], LaunchError("process 1 was ended by SIGKILL", 1)),
        (["pass", "sys.exit(3)"], LaunchError("process 1 exited with code 3", 3)),
        (["sys.exit(76)", "sys.exit(76)"], LaunchError("process 0 exited with code 76", 76)),
        (
            ["sys.exit(1)", "sys.exit(75)"],
            LaunchError("stopped before the first iteration; the same command goes on", 75, on_purpose=True),
        ),
        (
            ["sys.exit(1)", "sys.exit(143)"],
            LaunchError("process 1 exited at once on a second SIGTERM; the same command goes on", 143, on_purpose=True),
        ),
        (
            ["sys.exit(1)", "os.kill(os.getpid(), 2)"],
            LaunchError("process 1 was ended by SIGINT", 130, on_purpose=True),
        ),
    ],
)
def test_the_failure_that_explains_itself_is_told(codes: list[str], expected: LaunchError | None):
    assert run(*codes).wait() == expected


def test_the_others_have_a_while_to_end_and_are_ended_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first fails; the second is writing something and then ends; the third never would."""
    monkeypatch.setattr("onehour.dist.launch.GRACE", 3.0)
    written = tmp_path / "written"
    slow = f"import time; time.sleep(1); open({str(written)!r}, 'w').close()"
    stuck = f"import time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    started = time.monotonic()
    assert run("sys.exit(5)", slow, stuck).wait() == LaunchError("process 0 exited with code 5", 5)
    assert written.exists()
    assert time.monotonic() - started < 99
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_stopped_process_is_ended_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.dist.launch.GRACE", 0.1)
    assert run("os.kill(os.getpid(), 19)", "sys.exit(4)").wait() == LaunchError("process 1 exited with code 4", 4)


LISTENS = """
from onehour.dist.signals import StopSignals
import time
with StopSignals(speaks=False) as asked:
    asked()
    while not asked():
        time.sleep(0.01)
"""


def test_a_signal_is_passed_on_even_to_processes_that_do_not_listen_yet():
    """It is held back until they do: it must not end them, for they would be taken for failed ones."""
    with StopSignals() as stop:
        stop.leave_to_caller()
        processes = run(*["import time; time.sleep(1)\n" + LISTENS] * 2, stop=stop)
        signal.raise_signal(signal.SIGTERM)
        early = LaunchError("stopped before the first iteration; the same command goes on", 75, on_purpose=True)
        assert processes.wait() in (early, None)  # whichever of its threads is first; neither was ended by a signal


def test_a_signal_to_processes_that_listen_lets_them_end_well():
    with StopSignals() as stop:
        stop.leave_to_caller()
        processes = run(LISTENS, LISTENS, stop=stop)
        time.sleep(2)
        signal.raise_signal(signal.SIGTERM)
        assert processes.wait() is None


def test_a_second_signal_ends_all_at_once():
    with StopSignals() as stop:
        stop.leave_to_caller()
        processes = run(*["import time; time.sleep(99)"] * 2, stop=stop)
        signal.raise_signal(signal.SIGUSR1)
        stop.again = signal.SIGINT  # as if a second later
        failure = processes.wait()
    assert failure is not None
    assert (failure.code, failure.on_purpose) == (130, True)
    assert "second signal (SIGINT)" in str(failure)


def listening(inodes: set[str]) -> set[str]:
    """The addresses, as the kernel writes them, that sockets with these inodes listen on."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


def sockets(pid: int | str) -> set[str]:
    """The inodes of a process's sockets."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


MEETS = """
import torch.distributed as dist
from onehour.dist.group import joined
with joined("cpu") as group:
    import json, pathlib, torch
    sys.path.insert(0, os.environ["HERE"])
    from test_launch import listening, sockets
    assert group.sum(torch.ones(1)).item() == 2
    pathlib.Path(os.environ["OUT"], f"{group.rank}").write_text(json.dumps(sorted(listening(sockets("self")))))
    dist.barrier()
os._exit(0)
"""


@pytest.mark.usefixtures("forked")
def test_on_one_node_everything_listens_on_the_loopback_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with meeting_place(0) as port:
        assert listening(sockets("self")) == {"0100007F"}  # 127.0.0.1
        shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"WORLD_SIZE": "2", "CODE": MEETS, "OUT": str(tmp_path), "HERE": str(Path(__file__).parent)}
        script = "import os, sys; exec(os.environ['CODE'])"
        environs = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        assert Processes([sys.executable, "-c", script], environs).wait() is None
    for rank in "01":
        assert set(json.loads((tmp_path / rank).read_text())) <= {"0100007F"}


def test_two_meeting_places_never_share_a_port_and_one_that_was_given_is_used(port: int):
    with meeting_place(0) as first, meeting_place(0) as second:
        assert first != second
    for _ in range(2):  # a restart meets there again
        with meeting_place(port) as used:
            assert used == port
            TCPStore(LOOPBACK, port, is_master=False).set("key", "value")
