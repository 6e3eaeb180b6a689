"""onehour's trainer against a bare loop, the same threads, interleaved: CPU time an image and wall time.

    python benchmarks/trainer.py [--rounds 7] [--cases digits-512,digits-32,resnet50] [--name trainer]

Each measurement is a fresh process (two, under Gloo, for p = 2). Ours is the whole of `onehour.train` between
evaluations: stream, augmentation keys, ghost BatchNorm, finite check, record. A ratio is bare / ours, so 1 is as fast,
above 1 faster; medians over the rounds. Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import onehour
from bare_loop import train as bare
from onehour.models.load import MODELS
from processes import measured
from results import write

# per_worker None: one worker a process, so that both sides pass the same images at once.
CASES: dict[str, dict[str, Any]] = {
    "digits-512": {"model": "resnet8", "minibatch": 512, "per_worker": 16, "epochs": 12, "shape": (8192, 1, 8)},
    "digits-32": {"model": "resnet8", "minibatch": 32, "per_worker": 16, "epochs": 2, "shape": (8192, 1, 8)},
    "resnet50": {"model": "resnet50", "minibatch": 8, "per_worker": None, "epochs": 1, "shape": (40, 3, 224)},
    "resnet50-bf16": {"model": "resnet50", "minibatch": 8, "per_worker": None, "epochs": 1, "shape": (40, 3, 224)},
}


def child(case: str, side: str, threads: int) -> None:
    """One measurement in this process; prints JSON."""
    setting = CASES[case]
    samples, channels, size = setting["shape"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = torch.randn(samples, channels, size, size)
    labels = torch.randint(0, 10, (samples,))
    bf16 = case.endswith("bf16")
    iterations = samples * setting["epochs"] // setting["minibatch"]
    if side == "bare":
        model = MODELS[setting["model"]](channels=channels, classes=10)
        wall, cpu = bare(
            model, images, labels, minibatch=setting["minibatch"], iterations=iterations, lr=0.01, bf16=bf16
        )
    else:
        wall, cpu = ours(setting, TensorDataset(images, labels), iterations, bf16)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "images": iterations * setting["minibatch"], "peak_mib": memory}))


def ours(setting: dict[str, Any], train: TensorDataset, iterations: int, bf16: bool) -> tuple[float, float]:
    """The same iterations by onehour.train; two more to warm up are measured, like the first epoch's, and left out."""
    validation = TensorDataset(*train[:2])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        out = Path(os.environ.get("BENCH_OUT", folder)) / "run"
        sys.stdout, screen = silent, sys.stdout
        run = onehour.train(
            onehour.Recipe(
                name="bench",
                model=setting["model"],
                minibatch=setting["minibatch"],
                per_worker=setting["per_worker"] or setting["minibatch"] // int(os.environ.get("WORLD_SIZE", "1")),
                base_lr=0.01,
                base_minibatch=setting["minibatch"],
                epochs=setting["epochs"] + 1,
                warmup="none",
                precision="bf16" if bf16 else "float32",
            ),
            classes=10,
            data=(train, validation),
            out=out,
        )
        sys.stdout = screen
        lines = run.timing[1:] if int(os.environ.get("RANK", "0")) == 0 else []
    return sum(line["seconds"] for line in lines), sum(line["cpu_seconds"] for line in lines)


def measure(case: str, side: str, processes: int, threads: int) -> dict[str, Any]:
    """One measurement in fresh processes; process 0's numbers."""
    arguments = ("--child", case, side, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        return measured(__file__, *arguments, processes=processes, threads=threads, BENCH_OUT=folder)


def compare(case: str, processes: int, threads: int, rounds: int) -> dict[str, Any]:
    """Interleaved pairs; the order within a pair alternates."""
    pairs = []
    for number in range(rounds):
        order = ("bare", "ours") if number % 2 else ("ours", "bare")
        pairs.append({side: measure(case, side, processes, threads) for side in order})
    row: dict[str, Any] = {"case": case, "processes": processes, "threads": threads, "rounds": rounds}
    for what in ("cpu", "wall"):
        ratios = [pair["bare"][what] / pair["ours"][what] for pair in pairs]
        row[f"{what}_ratio"] = round(statistics.median(ratios), 3)
        row[f"{what}_ratios"] = [round(ratio, 3) for ratio in ratios]
    row["memory_ratio"] = round(
        statistics.median(pair["ours"]["peak_mib"] / pair["bare"]["peak_mib"] for pair in pairs), 3
    )
    for side in ("bare", "ours"):
        speeds = [pair[side]["images"] / pair[side]["wall"] for pair in pairs]
        row[f"{side}_images_per_second"] = round(statistics.median(speeds), 1)
    return row


def main() -> None:
    """Measure every case on 1 and 2 processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--name", default="trainer")
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], options.child[1], int(options.child[2]))
    rows = []
    for case in options.cases.split(","):
        for processes in (int(p) for p in options.processes.split(",")):
            threads = 2 if case.startswith("resnet50") and processes == 1 else 1
            rows.append(compare(case, processes, threads, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    write(__file__, options.name, {"rows": rows})
    return None


if __name__ == "__main__":
    main()
