"""Train what a sweep's cells still lack, resumable at any kill (paper F1)."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onehour.dist.devices import pick_device, refuse_too_few_gpus
from onehour.dist.placement import place
from onehour.execution import Execution
from onehour.files import opened
from onehour.leaving import scratch
from onehour.lock import HeldFolder
from onehour.machine import CORES, cores, share_of
from onehour.rules.arguments import positive_int
from onehour.study.spec import SPEC, Cell, SweepSpec
from onehour.sweeps.pool import Event, run_tasks
from onehour.sweeps.task import Task, run_task
from onehour.training.record import Run, StoppedError, differences, finished_run, latest_contents

TOGETHER = 10  # seeds in one network at most: beyond, nothing is gained
TRIAL_SECONDS = 4.0


@dataclass(frozen=True)
class Work:
    """What a sweep's folder holds and lacks: all cells that were asked for, and the tasks left, the longest first."""

    cells: tuple[Cell, ...]
    tasks: tuple[Task, ...]
    folder: Path

    @property
    def left(self) -> int:
        return sum(len(task.recipes) for task in self.tasks)


def work_of(spec: SweepSpec, folder: Path, *, jobs: int, together: int | None = None) -> Work:
    """Compare what is asked for with what the folder holds; a ValueError if that is something else.

    So many seeds are one network, `together`; None picks, so that every job has something to do.
    """
    if together is not None:
        positive_int("seeds_together", together)
    _merged(spec, folder)  # refuses what is no sweep of this recipe
    cells = tuple(spec.cells())
    rows: dict[tuple[object, int], list[Cell]] = {}
    for cell in cells:
        with suppress(FileNotFoundError), opened(folder, f"cells/{cell.name}"):
            pass  # no link leads there
        own = folder / "cells" / cell.name
        finished = finished_run(own, cell.recipe) is not None
        diverged = (own / "recipe.toml").is_file() and Run(own).summary.get("outcome") == "non-finite"
        if not finished and not diverged:
            rows.setdefault((cell.arm, cell.recipe.minibatch), []).append(cell)
    size = together or max(1, min(TOGETHER, -(-sum(map(len, rows.values())) // jobs)))
    tasks = []
    for row in rows.values():
        groups = -(-len(row) // size)
        for group in range(groups):
            chosen = row[group * len(row) // groups : (group + 1) * len(row) // groups]
            folders = tuple(folder / "cells" / cell.name for cell in chosen)
            tasks.append(Task(tuple(cell.recipe for cell in chosen), folders))
    # Small minibatches take longest; what takes long should not begin last.
    tasks.sort(key=lambda task: (-len(task.recipes), task.recipes[0].minibatch))
    return Work(cells, tuple(tasks), folder)


def train_sweep(
    spec: SweepSpec, folder: Path, *, jobs: int, execution: Execution, together: int | None = None
) -> Iterator[tuple[Work, Event]]:
    """Train what is left of a completed recipe's sweep: what there was to do, and each time what has happened.

    A ValueError for bad input, a FolderLostError if the folder was moved or removed; what has ended stays.
    """
    for cell in spec.cells():
        place(
            cell.recipe.fewest_workers, execution.processes, together=cell.recipe.together
        )  # refuses more processes than workers
    with HeldFolder(folder, patience=0) as held:
        work = work_of(spec, folder, jobs=jobs, together=together)
        _merged(spec, folder).write(held.inside)
        yield work, Event()
        places = places_of(jobs, execution)
        for event in run_tasks(work.tasks, places=places, execution=execution, held=held):
            yield work, event
        held.check()


def pick_jobs(jobs: int | None, *, processes: int, device: str) -> tuple[int, Execution]:
    """How many runs at once, and where and with how many threads each.

    Args:
        jobs: None takes one for each GPU on CUDA, one for each core on the CPU, and one for runs of several processes.
    """
    device, processes = pick_device(device), positive_int("processes", processes)
    refuse_too_few_gpus(processes, device)
    if jobs is None:
        jobs = 1 if processes > 1 else torch.cuda.device_count() if device == "cuda" else cores()
    positive_int("jobs", jobs)
    threads = None if "OMP_NUM_THREADS" in os.environ else share_of(jobs * processes)
    return jobs, Execution(processes=processes, device=device, threads=threads)


def places_of(jobs: int, execution: Execution) -> list[dict[str, str]]:
    """The environment of each process: its share of the cores, and of the GPUs on CUDA."""
    share = {CORES: str(share_of(jobs))}
    gpus = torch.cuda.device_count() if execution.device == "cuda" else 0
    if not gpus:
        return [share] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    each = execution.processes
    dealt = [visible[first : first + each] for first in range(0, len(visible) - each + 1, each)] or [visible]
    return [share | {"CUDA_VISIBLE_DEVICES": ",".join(dealt[job % len(dealt)])} for job in range(jobs)]


def expected_seconds(work: Work, *, jobs: int, execution: Execution) -> float:
    """How long what is left will take: from cells that have ended, else from some seconds of the first.

    An image is taken to cost the same in every cell.
    """
    images = sum(task.images for task in work.tasks)
    if not images:
        return 0.0
    folders = [work.folder / "cells" / cell.name for cell in work.cells]
    ended = [Run(folder).summary for folder in folders if (folder / "summary.json").is_file()]
    known = [summary["images_per_second"] for summary in ended if summary.get("images_per_second")]
    rate = sum(known) / len(known) if known else _trial(work.tasks[0], execution)
    return images / rate / min(jobs, len(work.tasks))


def _trial(task: Task, execution: Execution) -> float:
    """Images a second of a task's runs together, from its first seconds, in a folder that is thrown away."""
    moments: list[float] = []

    def stop() -> bool:
        # Processes of their own are asked about before they have begun.
        if moments or any((folder / "environment.json").exists() for folder in folders):
            moments.append(time.perf_counter())
        return bool(moments) and moments[-1] - moments[0] > TRIAL_SECONDS

    with scratch("onehour-sweep-") as temporary:
        folders = tuple(temporary / folder.name for folder in task.folders)
        with suppress(StoppedError), redirect_stdout(io.StringIO()):
            run_task(replace(task, folders=folders), execution, stop)
        seconds = time.perf_counter() - moments[0] if moments else TRIAL_SECONDS
        saved = [latest_contents(folder) for folder in folders if (folder / "recipe.toml").is_file()]
        images = sum(json.loads(contents[-1])["position"] for contents in saved if contents)
    return max(images, task.recipes[0].minibatch) / seconds


def _merged(spec: SweepSpec, folder: Path) -> SweepSpec:
    """With what earlier commands asked for in the same folder, so that the report counts it."""
    if not (folder / SPEC).is_file():
        if folder.exists() and any(path.name not in (".lock", f".{SPEC}.writing") for path in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no {SPEC}; choose another --out")
        return spec
    old = SweepSpec.read(folder)
    changes = differences(old.recipe, spec.recipe)
    changed = [text for text in changes if not text.startswith(("minibatch: ", "seed: "))]
    if changed:
        raise ValueError(f"{folder} is a sweep of another recipe ({'; '.join(changed)}); choose another --out")
    names = ("minibatches", "seeds", "reference_seeds", "arms_at")
    axes = {name: sorted({*getattr(old, name), *getattr(spec, name)}) for name in names}
    arms = tuple(dict.fromkeys((*old.arms, *spec.arms)))
    return replace(spec, arms=arms, **{name: tuple(values) for name, values in axes.items()})
