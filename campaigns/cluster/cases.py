"""Runs on a real Slurm of several nodes on one machine, each disturbed in its own way: all end as undisturbed ones do.

    python -m campaigns.cluster.cases [--only NAME] [--write]

All runs are canonical, so the SHA-256 of their weights must be that of the same command without Slurm. Batch jobs are
examples/slurm.sh, as users copy it. Prints a line a case and how many passed; 1 if any failed. Needs root and Debian's
slurm-wlm, munge and iproute2; where that cannot be had it says why, and leaves with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BATCH = HERE.parents[1] / "examples" / "slurm.sh"
NODES = 5
TOGETHER = 4
LIMIT = 1200.0
"""Seconds that a case may take on a busy machine."""
SETTLES = 5.0
"""Seconds until what is left of a job that was put back is not taken for the job that runs again."""
SEEDS = (0, 1)
TRAIN = [
    *("digits", "--data", "paced:digits", "--classes", "10", "--loaders", "0", "--minibatch", "256"),
    *("--epochs", "4", "--warmup-epochs", "1", "--reduce", "canonical", "--device", "cpu", "--threads", "1"),
    *("--save-every", "2"),
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class CaseError(Exception):
    """What went wrong in a case."""


def call(*command: str, check: bool = True) -> str:
    """A command's output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if check and done.returncode:
        raise CaseError(f"{' '.join(command[:3])} … left with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout + done.stderr


def wait_for(what: str, is_so: Callable[[], Any]) -> None:
    """Until something is so."""
    deadline = time.monotonic() + LIMIT
    while not is_so():
        if time.monotonic() > deadline:
            raise CaseError(f"waited in vain until {what}")
        time.sleep(0.2)


class Job:
    """A batch job that trains into a folder of its own.

    Args:
        folder: the run's.
        pace: seconds that an epoch takes, so that there is time to disturb it.
        options: of sbatch.
        flags: of `onehour train`.
        script: with its arguments.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        pace: float = 5.0,
        flags: tuple[str, ...] = (),
        script: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.output = folder.with_suffix(".out")
        command = list(script) or [str(BATCH), *TRAIN, *flags, "--out", str(folder)]
        own = ("--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.output}", "--parsable")
        environ = os.environ | {"PACE": str(pace)}
        done = subprocess.run(
            ["sbatch", *own, *options, *command], capture_output=True, text=True, env=environ, timeout=LIMIT
        )
        if done.returncode:
            raise CaseError(f"sbatch: {done.stderr}")
        self.number = done.stdout.strip()

    def about(self) -> dict[str, str]:
        """What `scontrol show job` says, the first of an array."""
        words = call("scontrol", "show", "job", self.number).split()
        return dict(reversed([word.split("=", 1) for word in words if "=" in word]))

    def trains(self) -> None:
        """Wait for the first evaluation."""
        wait_for(f"{self.folder.name} trains", lambda: self._has_metrics() or self._is_over())
        if self._is_over():
            raise CaseError(f"ended before it was disturbed: {self.said()}")

    def _has_metrics(self) -> bool:
        metrics = self.folder / "metrics.jsonl"
        return metrics.exists() and bool(metrics.read_text())

    def _is_over(self) -> bool:
        return self.about()["JobState"] in ENDED

    def said(self) -> str:
        """The end of its output."""
        return self.output.read_text()[-1500:] if self.output.exists() else "nothing"

    def ends(self, *, restarts: int | None = None) -> None:
        """Wait for its end, and start it at once where it is put back into the queue for later."""
        deadline = time.monotonic() + LIMIT
        while (about := self.about())["JobState"] not in ENDED:
            if about["JobState"] == "PENDING" and about["Reason"] == "BeginTime":
                time.sleep(SETTLES)
                call("scontrol", "update", f"jobid={self.number}", "starttime=now", check=False)
            if time.monotonic() > deadline:
                raise CaseError(f"is {about['JobState']} ({about['Reason']}) still: {self.said()}")
            time.sleep(0.5)
        if about["JobState"] != "COMPLETED":
            raise CaseError(f"{about['JobState']}: {self.said()}")
        if restarts is not None and int(about["Restarts"]) < restarts:
            raise CaseError(f"was not put back into the queue: {self.said()}")


def on_one_node(folder: Path) -> None:
    """srun starts two processes on one node."""
    call("srun", "-w", "sl1", "-n2", "onehour", "train", *TRAIN, "--out", str(folder))


def on_two_nodes(folder: Path) -> None:
    """srun starts a process on each of two nodes."""
    call("srun", "-w", "sl1,sl2", "--ntasks-per-node=1", "onehour", "train", *TRAIN, "--out", str(folder))


def signalled(folder: Path) -> None:
    """USR1, as `#SBATCH --signal` sends it: saved, put back into the queue, gone on."""
    job = Job(folder, "-w", "sl1,sl2", "--nodes=2", "--ntasks-per-node=1")
    job.trains()
    call("scancel", "--signal=USR1", job.number)
    job.ends(restarts=1)
    if "and saved; the same command goes on" not in job.output.read_text():
        raise CaseError(f"was not asked to save: {job.said()}")


def preempted(folder: Path) -> None:
    """A job of a higher partition takes the node."""
    job = Job(folder, "-w", "sl3", "--nodes=1", "--ntasks-per-node=2", pace=8.0)
    job.trains()
    call("srun", "-p", "high", "-w", "sl3", "--exclusive", "sleep", "5")
    job.ends(restarts=1)


def node_is_killed(folder: Path) -> None:
    """One of two nodes loses power, and comes back."""
    job = Job(folder, "-w", "sl4,sl5", "--nodes=2", "--ntasks-per-node=1", pace=8.0)
    job.trains()
    cluster("node-down", "sl5")
    wait_for("Slurm misses the node", lambda: "down" in call("sinfo", "-h", "-n", "sl5", "-o", "%T"))
    cluster("node-up", "sl5")
    job.ends(restarts=1)


def rank_is_killed(folder: Path) -> None:
    """One process is killed, as for want of memory."""
    job = Job(folder, "-w", "sl2", "--nodes=1", "--ntasks-per-node=2")
    job.trains()
    os.kill(max(trainers(folder)), signal.SIGKILL)
    job.ends(restarts=1)


def cancelled(folder: Path) -> None:
    """scancel: saved; the same job again goes on."""
    place = ("-w", "sl1,sl2", "--nodes=2", "--ntasks-per-node=1")
    job = Job(folder, *place)
    job.trains()
    call("scancel", job.number)
    wait_for("the job is cancelled", lambda: job.about()["JobState"] == "CANCELLED" and not trainers(folder))
    again = Job(folder, *place)
    again.ends()
    if "resumes" not in again.output.read_text():
        raise CaseError(f"began anew: {again.said()}")


def time_is_over(folder: Path) -> None:
    """The job's time ends before the run does; Slurm sends USR1 a minute before."""
    place = ("-w", "sl1", "--nodes=1", "--ntasks-per-node=2", "--time=4", "--signal=USR1@60")
    job = Job(folder, *place, pace=60.0)
    job.ends(restarts=1)


def suspended(folder: Path) -> None:
    """scontrol suspend for longer than an iteration may take, and resume."""
    job = Job(folder, "-w", "sl2", "--nodes=1", "--ntasks-per-node=2", flags=("--hang-timeout", "10"))
    job.trains()
    call("scontrol", "suspend", job.number)
    time.sleep(15.0)
    call("scontrol", "resume", job.number)
    job.ends()


def array(folder: Path) -> None:
    """An array of seeds, two processes each, all at once on one node."""
    script = folder.with_suffix(".sh")
    words = " ".join(TRAIN)
    seed = "$SLURM_ARRAY_TASK_ID"
    script.write_text(f"#!/bin/bash\nexec srun onehour train {words} --seed {seed} --out {folder}-{seed}\n")
    Job(folder, "-w", "sl1", "-n2", f"--array=0-{SEEDS[-1]}", "--wait", script=(str(script),))
    for each in SEEDS[1:]:
        compare(Path(f"{folder}-{each}"), each)
    shutil.move(f"{folder}-0", folder)


def without_srun(folder: Path) -> None:
    """A batch script with four tasks that forgets srun: one process trains, and says so."""
    script = folder.with_suffix(".sh")
    script.write_text(f"#!/bin/bash\nexec onehour train {' '.join(TRAIN)} --out {folder}\n")
    job = Job(folder, "-w", "sl1,sl2", "--nodes=2", "--ntasks-per-node=2", script=(str(script),), pace=0.0)
    job.ends()
    if "srun did not start this process" not in job.output.read_text():
        raise CaseError(f"says nothing of srun: {job.said()}")


CASES: dict[str, Callable[[Path], None]] = {  # what takes longest comes first
    "time limit": time_is_over,
    "a node is killed": node_is_killed,
    "preemption": preempted,
    "USR1 and requeue": signalled,
    "a rank is killed": rank_is_killed,
    "scancel, and again": cancelled,
    "suspend and resume": suspended,
    "an array of seeds": array,
    "srun on 1 node": on_one_node,
    "srun on 2 nodes": on_two_nodes,
    "a batch script without srun": without_srun,
}
work: Path
expected: dict[int, str] = {}


def cluster(verb: str, *words: str) -> None:
    """campaigns/cluster/slurm.sh."""
    call(str(HERE / "slurm.sh"), verb, str(work / "slurm"), *words)


def trainers(folder: Path) -> list[int]:
    """The processes that train into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"train" in words and b"python" in words[0]:
            found.append(int(path.parent.name))
    return found


def compare(folder: Path, seed: int = 0) -> None:
    """Whether a run has ended, with the weights of the undisturbed one."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    if summary.get("outcome") != "finished":
        raise CaseError(f"{folder.name} is not finished")
    if summary["weights_sha256"] != expected[seed]:
        raise CaseError(f"{folder.name} has other weights than the undisturbed run")
    if folder.with_name(f"{folder.name}.1").exists():
        raise CaseError(f"{folder.name} was started over")


def undisturbed(seed: int) -> None:
    """The same command without Slurm."""
    folder = work / f"undisturbed-{seed}"
    call("onehour", "train", *TRAIN, "--seed", str(seed), "--out", str(folder))
    expected[seed] = json.loads((folder / "summary.json").read_text())["weights_sha256"]


def tried(name: str, again: str = "") -> dict[str, Any]:
    """A case and how it ended.

    Args:
        again: behind the folder's name, at another try.
    """
    began = time.monotonic()
    folder = work / f"{name.replace(',', '').replace(' ', '-')}{again}"
    wrong = ""
    try:
        CASES[name](folder)
        compare(folder)
    except (CaseError, subprocess.TimeoutExpired, OSError, ValueError) as error:
        wrong = str(error)
    seconds = round(time.monotonic() - began, 1)
    print(f"{'FAILED' if wrong else 'passed'}  {name} ({seconds:.0f} s){': ' if wrong else ''}{wrong}", flush=True)
    return {"case": name, "ok": not wrong, "seconds": seconds, "said": wrong}


def missing() -> str:
    """Why this machine cannot have a cluster; "" if it can. Installs what is missing where that is possible."""
    if os.geteuid() != 0:
        return "it needs root"
    if not Path("/etc/debian_version").exists():
        return "it needs Debian's packages"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "ip"))):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        packages = ["slurm-wlm", "munge", "iproute2"]
        for words in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", *words], capture_output=True, text=True, env=quiet)
            if done.returncode:
                return f"apt-get {words[0]} fails: {done.stderr.strip()[-200:]}"
    probe = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this machine does not let us make network namespaces"
    call("ip", "netns", "del", probe)
    return ""


