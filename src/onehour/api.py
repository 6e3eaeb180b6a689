"""The same from Python: train in this process, or as one of the processes that a launcher has started."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.dist.devices import refuse_too_few_gpus
from onehour.dist.group import Group, joined
from onehour.dist.launch import is_torchruns, process_began
from onehour.dist.launched import adopt, is_launched, launched, refuse_several
from onehour.dist.placement import place
from onehour.dist.slurm import without_srun
from onehour.entry import asked_for
from onehour.execution import Execution, default_folder
from onehour.machine import own_share
from onehour.recipes import recipe as named
from onehour.study.results import Study, read_study
from onehour.study.spec import spec_of
from onehour.training.agreement import agree
from onehour.training.build import build_model, build_optimizer, complete, pick_device, pick_loaders
from onehour.training.facts import facts_of_data, facts_of_start
from onehour.training.loggers import load_logger
from onehour.training.memory import less_memory, out_of_memory
from onehour.training.record import JOB, OUTCOME, Run, ended_on_purpose, finished_run, first_began, move_aside
from onehour.training.run import DELIBERATE, train_run
from onehour.training.watchdog import GRACE, Watchdog

__all__ = ["check", "refuse_together", "run", "sweep", "train"]


def train(
    recipe: Recipe | str,
    *,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    data: Any = None,
    trust: bool = False,
    stop_asked: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Run:
    """Train a recipe and return its run, or the finished run if the folder already holds it.

    One process, unless torchrun, srun or mpirun started several that all call this.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file.
        model: in place of the recipe's: a torch.nn.Module, a function that returns one, or a name.
        data: in place of the recipe's: (train, validation), two map-style data sets of (image, label), or a name.
        trust: import what a .toml file names, without its being named here.
        stop_asked: read at every iteration; saves and stops when it says yes.
        options: fields of `Recipe` (minibatch=256) and of `Execution` (out="runs/mine", fresh=True).

    Returns:
        The run, with `.final_error`, `.metrics`, `.timing` and `.summary`.

    Raises:
        ValueError: for bad input.
        NonFiniteError: when the loss leaves the finite numbers.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train("digits", minibatch=1024, epochs=1, warmup_epochs=1, out=folder)  # doctest: +ELLIPSIS
    ...     len(run.metrics)
    digits: minibatch 1024 = 64 workers × 16 on 1 process, rate 0.2 → 6.4, 1 epoch, 8 iterations, seed 0
    writes ...
    BatchNorm ...
    epoch   1/1 ...
    1
    """
    where = {f.name for f in fields(Execution)}
    places: dict[str, Any] = {key: value for key, value in options.items() if key in where}
    if places.get("out") is not None:
        places["out"] = Path(places["out"])
    execution = Execution(**places)
    changes = {key: value for key, value in options.items() if key not in where}
    if isinstance(model, str):
        changes["model"] = model
    elif model is not None:
        changes["model"] = f"<{getattr(model, '__qualname__', type(model).__qualname__)}>"
    if isinstance(data, str):
        changes["data"] = data
    elif data is not None:
        changes["data"] = f"<{type(data[0]).__qualname__}>" if isinstance(data, tuple | list) and data else "<data>"
    chosen = named(recipe, **changes) if isinstance(recipe, str | Path) else recipe.replace(**changes)
    return run(
        asked_for(chosen, trust=trust),
        execution,
        model=None if isinstance(model, str) else model,
        data=None if isinstance(data, str) else data,
        stop_asked=stop_asked,
    )


def run(
    recipe: Recipe,
    execution: Execution,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Any = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Run:
    """As `train`, for a recipe and an execution that stand."""
    adopt()
    processes = launched().size
    if not is_launched() and (tasks := without_srun(os.environ)) > 1:
        print(
            f"onehour: Slurm has given this job {tasks} tasks, but srun did not start this process: it trains alone;"
            f" `srun onehour train` trains in {tasks} processes",
            file=sys.stderr,
            flush=True,
        )
    if execution.processes not in (1, processes):
        raise ValueError(
            f"processes is {execution.processes}, but {processes} were started; from Python one process trains: use"
            " `onehour train --processes`, or start the script with torchrun"
        )
    execution = dataclasses.replace(execution, processes=processes)
    device = pick_device(execution.device)
    facts, failed, loaded = {}, None, None
    with _watching(execution):
        try:
            facts, recipe, loaded = _prepared(recipe, execution, device, model, data)
        except ValueError as error:
            failed = error
    # The watchdog, which names who is stuck, comes first.
    with joined(device, patience=2 * GRACE * (execution.hang_timeout or 0.0)) as group:
        sharing = agree(group, facts, failed=failed, allowed=execution.allow_different)
        assert loaded is not None
        share = own_share(sharing)
        if execution.threads:
            torch.set_num_threads(execution.threads)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), share))
        execution = dataclasses.replace(execution, loaders=pick_loaders(execution, loaded, share))
        folder = execution.folder(recipe)
        if not _agreed_to_be_finished(folder, recipe, execution, group):
            train_run(recipe, loaded, execution, group, model=model, stop_asked=stop_asked)
        return Run(folder)


def refuse_together(error: ValueError, device: str) -> NoReturn:
    """Leave with an error that this process has before it knows its run, and let those that wait for it hear why.

    Raises:
        ValueError: `error`, in all processes.
    """
    with joined(pick_device(device)) as group:
        agree(group, failed=error)
    raise error


def _watching(execution: Execution) -> Watchdog:
    """Data and models are someone's code, and may never end."""
    rank = int(os.environ.get("RANK", "0"))
    return Watchdog(None, rank=rank, size=execution.processes, timeout=execution.hang_timeout)


