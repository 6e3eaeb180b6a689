"""What a save costs a run: ours, in the background, against torch.save and torch.distributed.checkpoint, of one state.

    python benchmarks/checkpoint.py [--rounds 9]

The state is ResNet-50's weights, statistics and velocity, 204 MB, and it trains, on 8 images of 96 pixels a step, with
this machine's cores. A block of steps with one save at its beginning is paired with one without, in turn. `held_ms` is
the time that the training thread spent saving, `beside_cpu_ms` what was computed beside it: of ours by its thread's
clock, of others what the pair differs by. At one save a minute a save costs (held + beside / threads) of 60 s. All are
on disk (fsync) when they count as done. Then writing against verifying. Medians; writes results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from onehour import Recipe
from onehour.dist.group import Group
from onehour.models.load import load_model
from onehour.training.checkpoint import Checkpoints, Store
from onehour.training.state import Network
from results import write

STEPS, SIDE, BATCH = 3, 96, 8
"""Of a block: long enough for a save in the background to end in it."""
MINUTE = 60_000


class Ours:
    """In the background, from where the state lies until the next update."""

    name = "onehour"

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.network = Network(model, optimizer)
        self.checkpoints = Checkpoints(folder, Recipe(), Group(), warn=print)
        self.beside = 0.0
        self._count = 0
        store: Any = self.checkpoints.store
        inner: Callable[..., Any] = store.write

        def timed(*arguments: Any) -> None:
            inner(*arguments)
            self.beside = time.thread_time()  # of the one thread that copies, writes and thins

        store.write = timed

    def start(self) -> None:
        """Begin a save."""
        self._count += 1
        progress = {"iteration": self._count, "position": 0, "totals": [0.0, 0.0], "build": {}}
        self.checkpoints.save(self.network, progress)

    def before_update(self) -> None:
        """The state is about to change."""
        self.network.finish_copy()

    def end(self) -> None:
        """It is on disk."""
        assert self.checkpoints.wait()


class Torch:
    """torch.save of both state dicts, and fsync."""

    name = "torch.save"

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.model, self.optimizer = folder / "state.pt", model, optimizer
        self.beside = 0.0

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def start(self) -> None:
        """Save, at once."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())

    def before_update(self) -> None:
        """It was saved at once."""

    def end(self) -> None:
        """It was saved at once."""


class Dcp(Torch):
    """torch.distributed.checkpoint.save."""

    name = "torch.distributed.checkpoint.save"

    def start(self) -> None:
        """Save, at once."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        dcp_save(self.state(), checkpoint_id=self.path.parent)


class DcpAsync(Dcp):
    """torch.distributed.checkpoint.async_save: copies, then writes beside training."""

    name = "torch.distributed.checkpoint.async_save"

    def start(self) -> None:
        """Copy."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self._future: Any = async_save(self.state(), checkpoint_id=self.path.parent)

    def end(self) -> None:
        """It is on disk."""
        self._future.result()


class Training:
    """ResNet-50 with velocity."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = load_model("resnet50", channels=3, classes=1000)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images = torch.randn(BATCH, 3, SIDE, SIDE)

    def block(self, way: Any = None) -> dict[str, float]:
        """Milliseconds by the clock, of all threads, and of holding the training thread, of a block's steps."""
        held = 0.0
        wall, cpu, beside = time.perf_counter(), time.process_time(), way.beside if way else 0.0
        if way:
            started = time.perf_counter()
            way.start()
            held += time.perf_counter() - started
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            self.model(self.images).square().mean().backward()
            if way:
                started = time.perf_counter()
                way.before_update()
                held += time.perf_counter() - started
            self.optimizer.step()
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "held": held}
        if way:
            way.end()
            found["beside"] = way.beside - beside
        return {name: 1e3 * seconds for name, seconds in found.items()}


def compare(training: Training, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each way to save."""
    ways = [kind(folder / kind.name, training.model, training.optimizer) for kind in (Ours, Torch, Dcp, DcpAsync)]
    pairs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {way.name: [] for way in ways}
    training.block()
    for turn in range(rounds + 1):
        for way in ways if turn % 2 else reversed(ways):
            pairs[way.name].append((training.block(), training.block(way)))
    rows = []
    for way in ways:
        measured = pairs[way.name][1:]  # the first one makes folders and buffers
        held = statistics.median(after["held"] for _, after in measured)
        extra = statistics.median(after["cpu"] - before["cpu"] for before, after in measured)
        beside = statistics.median(after["beside"] for _, after in measured) or max(0.0, extra - held)
        cost = (held + beside / torch.get_num_threads()) / MINUTE
        rows.append(
            {
                "way": way.name,
                "rounds": rounds,
                "held_ms": round(held, 1),
                "beside_cpu_ms": round(beside, 1),
                "slower_ms": round(statistics.median(after["wall"] - before["wall"] for before, after in measured), 1),
                "cost_percent_at_one_a_minute": round(100 * cost, 3),
            }
        )
    return rows


def verifying(training: Training, rounds: int, folder: Path) -> dict[str, Any]:
    """Writing a checkpoint against reading and verifying it, in turn; and the longest that an update may be held."""
    ours = Ours(folder, training.model, training.optimizer)
    store: Store = ours.checkpoints.store
    times: dict[str, list[float]] = {"write": [], "verify": [], "copy": []}
    size = 0
    for _ in range(rounds + 1):
        started = time.perf_counter()
        ours.start()
        ours.end()
        times["write"].append(time.perf_counter() - started)
        started = time.perf_counter()
        stored = store.newest(print)
        times["verify"].append(time.perf_counter() - started)
        assert stored is not None
        started = time.perf_counter()
        ours.start()
        ours.before_update()
        times["copy"].append(time.perf_counter() - started)
        ours.end()
        size = sum(len(content) for content in stored.contents)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    ratio = statistics.median(v / w for v, w in zip(times["verify"][1:], times["write"][1:], strict=True))
    return {
        "bytes": size,
        "write_ms": round(1e3 * medians["write"], 1),
        "verify_ms": round(1e3 * medians["verify"], 1),
        "held_ms_if_an_update_follows_at_once": round(1e3 * medians["copy"], 1),
        "verify_to_write": round(ratio, 3),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to try (the system's for temporary files)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' own
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/meet", rank=0, world_size=1)
        training = Training()
        rows = compare(training, options.rounds, Path(name))
        verified = verifying(training, options.rounds, Path(name) / "verified")
        dist.destroy_process_group()
    for row in rows:
        print(row)
    print(verified)
    write(__file__, "checkpoint", {"threads": torch.get_num_threads(), "rows": rows, "verifying": verified})


if __name__ == "__main__":
    main()
