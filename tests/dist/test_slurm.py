"""Which processes are tasks of a Slurm step. Variables as of Slurm 22.05, which campaigns/cluster runs."""

import os
import signal
import subprocess
import sys
from itertools import product

import pytest

from onehour.dist import slurm
from onehour.dist.slurm import ancestors, first_host, step, without_srun

JOB = {"SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "sl[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
SCRIPT = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GTIDS": "0"}
TASK = JOB | {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "sl[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
}
INTERACTIVE = SCRIPT | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "sl1",
    "SLURM_STEP_NUM_TASKS": "1",
}
ONE_OF_MANY = TASK | {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NODELIST": "sl1",
}


def test_a_task_of_a_step_knows_its_place():
    found = step(TASK)
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, 1, 2)


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
    assert step(environ) is None
    assert without_srun(environ) == tasks


def test_the_steps_of_a_job_have_ports_of_their_own_and_so_have_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "_under_srun", lambda: True)  # reads /proc

    def port(job: int, number: int) -> int:
        found = step(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)})
        assert found is not None
        return found.port

    near = [port(job, number) for job, number in product(range(5000, 5112), range(100))]
    far = [port(17 + 1000 * thousands, number) for thousands, number in product(range(60), range(8))]
    for ports in (near, far):
        assert len(set(ports)) == len(ports)
        assert all(20000 < port < 32768 for port in ports)
    assert 20000 < port(2**32 - 1, 2**31) < 32768
    ranks = [step(TASK | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({found and found.port for found in ranks}) == 1


def test_the_local_number_of_processes_is_that_of_the_step_and_not_invented():
    def local(**changes: str) -> int | None:
        found = step({name: text for name, text in (TASK | changes).items() if text})
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
        assert first_host({name: nodes}) == host


def test_where_a_hostfile_orders_the_tasks_nobody_guesses():
    with pytest.raises(ValueError, match=r"SLURM_DISTRIBUTION is arbitrary.*set MASTER_ADDR"):
        first_host(TASK | {"SLURM_DISTRIBUTION": "arbitrary"})
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST names no host; set MASTER_ADDR"):
        first_host({})


@pytest.mark.parametrize(
    ("name", "text"),
    [("SLURM_PROCID", "4"), ("SLURM_PROCID", ""), ("SLURM_STEP_NUM_TASKS", "0"), ("SLURM_STEP_ID", "batch")],
)
def test_a_variable_that_is_no_such_number_is_named(name: str, text: str):
    with pytest.raises(ValueError, match=f"environment variable {name} is '{text}'; expected a whole number"):
        step(TASK | {name: text})


@pytest.mark.parametrize(
    ("title", "found"),
    [
        ("slurmstepd: [13.0]", "True"),
        ("slurmstepd: [13.batch]", "False"),
        ("slurmstepd: [13.interactive]", "False"),
        ("a shell", "True"),
    ],
)
def test_a_batch_script_submitted_from_a_step_is_no_task_of_that_step(title: str, found: str):
    # sbatch hands the SLURM_STEP_... of the shell on, and Slurm replaces only what a script has itself.
    script = f"exec -a '{title}' bash -c '$0 \"$@\"; true' \"$@\""
    code = f"from onehour.dist.slurm import step; print(step({TASK!r}) is not None)"
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == found, done.stderr


def test_a_command_typed_in_a_shell_that_is_a_task_is_alone(monkeypatch: pytest.MonkeyPatch):
    # As of `srun -n 4 --pty bash`: the shell is task 0, and the three others have ended.
    monkeypatch.setattr("onehour.dist.slurm.os.open", lambda *_: os.dup(0))
    monkeypatch.setattr("onehour.dist.slurm.os.tcgetpgrp", lambda _: os.getpgrp())
    shell = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert step(TASK | {"SLURM_TASK_PID": str(shell.pid)}) is None
        assert step(TASK | {"SLURM_TASK_PID": str(os.getpid())}) is not None
        assert step(TASK) is not None
    finally:
        shell.send_signal(signal.SIGKILL)
        shell.wait()


def test_ancestors_begin_with_the_parent_and_end_with_the_first_process():
    found = list(ancestors())
    assert found[0] == os.getppid()
    assert found[-1] == 1
