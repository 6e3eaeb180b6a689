"""A quarter of an hour with a kill about every minute: nothing grows, and nothing is left behind.

    python tests/faults/soak.py [--minutes 15] [--every 60]

Two processes with a loader each under `onehour train --restarts`. Victims are drawn among training processes, loaders
and the launcher; after the launcher's death the same command is given again. Memory and open files of the launcher and
the training processes, files in the run's folder, in /dev/shm and in the folder for temporary files are counted before
each kill, when the run has been undisturbed for a while; the last counts must not exceed the first ones. Processes that
are left when a launcher has died are counted after ten seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from starting import LOADED, Started, cut, family, ready, trainers
from summary import OUT, add, missing, report

CAMPAIGN = "soak"
FLAGS = (*LOADED, "--processes", "2", "--epochs", "100000", "--restarts", "1000")
TEMPORARY = "temporary"
MEMORY = 1.1
"""How much the memory of a process may exceed what it was at first: allocators are not exact."""


def files(folder: Path) -> int:
    """How many there are below a folder, while no checkpoint is being written."""
    counts = []
    for _ in range(10):
        counts.append(sum(len(names) for _, _, names in os.walk(folder)))
        time.sleep(0.1)
    return min(counts)


def resident(pid: int) -> int:
    """Bytes that a process has in memory for itself, beside what it shares with files."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    return 0


def opened(pid: int) -> int:
    """How many files a process has open."""
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def ours_in(folder: Path) -> int:
    """What a run may have left in a folder that others use too."""
    return sum(path.name.startswith(("onehour", "torch", "pymp", "sem.", "psm_")) for path in folder.iterdir())


def counted(run: Started) -> dict[str, int]:
    """Everything that must not grow."""
    ranks = trainers(run.pid)
    return {
        "launcher's memory": resident(run.pid),
        "launcher's files": opened(run.pid),
        "processes' memory": max(map(resident, ranks)),
        "processes' files": max(map(opened, ranks)),
        "processes": len(family(run.pid)),
        "run's files": files(run.folder),
        "/dev/shm": ours_in(Path("/dev/shm")),
        "temporary": files(run.folder.parent / TEMPORARY),
    }


def grown(counts: list[dict[str, int]]) -> list[str]:
    """What is more in the last third than it ever was in the first; of memory, by more than allocators explain."""
    third = max(1, len(counts) // 3)
    found = []
    for name in counts[0] if counts else ():
        first, last = (max(count[name] for count in part) for part in (counts[:third], counts[-third:]))
        if last > first * (MEMORY if "memory" in name else 1):
            found.append(f"{name} grew from {first:,} to {last:,}")
    return found


def complete(run: Started) -> bool:
    """Whether the launcher, its processes and their loaders are all there, in a minute at most."""
    return ready(lambda: len(family(run.pid)) >= 5, 60)


def soaked(case: int, minutes: float, every: float) -> dict[str, Any]:
    """A run that is killed again and again."""
    draw = random.Random(f"{CAMPAIGN} {case}")
    place = (OUT / f"{CAMPAIGN}-{os.getpid()}").absolute()
    cut(place)
    place.mkdir(parents=True)
    (place / TEMPORARY).mkdir()
    os.environ["TMPDIR"] = str(place / TEMPORARY)
    counts, victims, wrong = [], [], []
    until = time.monotonic() + 60 * minutes
    run = Started(place / "run", FLAGS)
    try:
        while time.monotonic() < until and not wrong:
            pause = draw.uniform(0.6, 1.0) * every
            time.sleep(pause)
            if not complete(run):
                wrong.append(f"does not come back: {run.said()[-2000:]}")
                break
            counts.append(counted(run))
            everyone = family(run.pid)
            kind = (trainers(run.pid), [pid for pid in everyone if pid not in [run.pid, *trainers(run.pid)]], [run.pid])
            victim = draw.choice(kind[len(counts) % 3])
            victims.append("launcher" if victim == run.pid else "trainer" if victim in trainers(run.pid) else "loader")
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim == run.pid:
                if left := run.left(10.0):
                    wrong.append(f"{len(left)} processes outlive their launcher by ten seconds")
                run.end()
                run = Started(place / "run", FLAGS)
            time.sleep(2)  # a stop in the same moment would find a run that cannot save
        complete(run)
        run.process.send_signal(signal.SIGTERM)
        code = run.wait(60)
        if code != 75 or run.left():
            wrong.append(f"ends with {code}: {run.said()[-2000:]}")
        wrong += grown(counts)
    finally:
        run.end()
        cut(place)
    kinds = {kind: victims.count(kind) for kind in sorted(set(victims))}
    ends = {"first": counts[0], "last": counts[-1]} if counts else {}
    return {
        "ok": not wrong,
        "runs": len(victims),
        "failures": len(wrong),
        "said": "; ".join(wrong),
        "kinds": kinds,
        **ends,
    }


def main() -> int:
    """Run what is missing; 1 if anything grew."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--every", type=float, default=60.0)
    options = parser.parse_args()
    ledger = OUT / f"{CAMPAIGN}.jsonl"
    for case in missing(ledger, CAMPAIGN, range(1)):
        add(ledger, CAMPAIGN, case, **soaked(case, options.minutes, options.every))
    return report(ledger)


if __name__ == "__main__":
    sys.exit(main())
