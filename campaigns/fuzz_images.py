"""Read thousands of damaged image files of every format: no traceback, no hang, no memory.

    python -m campaigns.fuzz_images [--images 20000] [--minutes 30] [--fresh]

Each is made from its number, so a finding can be had again: `damaged_images.attempt(NUMBER)`. The result is
benchmarks/results/fuzz.json; the same command goes on with one that is not complete, else begins again, and leaves with
1 for findings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from campaigns import damaged_images

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"
CHUNK = 250
SECONDS = 5.0
"""Of CPU time, since others may use the machine too: an image that takes more hangs."""
PATIENCE = 60.0
"""And by the clock: one that does nothing at all."""
GIBIBYTE = 2**20
"""In KiB: what reading may hold at most."""


def work(numbers: range, tell: Connection) -> None:
    """Read images in a process of their own, and tell of each before and after."""
    torch.set_num_threads(1)  # threads that computed before are not in this process
    for number in numbers:
        tell.send((number, None, 0.0, 0))
        said, seconds = damaged_images.attempt(number)
        tell.send((number, said, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    tell.send(None)


def chunk(numbers: range, patience: float = PATIENCE) -> dict[str, Any]:
    """What reading these images gave: outcomes, findings, the slowest, the most memory."""
    found: dict[str, Any] = {"outcomes": Counter(), "findings": [], "slowest": [0.0, None], "peak_kib": 0}
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(numbers, there))
    process.start()
    there.close()
    number: int | None = None
    while True:
        try:
            told = here.recv() if here.poll(patience if number is not None else PATIENCE) else "hangs"
        except EOFError:
            process.join()
            told = f"ended its process with {process.exitcode}"
        if told is None:
            break
        if isinstance(told, str):
            found["findings"].append([number, told])
            process.kill()
            break
        number, said, took, memory = told
        if said is None:
            continue
        found["outcomes"][said if said in ("decoded", "refused") else "failed"] += 1
        if said not in ("decoded", "refused"):
            found["findings"].append([number, said])
        if took > SECONDS:
            found["findings"].append([number, f"takes {took:.1f} s"])
        found["slowest"] = max(found["slowest"], [round(took, 3), number], key=lambda slow: slow[0])
        if memory > GIBIBYTE and found["peak_kib"] <= GIBIBYTE:
            found["findings"].append([number, f"holds {memory // 1024} MiB"])
        found["peak_kib"] = max(found["peak_kib"], memory)
    process.join()
    here.close()
    if number is not None and number + 1 < numbers.stop:  # the rest, after one that ended its process
        rest = chunk(range(number + 1, numbers.stop), patience)
        found["outcomes"] += rest["outcomes"]
        found["findings"] += rest["findings"]
        found["slowest"] = max(found["slowest"], rest["slowest"], key=lambda slow: slow[0])
        found["peak_kib"] = max(found["peak_kib"], rest["peak_kib"])
    return found


def main() -> int:
    """Go on until all images are read, or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--fresh", action="store_true", help="begin again")
    options = parser.parse_args()
    from benchmarks import results  # which needs a clone

    total: dict[str, Any] = {"images": 0, "outcomes": {}, "findings": [], "slowest": [0.0, None], "peak_mib": 0}
    if RESULT.exists() and not options.fresh:
        before = json.loads(RESULT.read_text())
        same = before["provenance"].get("source") == results.state_of(__file__)["source"]
        if same and before["images"] < options.images:
            total = {key: before[key] for key in total}
    until = time.monotonic() + 60 * options.minutes
    while total["images"] < options.images and time.monotonic() < until:
        numbers = range(total["images"], min(total["images"] + CHUNK, options.images))
        found = chunk(numbers)
        total["images"] = numbers.stop
        total["outcomes"] = dict(Counter(total["outcomes"]) + found["outcomes"])
        total["findings"] += found["findings"]
        total["slowest"] = max(total["slowest"], found["slowest"], key=lambda slow: slow[0])
        total["peak_mib"] = max(total["peak_mib"], found["peak_kib"] // 1024)
        results.write(__file__, "fuzz", total)
        print(
            f"{total['images']} of {options.images}: {total['outcomes']}, slowest {total['slowest'][0]:.2f} s,"
            f" peak {total['peak_mib']} MiB, {len(total['findings'])} findings",
            flush=True,
        )
    for number, said in total["findings"]:
        print(f"image {number}: {said}")
    return int(bool(total["findings"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
