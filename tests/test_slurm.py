"""examples/slurm.sh as Slurm would run it: tasks of a step, a signal to all of them, a requeue, the same job again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
TASKS = 2
SRUN = f"""#!{sys.executable}
# Two tasks of a step on this host; its exit code is the highest. A task that fails ends the others.
import os, subprocess, sys, time
command = [sys.executable, "-m", "onehour", *sys.argv[sys.argv.index("onehour") + 1 :]]
shared = os.environ | {{"SLURM_NTASKS": "{TASKS}", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}}
tasks = [
    subprocess.Popen(command, env=shared | {{"SLURM_PROCID": str(t), "SLURM_LOCALID": str(t)}}) for t in range({TASKS})
]
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))
while None in (codes := [task.poll() for task in tasks]):
    if any(codes):
        for task in tasks:
            task.terminate()
        break
    time.sleep(0.01)
sys.exit(max(128 - code if code < 0 else code for code in [task.wait() for task in tasks]))
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Slurm's commands, first in the path."""
    commands = {"srun": SRUN, "scontrol": '#!/bin/sh\necho "$@" >> requeued\n'}
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*flags: str) -> "subprocess.Popen[str]":
    size = ["--minibatch", "128", "--epochs", "3", "--warmup-epochs", "1"]
    where = ["--device", "cpu", "--threads", "1", "--out", "run"]
    command = [str(SCRIPT), "digits", *size, *where, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_saved_requeued_and_goes_on(cluster: Path):
    job = submit()
    while (
        not (cluster / "run" / "metrics.jsonl").exists() or len((cluster / "run" / "metrics.jsonl").read_text()) < 999
    ):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    for pid in (cluster / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    said = job.communicate(timeout=300)[0]
    assert said.count("and saved; the same command goes on from there") == TASKS
    assert (cluster / "requeued").read_text() == f"requeue {os.environ['SLURM_JOB_ID']}\n"
    job = submit()
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert "resumes run at iteration" in said
    assert json.loads((cluster / "run" / "summary.json").read_text())["outcome"] == "finished"
    assert (cluster / "requeued").read_text().count("requeue") == 1


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, 0), (2, 0, 0), (4, 0, 0), (75, 9, 1), (1, 0, 1), (1, 5, 0)]
)
def test_what_is_put_back_into_the_queue(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, code: int, restarts: int, requeued: int
):
    (cluster / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    job = submit()
    job.communicate(timeout=300)
    assert (cluster / "requeued").exists() == bool(requeued)
    assert job.returncode == (0 if requeued else code)
