"""How long a run stands still when one of its processes is killed: from the kill to the first step behind it.

    python -m campaigns.restarts [--cases N]

Two processes under `onehour train --restarts`, five kills a case. The moment of a step is taken from the checkpoint
that it leaves (`--save-every 1`), so it counts the save too. The 95th percentile over all kills must be at most ten
seconds on two cores that do nothing else; a busy machine is said to be one, by its load.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.ledger import OUT, lines, percentile, run
from campaigns.starting import Started, emptied, ready, trainers

CAMPAIGN = "restarts"
KILLS = 5
LIMIT = 10.0
HANGS = 120.0
"""Seconds after which a restart counts as none."""


def newest(folder: Path) -> float:
    """When the last checkpoint was made, by the clock of files; 0 without one."""
    times = [path.stat().st_mtime for path in folder.glob("checkpoints/iteration-*") if path.exists()]
    return max(times, default=0.0)


def killed(started: Started, folder: Path, victim: int) -> dict[str, Any]:
    """Kill one of the processes, and wait for the first step of the next ones."""
    before = trainers(started.pid)
    since, moment = time.monotonic(), time.time()
    os.kill(before[victim], signal.SIGKILL)
    anew = ready(lambda: len(now := trainers(started.pid)) == 2 and not set(now) & {*before, started.pid}, HANGS)
    back, moment = time.monotonic() - since, time.time() if anew else moment
    stepped = anew and ready(lambda: newest(folder) > moment, HANGS)
    seconds = time.monotonic() - since
    return {"victim": victim, "ok": stepped, "started": round(back, 2), "seconds": round(seconds, 2)}


def restarted(case: int, kills: int = KILLS) -> dict[str, Any]:
    """A run whose processes are killed now and then."""
    draw = random.Random(f"{CAMPAIGN} {case}")
    load = os.getloadavg()[0]
    flags = ("--processes", "2", "--epochs", "500", "--save-every", "1", "--restarts", str(kills + 1))
    with emptied(CAMPAIGN) as place, Started(place / "run", flags) as started:
        found: list[dict[str, Any]] = []
        if ready(lambda: newest(started.folder), HANGS):
            for _ in range(kills):
                time.sleep(draw.uniform(0.3, 2.0))
                found.append(killed(started, started.folder, draw.randrange(2)))
        started.process.send_signal(signal.SIGTERM)
        code = started.wait(60)
        seconds = [kill["seconds"] for kill in found]
        ok = len(found) == kills and all(kill["ok"] for kill in found) and code == 75 and not started.left()
        said = "" if ok else started.said()[-2000:]
        return {"ok": ok, "runs": len(found), "seconds": seconds, "load": load, "kills": found, "said": said}


def main() -> int:
    """1 if any restart failed, or they take too long."""
    failed = run(CAMPAIGN, ((CAMPAIGN, case, partial(restarted, case)) for case in range(6)))
    seconds = [value for entry in lines(OUT / f"{CAMPAIGN}.jsonl") for value in entry["seconds"]]
    slow = percentile(seconds, 0.95)
    print(f"restarts: median {percentile(seconds, 0.5):.1f} s, 95 % within {slow:.1f} s, load {os.getloadavg()[0]:.1f}")
    return failed or int(slow > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
