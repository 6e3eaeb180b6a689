"""How long a run stands still when one of its processes is killed: from the kill to the first step behind it.

    python tests/faults/restarts.py [--cases 6]

Two processes under `onehour train --restarts`, five kills a case. The moment of a step is taken from the checkpoint
that it leaves (`--save-every 1`), so it counts the save too. The 95th percentile over all kills must be at most ten
seconds on two cores that do nothing else; a busy machine is said to be one, by its load.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from starting import Started, cut, ready, trainers
from summary import OUT, add, lines, missing, percentile, report

CAMPAIGN = "restarts"
KILLS = 5
LIMIT = 10.0
HANGS = 120.0
"""Seconds after which a restart counts as none."""


def newest(folder: Path) -> float:
    """When the last checkpoint was made, by the clock of files; 0 without one."""
    times = [path.stat().st_mtime for path in folder.glob("checkpoints/iteration-*") if path.exists()]
    return max(times, default=0.0)


def killed(run: Started, folder: Path, victim: int) -> dict[str, Any]:
    """Kill one of the processes, and wait for the first step of the next ones."""
    before = trainers(run.pid)
    since, moment = time.monotonic(), time.time()
    os.kill(before[victim], signal.SIGKILL)
    anew = ready(lambda: len(now := trainers(run.pid)) == 2 and not set(now) & {*before, run.pid}, HANGS)
    started, moment = time.monotonic() - since, time.time() if anew else moment
    stepped = anew and ready(lambda: newest(folder) > moment, HANGS)
    seconds = time.monotonic() - since
    return {"victim": victim, "ok": stepped, "started": round(started, 2), "seconds": round(seconds, 2)}


def restarted(case: int, kills: int = KILLS) -> dict[str, Any]:
    """A run whose processes are killed now and then."""
    draw = random.Random(f"{CAMPAIGN} {case}")
    folder = (OUT / f"{CAMPAIGN}-{os.getpid()}" / str(case)).absolute()
    cut(folder)
    load = os.getloadavg()[0]
    run = Started(folder, ("--processes", "2", "--epochs", "500", "--save-every", "1", "--restarts", str(kills + 1)))
    try:
        found: list[dict[str, Any]] = []
        if ready(lambda: newest(folder), HANGS):
            for _ in range(kills):
                time.sleep(draw.uniform(0.3, 2.0))
                found.append(killed(run, folder, draw.randrange(2)))
        run.process.send_signal(signal.SIGTERM)
        code = run.wait(60)
        seconds = [kill["seconds"] for kill in found]
        ok = len(found) == kills and all(kill["ok"] for kill in found) and code == 75 and not run.left()
        said = "" if ok else run.said()[-2000:]
        return {"ok": ok, "runs": len(found), "seconds": seconds, "load": load, "kills": found, "said": said}
    finally:
        run.end()
        cut(folder.parent)


def main() -> int:
    """Run what is missing; 1 if any restart failed, or they take too long."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=6)
    options = parser.parse_args()
    ledger = OUT / f"{CAMPAIGN}.jsonl"
    for case in missing(ledger, CAMPAIGN, range(options.cases)):
        add(ledger, CAMPAIGN, case, **restarted(case))
    seconds = [value for entry in lines(ledger) for value in entry["seconds"]]
    slow = percentile(seconds, 0.95)
    print(f"restarts: median {percentile(seconds, 0.5):.1f} s, 95 % within {slow:.1f} s, load {os.getloadavg()[0]:.1f}")
    return report(ledger) or int(slow > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
