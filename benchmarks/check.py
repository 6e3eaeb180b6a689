"""What `onehour.check.watch` adds to the steps of a loop, behind the 4 that it probes, and once it has seen enough.

    python benchmarks/check.py [--rounds 9] [--cases digits-32,digits-512,resnet50] [--processes 1,2] [--name check]

Each case is one process (two, under Gloo and DDP, for p = 2) in which blocks of the same loop take turns: bare, and
watched. A block is 3 epochs over a DataLoader; a watch looks at the first 2. A ratio is watched / bare over the same
steps, epochs' beginnings included, so 1.05 is 5 % more; medians over the rounds. Writes results/NAME.json.

    python benchmarks/check.py --start [--rounds 9]

The CPU seconds of `onehour check` for a script of ten updates, of the script alone, and of `import torch`, all
processes included; the three take turns. Writes results/check_start.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from onehour.check import watch
from onehour.models.load import MODELS
from processes import measured
from results import write

PROBED = 4
CLOCKS = ("wall", "cpu")
CASES: dict[str, dict[str, Any]] = {
    "digits-32": {"model": "resnet8", "batch": 32, "batches": 60, "shape": (1, 8, 8)},
    "digits-512": {"model": "resnet8", "batch": 512, "batches": 40, "shape": (1, 8, 8)},
    "resnet50": {"model": "resnet50", "batch": 16, "batches": 10, "shape": (3, 32, 32)},
}


def child(case: str, rounds: int, threads: int) -> None:
    """One process's part; process 0 prints JSON."""
    setting = CASES[case]
    torch.set_num_threads(threads)
    rank = int(os.environ.get("RANK", "0"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(rank)
    samples = setting["batch"] * setting["batches"]
    data = TensorDataset(
        torch.randn(samples, *setting["shape"], generator=generator),
        torch.randint(10, (samples,), generator=generator),
    )
    pairs = []
    for number in range(rounds + 1):
        order = (False, True) if number % 2 else (True, False)
        pairs.append({watched: block(setting, data, watched=watched) for watched in order})
    if rank == 0:
        print(json.dumps(row(case, setting, pairs[1:])))
    if several:
        dist.destroy_process_group()


def block(setting: dict[str, Any], data: TensorDataset, *, watched: bool) -> dict[str, list[float]]:
    """The seconds of every step of 3 epochs, its batch's loading included: by the clock, and of this process's CPU."""
    torch.manual_seed(0)
    model: nn.Module = MODELS[setting["model"]](channels=setting["shape"][0], classes=10)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    seconds: dict[str, list[float]] = {clock: [] for clock in CLOCKS}
    with watch(model, optimizer) if watched else contextlib.nullcontext():
        loader = DataLoader(data, batch_size=setting["batch"], shuffle=True)
        for _ in range(3):
            begun = now()
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                ended = now()
                for clock, before, after in zip(CLOCKS, begun, ended, strict=True):
                    seconds[clock].append(after - before)
                begun = ended
    return seconds


def now() -> tuple[float, float]:
    """On both clocks."""
    return time.perf_counter(), time.process_time()


def row(case: str, setting: dict[str, Any], pairs: list[dict[bool, dict[str, list[float]]]]) -> dict[str, Any]:
    """Medians over the rounds; `after` leaves out the step in which the watch takes itself away."""
    seen = 2 * setting["batches"]
    parts = {"probed": slice(PROBED), "watched": slice(PROBED, seen), "after": slice(seen + 1, None)}
    found: dict[str, Any] = {"case": case, "processes": int(os.environ.get("WORLD_SIZE", "1")), "rounds": len(pairs)}
    found["bare_ms"] = round(1e3 * statistics.median(statistics.median(pair[False]["wall"]) for pair in pairs), 3)
    for name, part in parts.items():
        for clock in CLOCKS:
            ratios = [sum(pair[True][clock][part]) / sum(pair[False][clock][part]) for pair in pairs]
            found[f"{name}_{clock}_ratio"] = round(statistics.median(ratios), 4)
            found[f"{name}_{clock}_ratios"] = [round(ratio, 4) for ratio in ratios]
    return found


SMALL = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(10):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
    optimizer.step()
"""


def start(rounds: int) -> dict[str, Any]:
    """The CPU seconds of a whole check of a small script, and of what it is compared with."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "train.py")
        script.write_text(SMALL, encoding="utf-8")
        commands = {"import_torch": ["-c", "import torch"], "script": [str(script)]}
        commands["check"] = ["-m", "onehour", "check", str(script)]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                seconds[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    above = [check - bare for check, bare in zip(seconds["check"], seconds["import_torch"], strict=True)]
    medians = {f"{name}_cpu_s": round(statistics.median(each), 2) for name, each in seconds.items()}
    spread = {"above_import_torch_s": round(statistics.median(above), 2), "lowest_s": round(min(above), 2)}
    return {"rounds": rounds, **medians, **spread, "highest_s": round(max(above), 2)}


def main() -> None:
    """Measure every case on 1 and 2 processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--name", default="check")
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]), int(options.child[2]))
    if options.start:
        write(__file__, "check_start", {"rows": [start(options.rounds)]})
        return None
    rows = []
    for case in options.cases.split(","):
        for processes in (int(p) for p in options.processes.split(",")):
            arguments = ("--child", case, str(options.rounds), "1")
            rows.append(measured(__file__, *arguments, processes=processes, threads=1))
            print(json.dumps(rows[-1]), flush=True)
    write(__file__, options.name, {"probed_steps": PROBED, "rows": rows})
    return None


if __name__ == "__main__":
    main()
