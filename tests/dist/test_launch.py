"""What plain srun and torchrun leave in the environment, and how a failure is told. Started for real in test_cli.py."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onehour.dist.launch import LaunchError, adopt_slurm, is_launched, launch, report_failure

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17"}


def adopted(**changes: str) -> dict[str, str]:
    environ = SLURM | changes
    adopt_slurm(environ)
    return environ


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("a1,a2", "a1"),
        ("rack2-node[001-128]", "rack2-node001"),
        ("n1.cluster.org", "n1.cluster.org"),
    ],
)
def test_process_0_is_on_the_first_of_the_nodes(nodes: str, host: str):
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        assert adopted(**{name: nodes})["MASTER_ADDR"] == host


def test_slurms_numbers_become_torchruns():
    environ = adopted(SLURM_NTASKS_PER_NODE="4", SLURM_STEP_NODELIST="a[1-2]")
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("5", "8", "1")
    assert environ["LOCAL_WORLD_SIZE"] == "4"
    assert is_launched(environ)


def test_the_local_number_of_processes_is_not_invented():
    assert "LOCAL_WORLD_SIZE" not in adopted()
    assert adopted(SLURM_NTASKS_PER_NODE="4(x2)")["LOCAL_WORLD_SIZE"] == "4"


def test_all_processes_of_a_step_meet_at_one_port_and_steps_at_their_own():
    ports = {adopted(SLURM_PROCID=str(rank), SLURM_STEP_ID="1")["MASTER_PORT"] for rank in range(8)}
    assert len(ports) == 1
    others = {adopted(SLURM_JOB_ID=job, SLURM_STEP_ID=step)["MASTER_PORT"] for job in ("17", "18") for step in "123"}
    assert len(others) == 6
    assert all(1024 < int(port) < 65536 for port in others)
    assert 1024 < int(adopted(SLURM_JOB_ID="4294967295")["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "2", **SLURM},
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "17"},
    ],
)
def test_torchruns_variables_stand_and_a_single_task_stays_alone(environ: dict[str, str]):
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_an_address_that_a_user_set_stands():
    environ = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize("environ", [{}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, SLURM])
def test_alone_is_not_launched(environ: dict[str, str]):
    assert not is_launched(environ)


def test_only_our_launcher_is_told_of_a_failure(tmp_path: Path):
    file = tmp_path / "error.json"
    assert not report_failure("no", {"TORCHELASTIC_ERROR_FILE": str(file)})
    assert not report_failure("no", {"ONEHOUR_LAUNCHED": "1"})
    assert not file.exists()
    assert report_failure("η is nan", {"ONEHOUR_LAUNCHED": "1", "TORCHELASTIC_ERROR_FILE": str(file)})
    assert json.loads(file.read_text())["message"]["message"] == "η is nan"


def test_a_port_in_use_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: pytest.fail("started"))
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} cannot be used .*give another --port, or 0"):
            launch(["train"], processes=2, port=port, threads=None, job="test")


def failure(exitcode: int, message: Any = "Signal or exit code", rank: int = 0) -> Any:
    return SimpleNamespace(
        exitcode=exitcode,
        local_rank=rank,
        error_file_data={"message": message},
        signal_name=lambda: "SIGKILL",
    )


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ([failure(1), failure(2, {"message": "minibatch too large"})], 2, "minibatch too large"),
        ([failure(4, {"message": "not finite"}), failure(1)], 4, "not finite"),
        ([failure(-9, rank=1), failure(1)], 1, "process 1 was ended by SIGKILL"),
        ([failure(3, rank=1)], 3, "process 1 left with exit code 3"),
    ],
)
def test_the_failure_that_explains_itself_is_told(
    monkeypatch: pytest.MonkeyPatch, failures: list[Any], code: int, message: str
):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def failing(*_: Any) -> Any:
        def run(*_: Any) -> None:
            error = ChildFailedError.__new__(ChildFailedError)
            error.failures = dict(enumerate(failures))
            error.get_first_failure = lambda: (0, failures[0])
            raise error

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", failing)
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "1")  # so that what `launch` sets is put back
    with pytest.raises(LaunchError, match=message) as raised:
        launch(["train"], processes=2, port=0, threads=1, job="test")
    assert raised.value.code == code
    assert not is_launched({})
