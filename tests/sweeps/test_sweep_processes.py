"""Sweeps on processes of their own: all that is left is trained, once, whoever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import sweeptask
from sweeptask import names

from onehour.lock import FolderLostError, HeldFolder
from onehour.study.spec import SweepSpec
from onehour.sweeps.pool import Event
from onehour.sweeps.sweep import train_sweep, work_of
from onehour.training.record import Run, latest_contents

pytestmark = pytest.mark.usefixtures("forked")

WITHOUT = (("warmup", "none"),)


def summaries(folder: Path) -> dict[str, int]:
    """When each cell's summary was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*/summary.json")}


def ended(events: list[Event]) -> list[Event]:
    return [event for event in events if event.task is not None]


def test_all_cells_are_trained_on_two_processes_once_and_what_is_added_later_is_added(tmp_path: Path):
    spec = sweeptask.spec(arms=(WITHOUT,), base_minibatch=4)
    steps = list(train_sweep(spec, tmp_path, jobs=2, execution=sweeptask.HERE))
    work, events = steps[0][0], [event for _, event in steps]
    assert names(work) == [["8-s0", "8-s1"], ["16-s0", "16-s1"], ["warmup=none-16-s0", "warmup=none-16-s1"]]
    assert all(other is work for other, _ in steps)
    assert events[0] == Event()
    assert {event.task for event in ended(events)} == set(work.tasks)
    assert {event.alone for event in ended(events)} == {None}
    assert all(set(event.running) <= set(work.tasks) for event in events)
    assert any(event.running for event in events)
    assert events[-1].running == ()
    for cell in spec.cells():
        run = Run(tmp_path / "cells" / cell.name)
        assert run.finished
        assert run.recipe == cell.recipe
        assert run.summary["seeds_together"] == 2
    assert SweepSpec.read(tmp_path) == spec
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "sweep.toml", ".lock", "log-0.txt", "log-1.txt"}

    before = summaries(tmp_path)
    assert [event for _, event in train_sweep(spec, tmp_path, jobs=2, execution=sweeptask.HERE)] == [Event()]
    assert summaries(tmp_path) == before

    more = sweeptask.spec(minibatches=(16, 24), seeds=3, base_minibatch=4)
    (work, _), *later = train_sweep(more, tmp_path, jobs=1, execution=sweeptask.HERE)
    assert names(work) == [["24-s0", "24-s1", "24-s2"], ["16-s2"]]
    assert [event.alone for event in ended([event for _, event in later])] == [None, "one seed"]
    after = summaries(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"24-s0", "24-s1", "24-s2", "16-s2"}
    union = SweepSpec.read(tmp_path)
    assert (union.minibatches, union.seeds) == ((8, 16, 24), (0, 1, 2))
    assert (union.arms, union.arms_at) == ((WITHOUT,), (16,))


def wait_for(true: Callable[[], Any]) -> None:
    while not true():
        time.sleep(0.02)


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()]


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def in_its_first_epoch(folder: Path) -> bool:
    """Whether a cell has begun and has no evaluation yet."""
    return any(not Run(path.parent).metrics for path in folder.glob("cells/*/environment.json"))


def free(folder: Path) -> bool:
    try:
        with HeldFolder(folder, patience=0):
            return True
    except ValueError:
        return False


def test_whoever_is_killed_nothing_runs_on_and_nothing_is_run_again(tmp_path: Path, environ: dict[str, str]):
    folder, spec = tmp_path / "sweep", sweeptask.slow_spec()
    command = [sys.executable, str(sweeptask.__file__), str(folder)]
    parent = subprocess.Popen(command, env=environ, cwd=tmp_path)
    try:
        wait_for(lambda: (summaries(folder) and in_its_first_epoch(folder)) or parent.poll() is not None)
        assert parent.poll() is None
        with pytest.raises(ValueError, match=r"is being written by another process \(process .*; wait for it"):
            next(train_sweep(spec, folder, jobs=1, execution=sweeptask.HERE))
        workers = children(parent.pid)
        assert len(workers) >= 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(lives(worker) for worker in workers))  # each looks for its parent at every iteration
    assert free(folder)
    first = summaries(folder)
    assert 0 < len(first) < 8
    begun = [path.parent for path in folder.glob("cells/*/environment.json")]
    assert len(begun) > len(first)
    assert all(latest_contents(cell) is not None for cell in begun)  # saved when the parent was gone

    # The same again, whose only worker is killed.
    steps = train_sweep(spec, folder, jobs=1, execution=sweeptask.HERE, together=1)
    assert any(event.task is not None for _, event in steps)
    (worker,) = active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"the process that trained \S+ ended with code -9 .*the same command goes on"):
        list(steps)
    assert not active_children()
    assert free(folder)
    second = summaries(folder)
    assert len(second) == len(first) + 1
    assert {name: second[name] for name in first} == first

    left = names(work_of(spec, folder, jobs=1))
    assert {name for row in left for name in row} == {cell.name for cell in spec.cells()} - set(second)


@pytest.mark.parametrize("together", [1, None])
def test_a_sweep_that_is_moved_begins_nothing_under_its_old_name_and_goes_on_under_the_new_one(
    tmp_path: Path, together: int | None
):
    folder, moved, spec = tmp_path / "sweep", tmp_path / "moved", sweeptask.spec(minibatches=(8,))

    def sweep() -> None:
        for _ in train_sweep(spec, folder, jobs=1, execution=sweeptask.HERE, together=together):
            if folder.exists() and list(folder.glob("cells/*/environment.json")):
                folder.rename(moved)

    with pytest.raises(FolderLostError) as lost:
        sweep()
    said = f"{folder} was moved to {moved} while it was being written; the same command with --out {moved} goes on"
    assert str(lost.value) == said
    assert not folder.exists()
    assert not active_children()
    for _ in train_sweep(spec, moved, jobs=1, execution=sweeptask.HERE):
        pass
    assert work_of(spec, moved, jobs=1).left == 0
