"""What `onehour plan` foresees of p processes, beside runs on 1, 2 and 4 that talk over links of a known bandwidth.

    python benchmarks/cluster_model.py

As root, with iproute2: each process has a network namespace of its own, whose link to a switch is limited both ways by
tc's token bucket filter. What is real is the training loop and its reduction, by Gloo over TCP; computing is sleeping,
for a time that varies from one iteration and process to the next. From a run on 1, runs on 2 and 4 are foreseen, and
from one on 2 that on 4. Writes results/cluster_model.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import onehour
from onehour.config import Recipe
from onehour.rules.keys import seed_for
from onehour.training.record import Run
from results import write

HERE = Path(__file__).parent
WORKERS, PER_WORKER, ITERATIONS = 4, 4, 12
SPREAD = 0.1
"""σ of a process's computing, as a share of it."""
CASES: dict[str, dict[str, float]] = {
    "one bucket": {"parameters": 1e6, "image_seconds": 0.1, "gigabits": 0.1},
    "two buckets": {"parameters": 8e6, "image_seconds": 0.3, "gigabits": 0.25},
}
"""Of two buckets the first is sent while backward goes on."""
WITHIN = 0.15


class Sleeping(torch.autograd.Function):
    """Identity whose backward takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None


class Net(nn.Module):
    """Sleeps a third of an image's time in forward and the rest in backward, half before its larger part's gradient."""

    def __init__(self, parameters: int, image_seconds: float) -> None:
        super().__init__()
        self.image_seconds, self.iteration = image_seconds, 0
        self.early = nn.Parameter(torch.zeros(parameters // 8))
        self.late = nn.Parameter(torch.zeros(parameters - parameters // 8))
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 2); every parameter has a gradient, and none matters."""
        x = images.flatten(1)
        if not self.training:
            return self.fc(x)
        self.iteration += 1
        key = seed_for(0, "sleeping", int(os.environ.get("RANK", "0")), self.iteration)
        seconds = len(x) * self.image_seconds * (1 + SPREAD * np.random.default_rng(key).standard_normal())
        time.sleep(seconds / 3)
        x = Sleeping.apply(x + 0 * self.early.sum(), seconds / 3)
        x = Sleeping.apply(x + 0 * self.late.sum(), seconds / 3)
        return self.fc(x)


def net() -> Net:
    """The model of the case that the environment names."""
    case = CASES[os.environ["CASE"]]
    return Net(int(case["parameters"]), case["image_seconds"])


def data() -> tuple[TensorDataset, TensorDataset]:
    """As many samples as the iterations take, in an epoch."""
    train, validation = (
        TensorDataset(torch.zeros(count, 1, 2, 2), torch.arange(count) % 2)
        for count in (WORKERS * PER_WORKER * ITERATIONS, PER_WORKER)
    )
    return train, validation


def recipe() -> Recipe:
    """One epoch of the case."""
    return Recipe(
        name="cluster",
        model="cluster_model:net",
        data="cluster_model:data",
        samples=WORKERS * PER_WORKER * ITERATIONS,
        minibatch=WORKERS * PER_WORKER,
        base_minibatch=WORKERS * PER_WORKER,
        per_worker=PER_WORKER,
        epochs=1,
        warmup="none",
    )


@contextmanager
def hosts(processes: int, gigabits: float) -> Iterator[list[str]]:
    """Names of network namespaces, 10.77.0.1 and so on, that a switch joins, each link limited both ways."""
    names = [f"onehour{os.getpid()}-{number}" for number in range(processes)]
    switch = f"onehour{os.getpid()}-switch"
    shape = ("tbf", "rate", f"{1000 * gigabits:g}mbit", "burst", "256kb", "latency", "500ms")
    made: list[str] = []
    try:
        for name in (switch, *names):
            ip("netns", "add", name)
            made.append(name)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            for space, device in ((name, "eth0"), (name, "lo"), (switch, port)):
                ip("-n", space, "link", "set", device, "up")
                if device != "lo":
                    call("tc", "-n", space, "qdisc", "add", "dev", device, "root", *shape)
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def ip(*arguments: str) -> None:
    call("ip", *arguments)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()} (this needs root and iproute2)")


def train(case: str, processes: int, folder: Path) -> Run:
    """A run of the case, each process in a namespace of its own."""
    file = folder / "recipe.toml"
    file.write_text(recipe().to_toml(), encoding="utf-8")
    out = folder / f"p{processes}"
    command = [sys.executable, "-m", "onehour", "train", str(file), "--trust", "--out", str(out)]
    command += ["--device", "cpu", "--threads", "1", "--workers-per-pass", str(WORKERS)]
    environ = os.environ | {"CASE": case, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0"}
    with hosts(processes, CASES[case]["gigabits"]) as names:
        started = [
            subprocess.Popen(["ip", "netns", "exec", name, *command], cwd=HERE, env=environ | {"RANK": str(rank)})
            for rank, name in enumerate(names)
        ]
        codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a process of {case} on {processes} left with {max(codes)}")
    return Run(out)


def seconds_of(run: Run) -> float:
    """Of an iteration, on average."""
    return sum(line["seconds"] for line in run.timing) / sum(len(line["steps_ms"]) for line in run.timing)


def row(case: str, base: Run, other: Run) -> dict[str, Any]:
    """What is foreseen of a run from another one, beside what it took."""
    processes = other.environment["processes"]
    planned = onehour.plan(recipe(), run=base.folder, processes=processes, bandwidth=CASES[case]["gigabits"], latency=0)
    foreseen, took = planned["iteration_seconds"].value, seconds_of(other)
    return {
        "case": case,
        **CASES[case],
        "from": base.environment["processes"],
        "processes": processes,
        "spread": SPREAD,
        "foreseen_s": foreseen,
        "foreseen_reduction_s": planned["reduction_seconds"].value,
        "measured_s": took,
        "measured_reduction_s": other.summary["step_ms"]["reduction"] / 1e3,
        "ratio": foreseen / took,
        "within": abs(foreseen / took - 1) <= WITHIN,
    }


def main() -> int:
    """Run each case on 1, 2 and 4 processes."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            one, two, four = (train(case, processes, Path(folder)) for processes in (1, 2, 4))
            rows += [row(case, one, two), row(case, one, four), row(case, two, four)]
    for each in rows:
        print(
            f"{each['case']}, {each['from']} → {each['processes']}: {each['ratio']:.3f} of {each['measured_s']:.3f} s"
        )
    write(__file__, "cluster_model", {"iterations": ITERATIONS, "within": WITHIN, "rows": rows})
    return 0 if all(each["within"] for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