def main() -> int:
    """Run the cases; 1 if any failed."""
    global work
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cluster.json")
    options = parser.parse_args()
    why = missing()
    if why:
        print(f"cluster-test: skipped, {why}")
        return 0
    work = Path(tempfile.gettempdir()) / "onehour-cluster"  # one at a time: what an earlier one has left is cleared
    os.environ["SLURM_CONF"] = str(work / "slurm" / "slurm.conf")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(HERE)
    began = time.monotonic()
    cluster("down")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        cluster("up", str(NODES))
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(undisturbed, SEEDS))
            found = list(pool.map(tried, [name for name in CASES if options.only in name]))
        for number, each in enumerate(found):
            if not each["ok"]:  # its moments may have passed by while others took the cores
                found[number] = tried(each["case"], "-again") | {"first_try": each["said"]}
    finally:
        cluster("down")
    passed = sum(each["ok"] for each in found)
    print(f"{passed} passed, {len(found) - passed} failed ({time.monotonic() - began:.0f} s)")
    if options.write:
        from benchmarks import results  # which imports torch, and needs a clone

        slurm = call("slurmd", "-V").split()[-1]
        results.write(__file__, "cluster", {"slurm": slurm, "passed": passed, "cases": found})
    if passed == len(found):
        shutil.rmtree(work, ignore_errors=True)
    return int(passed < len(found))


if __name__ == "__main__":
    sys.exit(main())