def _prepared(
    given: Recipe, execution: Execution, device: str, model: Any, data: Any
) -> tuple[dict[str, dict[str, Any]], Recipe, Data]:
    """What all processes must agree on, and the recipe and the data.

    Raises:
        ValueError: for what this process has no use for.
    """
    place(given.workers.workers, execution.processes)
    recipe, loaded = complete(given, data)
    if execution.processes == 1:
        return {}, recipe, loaded
    named = (given.model, given.data, given.optimizer, execution.log, model, data)
    facts = facts_of_start(given, torch.device(device), named) | facts_of_data(recipe, loaded)
    return facts, recipe, loaded


def _agreed_to_be_finished(folder: Path, recipe: Recipe, execution: Execution, group: Group) -> bool:
    """Process 0 looks at the folder; what it finds, or refuses, every process hears.

    Raises:
        ValueError: for what it refuses.
        StoppedError, NonFiniteError: in a process that a launcher restarted, if its job had ended so on purpose.
    """
    began, found = _job_began(group), ("", "")
    if group.rank == 0:
        # A host came or went, and torchrun starts all anew: what this job began is not started over.
        this_jobs = began < first_began(folder) < process_began(os.getpid())
        found = _look_at(folder, recipe, began, fresh=execution.fresh and not this_jobs)
    answer = group.broadcast(json.dumps(found).encode())
    assert answer is not None
    kind, message = json.loads(answer)
    if kind == "refused":
        raise ValueError(message)
    if kind in DELIBERATE:
        raise DELIBERATE[kind](message)
    return kind == "finished"


def _job_began(group: Group) -> float:
    """When the first of torchrun's agents began, of which at least one outlives the others; now without torchrun."""
    began = torch.zeros(group.size, dtype=torch.float64, device=group.device)
    began[group.rank] = process_began(os.getppid()) if is_torchruns() else time.time()
    return float(group.sum(began).min())


def _look_at(folder: Path, recipe: Recipe, began: float, *, fresh: bool) -> tuple[str, str]:
    try:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        ended = ended_on_purpose(folder, os.environ.get(JOB)) if restarted else None
        # torchrun calls every job "none", unless told.
        if ended is not None and not (is_torchruns() and (folder / OUTCOME).stat().st_mtime < began):
            return ended
        if fresh and not restarted:
            move_aside(folder)
        return ("finished" if finished_run(folder, recipe) else "go"), ""
    except ValueError as error:
        return "refused", str(error)


def sweep(
    recipe: Recipe | str,
    *,
    minibatches: Sequence[int] | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    arms: Sequence[str] = ("table",),
    arms_at: Sequence[int] | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    processes: int = 1,
    device: str = "auto",
    seeds_together: int | None = None,
    trust: bool = False,
    **changes: Any,
) -> Study:
    """Train a recipe over minibatches, seeds and arms, as `onehour sweep`; what the folder holds is not run again.

    Starts processes that import the calling script, which therefore needs `if __name__ == "__main__":`.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file; model and data by name.
        minibatches: None for 1 … 64 times the base.
        seeds, first_seed: of each cell.
        arms: "warmup=none,constant", "table", "pitfalls".
        arms_at: minibatches of the arms; None for 16 times the base.
        out: the sweep's folder; None is runs/RECIPE-sweep.
        jobs: processes that train; None for cores or GPUs.
        processes, device: of each run.
        seeds_together: seeds trained as one network; None picks.
        trust: import what a .toml file names, without its being named here.
        changes: fields of `Recipe`.

    Returns:
        The folder's study.

    Raises:
        ValueError: for bad input; what has ended stays.

    >>> sweep("digits", seeds=0)
    Traceback (most recent call last):
    ValueError: --seeds is 0; expected at least 1, and 5 for the paper's table
    """
    from onehour.sweeps.sweep import pick_jobs, train_sweep

    refuse_several("sweep")
    chosen = named(recipe, **changes) if isinstance(recipe, str | Path) else recipe.replace(**changes)
    completed, _ = complete(asked_for(chosen, trust=trust))
    spec = spec_of(completed, minibatches, range(first_seed, first_seed + seeds), arms, arms_at)
    folder = default_folder(completed, "sweep") if out is None else Path(out)
    jobs, execution = pick_jobs(jobs, processes=processes, device=device)
    for _ in train_sweep(spec, folder, jobs=jobs, execution=execution, together=seeds_together):
        pass
    return read_study([folder])


def check(recipe: Recipe, execution: Execution) -> Run | None:
    """Find what would stop a run before its processes start.

    Returns:
        The run, if the folder already holds it finished.

    Raises:
        ValueError: for bad input.
    """
    place(recipe.workers.workers, execution.processes)
    refuse_too_few_gpus(execution.processes, pick_device(execution.device))
    with _watching(execution):
        load_logger(execution.log)
        recipe, data = complete(recipe)
        try:
            build_optimizer(recipe, build_model(recipe, data, torch.device("cpu")))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ValueError(less_memory(1)) from error
    return None if execution.fresh else finished_run(execution.folder(recipe), recipe)
