"""What torchrun, srun and mpirun leave in the environment, and what is refused there. Real mpirun where it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from onehour.dist.launched import Launched, adopt, is_launched, launched

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "634060801",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(environ: dict[str, str], **changes: str) -> dict[str, str]:
    environ = environ | changes
    adopt(environ)
    return environ


def test_torchruns_variables_are_read_as_they_stand():
    assert launched(TORCHRUN) == Launched(1, 4, 1, None, "gpu07", 29500)
    assert adopted(TORCHRUN | SRUN | OPENMPI) == TORCHRUN | SRUN | OPENMPI


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "17"}, {"MASTER_ADDR": "gpu07"}, {"LOCAL_RANK": "0"}])
def test_a_process_that_nobody_launched_is_alone(environ: dict[str, str]):
    assert adopted(environ) == environ
    assert not is_launched(environ)
    assert launched(environ) == Launched()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SRUN, ("3", "4", "1", "2", "gpu07")),
        (SRUN | {"SLURM_GTIDS": "0,1,2,3"}, ("3", "4", "1", "4", "127.0.0.1")),
        (OPENMPI, ("1", "2", "1", "2", "127.0.0.1")),
        (HYDRA, ("1", "2", "1", "2", "127.0.0.1")),
        # mpirun in a job: Slurm's variables are those of the daemon that it started on each node.
        (OPENMPI | SRUN | {"SLURM_PROCID": "0"}, ("1", "2", "1", "2", "127.0.0.1")),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "17.0"}, ("3", "4", "1", "2", "gpu07")),
        (SRUN | {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.17.0"}, ("3", "4", "1", "2", "gpu07")),
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


def test_a_single_process_of_mpirun_is_alone():
    one = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}
    assert adopted(one) == one


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
]


@pytest.mark.parametrize(("environ", "message"), WRONG)
def test_what_cannot_be_is_named(environ: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        adopted(environ)


def test_the_command_says_it_in_one_line():
    for environ, named in (({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE"), ({"RANK": "1"}, "WORLD_SIZE")):
        done = subprocess.run(
            [sys.executable, "-m", "onehour", "train", "digits"],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("onehour: ")
        assert named in line


MPIRUNS = {
    "mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe"],
    "mpirun.mpich": [],
}


@pytest.mark.parametrize("command", [["sweep", "digits"], ["verify", "digits"]])
def test_a_command_that_starts_its_own_processes_is_not_started_several_times(command: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "onehour", *command],
        env=os.environ | OPENMPI,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (2, "")
    said = f"this is process 1 of 2, but `onehour {command[0]}` starts its processes itself; start it once"
    assert done.stderr.startswith(f"onehour: {said}")


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
