"""Runs over two and four hosts, each a network namespace of this machine: as Slurm starts them, and as torchrun does.

    python -m campaigns.hosts [--only NAME]

Needs root and `ip netns`; says so where it may not. Each host has its own address, name and loopback device. All runs
are canonical, so their state must be, to the bit, that of one process on one host; also where a host is lost on the
way, or comes later, which elastic torchrun (`--nnodes 1:4`, examples/nodes.sh) must bear.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.ledger import run
from campaigns.starting import TRAIN, emptied, family, ready, state, undisturbed

CAMPAIGN = "hosts"
FLAGS = ("--reduce", "canonical", "--epochs", "3", "--fresh")
NODES = Path(__file__).parents[1] / "examples" / "nodes.sh"
LIMIT = 400.0


def ip(*words: str) -> None:
    """A command that must succeed."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def allowed() -> bool:
    """Whether this machine lets us make network namespaces."""
    try:
        ip("netns", "add", f"probe{os.getpid()}")
        ip("netns", "del", f"probe{os.getpid()}")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class Host:
    """One of several hosts.

    Args:
        number: from 0; its address ends in one more.
    """

    def __init__(self, number: int) -> None:
        self.name, self.address = f"oh{os.getpid()}n{number}", f"10.213.0.{number + 1}"
        self.started: subprocess.Popen[bytes] | None = None
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by `hosts`
        serial = f"{os.getpid()}n{next(SERIAL)}"  # the kernel takes its time to give a name back
        inside, outside = f"i{serial}", f"o{serial}"
        ip("netns", "add", self.name)
        ip("link", "add", outside, "type", "veth", "peer", "name", inside)
        ip("link", "set", inside, "netns", self.name, "name", "eth0")
        ip("link", "set", outside, "master", BRIDGE, "up")
        for words in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", "lo", "up")

    def start(self, command: list[str], before: str = "true", **environ: str) -> None:
        """Start a command on this host."""
        shell = f'hostname {self.name} && mount --bind {TABLE} /etc/hosts && {before} && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", shell, "sh", *command]
        bin_folder = str(Path(sys.executable).parent)
        every = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{bin_folder}:{os.environ['PATH']}"} | environ
        self.started = subprocess.Popen(inside, env=every, stdout=self.log, stderr=self.log, start_new_session=True)

    def said(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read()

    def fail(self) -> None:
        """As a power cut: all its processes are gone."""
        if self.started is not None:
            for pid in family(self.started.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.started.wait()


BRIDGE = f"b{os.getpid()}"
SERIAL = itertools.count()
TABLE = Path(tempfile.gettempdir()) / f"hosts-{os.getpid()}"
"""Stands for /etc/hosts on each of them."""


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts on one network."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    made: list[Host] = []
    try:
        for number in range(count):
            made.append(Host(number))
        TABLE.write_text("".join(f"{host.address} {host.name}\n" for host in made) + "127.0.0.1 localhost\n")
        yield made
    finally:
        for host in made:
            host.fail()
            host.log.close()
            ip("netns", "del", host.name)
        ip("link", "del", BRIDGE)
        TABLE.unlink(missing_ok=True)


def slurm(group: list[Host], folder: Path) -> None:
    """As `srun` does on a step of one task a host."""
    every = {"SLURM_NTASKS": str(len(group)), "SLURM_JOB_ID": "17", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    every["SLURM_STEP_NODELIST"] = ",".join(host.address for host in group)
    command = [sys.executable, "-m", "onehour", *TRAIN, *FLAGS, "--out", str(folder)]
    for task, host in enumerate(group):
        host.start(command, **every, SLURM_PROCID=str(task))


def torchrun(group: list[Host], folder: Path, nodes: str, before: str = "true", first: Host | None = None) -> None:
    """As a person does with examples/nodes.sh."""
    every = {"FIRST": (first or group[0]).address, "NODES": nodes, "PROCESSES": "1", "LAST_CALL": "5"}
    every["RESTARTS"] = "0" if nodes == "2" else "5"
    for host in group:
        last = before if host is group[-1] else "true"
        host.start(["bash", str(NODES), *TRAIN[1:], *FLAGS, "--out", str(folder)], last, **every, ADDRESS=host.address)


def trains(folder: Path, evaluations: int = 1) -> bool:
    """Wait for a run's first evaluations."""
    metrics = folder / "metrics.jsonl"
    return ready(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > evaluations, LIMIT)


def ended(group: list[Host]) -> list[int | None]:
    """Every host's exit code."""
    deadline = time.monotonic() + LIMIT
    codes: list[int | None] = []
    for host in group:
        assert host.started is not None
        try:
            codes.append(host.started.wait(max(1.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def together(count: int, start: Callable[[list[Host], Path], None]) -> Callable[[list[Host], Path], str]:
    """All hosts start, and end well."""

    def case(group: list[Host], folder: Path) -> str:
        start(group[:count], folder)
        codes = ended(group[:count])
        return "" if codes == [0] * count else f"codes {codes}"

    return case


def one_is_lost(group: list[Host], folder: Path) -> str:
    """Of four hosts the last one fails; three go on."""
    torchrun(group, folder, "1:4")
    if not trains(folder):
        return "does not begin"
    group[-1].fail()
    codes = ended(group[:-1])
    return "" if codes == [0] * 3 else f"codes {codes}"


def one_comes_later(group: list[Host], folder: Path) -> str:
    """Two hosts begin; a third one joins them."""
    torchrun(group[:2], folder, "1:4")
    if not trains(folder):
        return "does not begin"
    torchrun([group[2]], folder, "1:4", first=group[0])
    codes = ended(group[:3])
    return "" if codes[:2] == [0, 0] else f"codes {codes}"


def one_sees_another_folder(group: list[Host], folder: Path) -> str:
    """The second host has a file system of its own where the run's folder is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    torchrun(group[:2], folder, "2", before=f"mount -t tmpfs none {folder.parent}")
    ended(group[:2])
    said = "".join(host.said() for host in group[:2])
    return "" if "is not shared: process 1 on" in said else "is not noticed"


UNSHARED = "a folder that is not shared"
CASES: dict[str, Callable[[list[Host], Path], str]] = {
    "srun on 2 hosts": together(2, slurm),
    "srun on 4 hosts": together(4, slurm),
    "torchrun on 2 hosts": together(2, lambda group, folder: torchrun(group, folder, "2")),
    "torchrun on 4 hosts": together(4, lambda group, folder: torchrun(group, folder, "4")),
    "torchrun 1:4, one host is lost": one_is_lost,
    "torchrun 1:4, one host comes later": one_comes_later,
    UNSHARED: one_sees_another_folder,
}


def tried(name: str) -> dict[str, Any]:
    """A case, in hosts of its own."""
    expected, _ = undisturbed("hosts", *FLAGS)
    with emptied(CAMPAIGN) as place, hosts(4) as group:
        folder, started = place / "run", time.monotonic()
        wrong = CASES[name](group, folder)
        seconds = time.monotonic() - started
        whole = (folder / "summary.json").exists() and state(folder) == expected
        if not wrong and not whole and name != UNSHARED:
            wrong = "differs from one process on one host"
        if folder.with_name("run.1").exists():
            wrong = "has started over"
        said = wrong and "\n".join([wrong, *(host.said()[-2500:] for host in group)])
    return {"ok": not wrong, "said": said, "seconds": seconds}


def main() -> int:
    """1 if any case failed; nothing where namespaces are not allowed."""
    if not allowed():
        print("hosts: not tried, this machine does not let us make network namespaces (root, and `ip netns`)")
        return 0
    return run(CAMPAIGN, ((CAMPAIGN, name, partial(tried, name)) for name in CASES))


if __name__ == "__main__":
    sys.exit(main())
