"""Seeds trained as one network beside the same seeds one by one, in CPU seconds; and how long a default sweep takes.

    python benchmarks/sweep.py

Pairs are interleaved, on one thread, and their median is given; then `onehour sweep digits` is trained once.
Writes results/sweep.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch

from onehour.cli import main as onehour
from onehour.data.sources import complete
from onehour.execution import Execution
from onehour.recipes import recipe
from onehour.sweeps.task import Task, run_task
from onehour.training.record import StoppedError
from results import write

MINIBATCHES = (32, 128, 512, 2048)
SEEDS, PAIRS = 5, 5
SAMPLES_A_TURN = 16_384
"""Trained on by each seed in a turn: two epochs, with their evaluations."""


def turn(minibatch: int, groups: list[range]) -> float:
    """CPU seconds of training the seeds, each group as one network."""
    base, _ = complete(recipe("digits", minibatch=minibatch))
    steps = SAMPLES_A_TURN // minibatch
    spent = 0.0
    for seeds in groups:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), suppress(StoppedError):
            recipes = tuple(base.replace(seed=seed) for seed in seeds)
            task = Task(recipes, tuple(Path(folder) / str(seed) for seed in seeds))
            stop = After(steps)
            try:
                run_task(task, Execution(device="cpu", threads=1), stop)
            finally:
                spent += time.process_time() - stop.since
    return spent


class After:
    """Asks to stop after so many iterations; counts CPU time from the first."""

    def __init__(self, steps: int) -> None:
        self.left, self.since = steps, 0.0

    def __call__(self) -> bool:
        self.since = self.since or time.process_time()
        self.left -= 1
        return self.left < 0


def main() -> None:
    """Measure the pairs, write the results."""
    torch.set_num_threads(1)
    table = []
    for minibatch in MINIBATCHES:
        pairs = []
        for _ in range(PAIRS):
            together = turn(minibatch, [range(SEEDS)])
            alone = turn(minibatch, [range(seed, seed + 1) for seed in range(SEEDS)])
            pairs.append({"together": together, "alone": alone, "ratio": alone / together})
        ratio = statistics.median(pair["ratio"] for pair in pairs)
        print(f"minibatch {minibatch}: {ratio:.2f} times as fast together")
        table.append({"minibatch": minibatch, "seeds": SEEDS, "ratio": ratio, "pairs": pairs})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        code = onehour(["sweep", "digits", "--out", str(Path(folder) / "sweep")])
        seconds = time.perf_counter() - started
    if code:
        raise SystemExit(code)
    write(__file__, "sweep", {"table": table, "default_sweep_seconds": seconds})


if __name__ == "__main__":
    main()
