"""The canonical sum against the engine's all-reduce, 1 to 200 MB, on 2 and 4 processes of this machine (Gloo).

    python benchmarks/reduce.py [--rounds 15]

Both run in the same processes, in turn; a ratio is canonical / all-reduce, medians over the rounds. That is the
reduction alone, which both modes hide behind backward where there are several buckets. `steps` has what a whole step
of digits at 16 workers costs in both modes, on 1 process too, with one worker in a canonical pass and with four.
Writes results/reduce.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onehour.dist.canonical import canonical_sum
from onehour.dist.group import Group, joined
from onehour.recipes import digits
from onehour.sweeps.verify import trace
from processes import measured
from results import write

MEGABYTES = (1, 10, 100, 200)
STEPS = 30
TOGETHER = (1, 4)
"""Workers in a canonical pass; four on four processes is all that each has."""


def child(rounds: int) -> None:
    """One process's part; process 0 prints JSON."""
    torch.set_num_threads(1)
    with joined("cpu") as group, tempfile.TemporaryDirectory() as folder:
        rows = [compare(megabytes, rounds, group) for megabytes in MEGABYTES if group.size > 1]
        steps = []
        for together in TOGETHER:
            trace(digits(minibatch=256, canonical_pass=together), steps=STEPS, group=group, folder=Path(folder))
            if group.rank == 0:
                steps.append({"processes": group.size, "canonical_pass": together, **timed_steps(Path(folder), group)})
        if group.rank == 0:
            print(json.dumps({"rows": rows, "steps": steps}))


def timed_steps(folder: Path, group: Group) -> dict[str, Any]:
    """What a step took in both modes, as `trace` has written it."""
    seconds = {
        mode: json.loads((folder / f"p{group.size}-{mode}-float32.json").read_text())["seconds_a_step"]
        for mode in ("fast", "canonical")
    }
    return {"seconds": seconds, "ratio": seconds["canonical"] / seconds["fast"]}


def compare(megabytes: int, rounds: int, group: Group) -> dict[str, Any]:
    """Both sums of one vector, in turn."""
    vector = torch.randn(megabytes * 2**20 // 4)
    scratch = torch.empty(len(vector) // 2)  # as the trainer keeps it
    rounds = max(3, rounds // (1 + megabytes // 50))
    times: dict[str, list[float]] = {"all_reduce": [], "canonical": []}
    for _ in range(rounds + 1):
        times["all_reduce"].append(timed(lambda: dist.all_reduce(vector)))
        times["canonical"].append(timed(lambda: canonical_sum(vector, group, scratch)))
        vector.div_(group.size)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return {
        "processes": group.size,
        "megabytes": megabytes,
        "rounds": rounds,
        "all_reduce_ms": round(1e3 * medians["all_reduce"], 2),
        "canonical_ms": round(1e3 * medians["canonical"], 2),
        "ratio": round(medians["canonical"] / medians["all_reduce"], 3),
    }


def timed(action: Callable[[], Any]) -> float:
    """Seconds from a common start."""
    dist.barrier()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Measure on 1, 2 and 4 processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.child:
        return child(options.rounds)
    arguments = ("--child", "--rounds", str(options.rounds))
    found = [measured(__file__, *arguments, processes=processes, threads=1) for processes in (1, 2, 4)]
    for result in found:
        for row in result["rows"]:
            print(json.dumps(row))
        print(json.dumps(result["steps"]))
    content = {name: [row for result in found for row in result[name]] for name in ("rows", "steps")}
    write(__file__, "reduce", content)
    return None


if __name__ == "__main__":
    main()
