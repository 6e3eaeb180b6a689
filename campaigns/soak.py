"""A quarter of an hour with a kill about every minute: nothing grows, and nothing is left behind.

    python -m campaigns.soak

Two processes with a loader each under `onehour train --restarts`. Victims are drawn among training processes, loaders
and the launcher; after the launcher's death the same command is given again. Memory and open files of the launcher and
the training processes, files in the run's folder, in /dev/shm and in the folder for temporary files are counted before
each kill, when the run has been undisturbed for a while; the last counts must not exceed the first ones. Processes that
are left when a launcher has died are counted after ten seconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from campaigns.ledger import run
from campaigns.starting import LOADED, Started, emptied, family, ready, trainers

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


def counted(started: Started) -> dict[str, int]:
    """Everything that must not grow."""
    ranks = trainers(started.pid)
    return {
        "launcher's memory": resident(started.pid),
        "launcher's files": opened(started.pid),
        "processes' memory": max(map(resident, ranks)),
        "processes' files": max(map(opened, ranks)),
        "processes": len(family(started.pid)),
        "run's files": files(started.folder),
        "/dev/shm": ours_in(Path("/dev/shm")),
        "temporary": files(started.folder.parent / TEMPORARY),
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


def complete(started: Started) -> bool:
    """Whether the launcher, its processes and their loaders are all there, in a minute at most."""
    return ready(lambda: len(family(started.pid)) >= 5, 60)


def soaked(minutes: float = 15.0, every: float = 60.0) -> dict[str, Any]:
    """A run that is killed again and again, about once in so many seconds."""
    draw = random.Random(f"{CAMPAIGN} 0")
    counts, victims, wrong = [], [], []
    until = time.monotonic() + 60 * minutes
    with emptied(CAMPAIGN) as place, ExitStack() as stack:
        (place / TEMPORARY).mkdir()
        os.environ["TMPDIR"] = str(place / TEMPORARY)
        started = stack.enter_context(Started(place / "run", FLAGS))
        while time.monotonic() < until and not wrong:
            time.sleep(draw.uniform(0.6, 1.0) * every)
            if not complete(started):
                wrong.append(f"does not come back: {started.said()[-2000:]}")
                break
            counts.append(counted(started))
            ranks, launcher = trainers(started.pid), [started.pid]
            loaders = [pid for pid in family(started.pid) if pid not in (*launcher, *ranks)]
            kind, pids = (("trainer", ranks), ("loader", loaders), ("launcher", launcher))[len(counts) % 3]
            victims.append(kind)
            with suppress(ProcessLookupError):
                os.kill(draw.choice(pids), signal.SIGKILL)
            if kind == "launcher":
                if left := started.left(10.0):
                    wrong.append(f"{len(left)} processes outlive their launcher by ten seconds")
                stack.close()
                started = stack.enter_context(Started(place / "run", FLAGS))
            time.sleep(2)  # a stop in the same moment would find a run that cannot save
        complete(started)
        started.process.send_signal(signal.SIGTERM)
        code = started.wait(60)
        if code != 75 or started.left():
            wrong.append(f"ends with {code}: {started.said()[-2000:]}")
    wrong += grown(counts)
    about = {"runs": len(victims), "failures": len(wrong), "kinds": dict(sorted(Counter(victims).items()))}
    ends = {"first": counts[0], "last": counts[-1]} if counts else {}
    return {"ok": not wrong, "said": "; ".join(wrong), **about, **ends}


if __name__ == "__main__":
    sys.exit(run(CAMPAIGN, [(CAMPAIGN, 0, soaked)]))
