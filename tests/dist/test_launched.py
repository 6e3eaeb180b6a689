"""What torchrun, srun and mpirun leave in the environment, and what is refused there.

Slurm's variables are those of a real Slurm 22.05, and campaigns/cluster runs one. Real mpirun where it is.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import product

import pytest

from onehour.dist import launched as place
from onehour.dist.launched import Launched, adopt, is_launched, launched, slurm_step, without_srun

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "sl[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
SCRIPT = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GTIDS": "0"}
SRUN = JOB | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GTIDS": "2,3"}
SRUN |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "sl[1-2]", "SLURM_STEP_NUM_TASKS": "4"}
NOWHERE = {name: text for name, text in SRUN.items() if not name.endswith("NODELIST")}
INTERACTIVE = SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "sl1", "SLURM_STEP_NUM_TASKS": "1"}
ONE_OF_MANY = SRUN | dict.fromkeys(("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "1") | {"SLURM_PROCID": "0"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "634060801"}
OPENMPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(environ: dict[str, str], **changes: str) -> dict[str, str]:
    environ = environ | changes
    adopt(environ)
    return environ


def test_torchruns_variables_are_read_as_they_stand():
    assert launched(TORCHRUN) == Launched(1, 4, 1, None, "gpu07", 29500)
    assert adopted(TORCHRUN | SRUN | OPENMPI) == TORCHRUN | SRUN | OPENMPI


OF_ONE = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "17"}, {"MASTER_ADDR": "gpu07"}, {"LOCAL_RANK": "0"}, OF_ONE])
def test_a_process_that_nobody_launched_with_others_is_alone(environ: dict[str, str]):
    assert adopted(environ) == environ
    assert not is_launched(environ)
    assert launched(environ) == Launched()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SRUN, ("3", "4", "1", "2", "sl1")),
        (SRUN | {"SLURM_GTIDS": "0,1,2,3"}, ("3", "4", "1", "4", "127.0.0.1")),
        (OPENMPI, ("1", "2", "1", "2", "127.0.0.1")),
        (HYDRA, ("1", "2", "1", "2", "127.0.0.1")),
        # mpirun in a job: Slurm's variables are those of the daemon that it started on each node.
        (OPENMPI | SRUN | {"SLURM_PROCID": "0"}, ("1", "2", "1", "2", "127.0.0.1")),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "17.0"}, ("3", "4", "1", "2", "sl1")),
        (SRUN | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.17.0"}, ("3", "4", "1", "2", "sl1")),
    ],
)
def test_a_process_of_srun_or_mpirun_gets_torchruns_variables(environ: dict[str, str], expected: tuple[str, ...]):
    found = adopted(environ)
    assert tuple(found[name] for name in NAMES) == expected
    assert 20000 < int(found["MASTER_PORT"]) < 32768
    assert launched(found).size == int(expected[1])


@pytest.mark.parametrize("environ", [SRUN, OPENMPI, HYDRA])
def test_an_address_that_a_user_set_stands(environ: dict[str, str]):
    found = adopted(environ, MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize("changes", [{}, {"PMIX_NAMESPACE": "other"}])
def test_two_mpiruns_on_a_host_meet_at_ports_of_their_own(changes: dict[str, str]):
    ports = {adopted(OPENMPI | {"OMPI_COMM_WORLD_RANK": rank}, **changes)["MASTER_PORT"] for rank in "01"}
    assert len(ports) == 1
    assert (ports == {adopted(OPENMPI)["MASTER_PORT"]}) == (not changes)


def test_of_mpirun_on_several_hosts_nobody_knows_where_process_0_is():
    for several in (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_RANK": "1", "PMI_SIZE": "4"}):
        with pytest.raises(ValueError, match=r"is 4 .*set MASTER_ADDR to that host's name and MASTER_PORT"):
            adopted(several)
        assert adopted(several, MASTER_ADDR="gpu07")["MASTER_ADDR"] == "gpu07"


def test_a_launcher_that_does_not_say_how_many_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"PMIX_RANK is '1'.*does not say of how many; set RANK, WORLD_SIZE, MASTER_ADDR"
    ):
        adopted({"PMIX_RANK": "1"})
    with pytest.raises(ValueError, match=r"PMI_RANK is '1'.*PMI_SIZE is not set"):
        adopted({"PMI_RANK": "1"})


WRONG = [
    ({"RANK": "1"}, r"RANK is set \('1'\), but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is set \('2'\), but RANK is not"),
    ({"WORLD_SIZE": ""}, r"WORLD_SIZE is set \(''\), but RANK is not"),
    (TORCHRUN | {"WORLD_SIZE": ""}, "variable WORLD_SIZE is ''; expected a whole number of at least 1"),
    (TORCHRUN | {"WORLD_SIZE": "two"}, "variable WORLD_SIZE is 'two'"),
    (TORCHRUN | {"WORLD_SIZE": "0"}, "variable WORLD_SIZE is '0'"),
    (TORCHRUN | {"WORLD_SIZE": "4.0"}, "variable WORLD_SIZE is '4.0'"),
    (TORCHRUN | {"WORLD_SIZE": "٤"}, "variable WORLD_SIZE is '٤'"),
    (TORCHRUN | {"RANK": ""}, "variable RANK is ''"),
    (TORCHRUN | {"RANK": "-1"}, "variable RANK is '-1'"),
    (TORCHRUN | {"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4: expected 0 … 3"),
    (TORCHRUN | {"LOCAL_RANK": "x"}, "variable LOCAL_RANK is 'x'"),
    (TORCHRUN | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8, but WORLD_SIZE is 4"),
    (TORCHRUN | {"MASTER_ADDR": ""}, "WORLD_SIZE is 4, but MASTER_ADDR is empty; expected the name"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
    (TORCHRUN | {"MASTER_PORT": ""}, "variable MASTER_PORT is ''; expected a whole number in 1 … 65535"),
    (TORCHRUN | {"MASTER_PORT": "65536"}, "variable MASTER_PORT is '65536'"),
    (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE is '8', but the launcher says 4"),
    (SRUN | {"RANK": "0"}, "RANK is '0', but the launcher says 3"),
    (SRUN | {"MASTER_PORT": "http"}, "variable MASTER_PORT is 'http'"),
    (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_RANK is 1, but OMPI_COMM_WORLD_SIZE is 1"),
    (HYDRA | {"MPI_LOCALNRANKS": ""}, "variable MPI_LOCALNRANKS is ''"),
    (SRUN | {"SLURM_PROCID": "4"}, "environment variable SLURM_PROCID is '4'; expected a whole number"),
    (SRUN | {"SLURM_PROCID": ""}, "environment variable SLURM_PROCID is ''; expected a whole number"),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "0"}, "environment variable SLURM_STEP_NUM_TASKS is '0'; expected a whole number"),
    (SRUN | {"SLURM_STEP_ID": "batch"}, "environment variable SLURM_STEP_ID is 'batch'; expected a whole number"),
]


@pytest.mark.parametrize(("environ", "message"), WRONG)
def test_what_cannot_be_is_named(environ: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        adopted(environ)


@pytest.mark.parametrize(
    ("environ", "tasks"),
    [
        pytest.param(SCRIPT, 4, id="a batch script"),
        pytest.param(JOB, 4, id="a shell of salloc on the login node"),
        pytest.param(INTERACTIVE, 4, id="a shell of salloc on a node"),
        pytest.param(INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "4"}, 4, id="whatever that shell's step says"),
        pytest.param(ONE_OF_MANY, 1, id="srun -n1"),
        pytest.param(
            {name: JOB[name] for name in JOB if name != "SLURM_NTASKS"}, 2, id="two nodes, no number of tasks"
        ),
        pytest.param({}, 1, id="no Slurm"),
    ],
)
def test_what_srun_has_not_started_as_one_of_several_is_alone(environ: dict[str, str], tasks: int):
    assert slurm_step(environ) is None
    assert without_srun(environ) == tasks


def test_the_steps_of_a_job_have_ports_of_their_own_and_so_have_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(place, "_under_srun", lambda: True)  # reads /proc

    def port(job: int, number: int) -> int:
        found = slurm_step(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)})
        assert found is not None
        return found.port

    near = [port(job, number) for job, number in product(range(5000, 5112), range(100))]
    far = [port(17 + 1000 * thousands, number) for thousands, number in product(range(60), range(8))]
    for ports in (near, far):
        assert len(set(ports)) == len(ports)
        assert all(20000 < port < 32768 for port in ports)
    assert 20000 < port(2**32 - 1, 2**31) < 32768
    ranks = [slurm_step(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({found and found.port for found in ranks}) == 1


def test_the_local_number_of_processes_is_that_of_the_step_and_not_invented():
    def local(**changes: str) -> int | None:
        found = slurm_step({name: text for name, text in (SRUN | changes).items() if text})
        assert found is not None
        return found.local_size

    assert local(SLURM_GTIDS="3", SLURM_NTASKS_PER_NODE="4") == 1
    assert local(SLURM_GTIDS="") == 2
    assert local(SLURM_GTIDS="", SLURM_NTASKS_PER_NODE="8(x2)") == 4
    assert local(SLURM_GTIDS="", SLURM_NTASKS_PER_NODE="") is None


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
        found = slurm_step(NOWHERE | {name: nodes})
        assert found is not None
        assert found.address == host


def test_where_a_hostfile_orders_the_tasks_nobody_guesses():
    with pytest.raises(ValueError, match=r"SLURM_DISTRIBUTION is arbitrary.*set MASTER_ADDR"):
        slurm_step(SRUN | {"SLURM_DISTRIBUTION": "arbitrary"})
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST names no host; set MASTER_ADDR"):
        slurm_step(NOWHERE)


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("slurmstepd: [13.0]", "True"),
        ("slurmstepd: [13.batch]", "False"),
        ("slurmstepd: [13.interactive]", "False"),
        ("a shell", "True"),
    ],
)
def test_a_batch_script_submitted_from_a_step_is_no_task_of_that_slurm_step(title: str, found: str):
    # sbatch hands the SLURM_STEP_... of the shell on, and Slurm replaces only what a script has itself.
    script = f"exec -a '{title}' bash -c '$0 \"$@\"; true' \"$@\""
    code = f"from onehour.dist.launched import slurm_step; print(slurm_step({SRUN!r}) is not None)"
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == found, done.stderr


def test_a_command_typed_in_a_shell_that_is_a_task_is_alone(monkeypatch: pytest.MonkeyPatch):
    # As of `srun -n 4 --pty bash`: the shell is task 0, and the three others have ended.
    monkeypatch.setattr("onehour.dist.launched.os.open", lambda *_: os.dup(0))
    monkeypatch.setattr("onehour.dist.launched.os.tcgetpgrp", lambda _: os.getpgrp())
    shell = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert slurm_step(SRUN | {"SLURM_TASK_PID": str(shell.pid)}) is None
        assert slurm_step(SRUN | {"SLURM_TASK_PID": str(os.getpid())}) is not None
        assert slurm_step(SRUN) is not None
    finally:
        shell.send_signal(signal.SIGKILL)
        shell.wait()


MPIRUNS = {"mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe"], "mpirun.mpich": []}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("command", "environ", "said"),
    [
        ("train", {"WORLD_SIZE": "", "RANK": "0"}, "the environment variable WORLD_SIZE is ''"),
        ("train", {"RANK": "1"}, "RANK is set ('1'), but WORLD_SIZE is not"),
        ("sweep", OPENMPI, "this is process 1 of 2, but `onehour sweep` starts its processes itself; start it once"),
        ("verify", OPENMPI, "this is process 1 of 2, but `onehour verify` starts its processes itself; start it once"),
    ],
)
def test_the_command_says_it_in_one_line(command: str, environ: dict[str, str], said: str):
    done = subprocess.run(
        [sys.executable, "-m", "onehour", command, "digits"],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"onehour: {said}")


@pytest.mark.parametrize("mpirun", MPIRUNS)
def test_processes_of_a_real_mpirun_agree_where_to_meet(mpirun: str):
    if not shutil.which(mpirun):
        pytest.skip(f"{mpirun} is not installed")
    code = "import json; from onehour.dist.launched import *; adopt(); p = launched(); "
    code += "print(json.dumps([p.rank, p.size, p.local_rank, p.local_size, p.address, p.port]))"
    command = [mpirun, *MPIRUNS[mpirun], "-n", "2", "bash", "-c", '"$0" -c "$1"; true', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    first, second = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert first == [0, 2, 0, 2, "127.0.0.1", first[-1]], done.stderr
    assert second == [1, 2, 1, 2, "127.0.0.1", first[-1]]
