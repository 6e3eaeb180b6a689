"""What this machine says: how many cores there are for this process, counted and divided once; how processes are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

CORES = "ONEHOUR_CORES"
"""How many cores the process that started this one has given it."""
GROUPS, MOUNT = (
    Path("/proc/self/cgroup"),
    Path("/sys/fs/cgroup"),
)  # where Linux says which cgroup it is in, and what that may use


def cores(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """Cores that this process may use: of its CPU set and its cgroup's quota, and as its parent divided them."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get(CORES, "")
    limits = [affinity, *(math.ceil(quota) for quota in _quotas(groups, mount))]
    return max(1, min([*limits, int(given)] if given.isdecimal() else limits))


def which_cores() -> int:
    """A bit for each core that this process may run on; all bits where the system does not tell."""
    return sum(1 << core for core in os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else -1


def share_of(processes: int) -> int:
    """Cores for each of several processes that this machine runs beside each other."""
    return max(1, cores() // processes)


def own_share(sharing: int) -> int:
    """Cores of this process, one of `sharing` with the same cores; its parent may have divided them already."""
    return cores() if CORES in os.environ else share_of(sharing)


def stat_of(pid: int | str) -> list[str]:
    """What Linux says of a process behind its name: its state, its parent, …; nothing where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return []


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    """Cores' worth of time that the cgroup and those around it may use; of version 2 and of version 1."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from _upwards(mount, path, _quota_2)
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):
                yield from _upwards(mount / name, path, _quota_1)


def _upwards(root: Path, path: str, quota: Callable[[Path], tuple[float, float]]) -> Iterator[float]:
    """Of a cgroup and all around it; in a container its path may lie outside, and the root be its own."""
    place = root / path.strip("/")
    for folder in (place, *place.parents):
        with suppress(OSError, ValueError, IndexError):
            limit, period = quota(folder)
            if limit > 0 and period > 0:
                yield limit / period
        if folder == root:
            return


def _quota_2(folder: Path) -> tuple[float, float]:
    limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    return float(limit), float(period)  # "max" is no number


def _quota_1(folder: Path) -> tuple[float, float]:
    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
    return float(limit), float(period)  # -1 is none
