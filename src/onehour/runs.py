"""A run in this process, alone or as one of the processes that a launcher has started: agreed upon, then trained."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.dist.devices import pick_device, refuse_too_few_gpus
from onehour.dist.group import Group, joined
from onehour.dist.launch import is_torchruns, process_began
from onehour.dist.launched import JOB, adopt, is_launched, launched, without_srun
from onehour.dist.placement import place
from onehour.dist.signals import StopSignals
from onehour.dist.watchdog import GRACE, Watchdog, never
from onehour.execution import Execution
from onehour.machine import own_share
from onehour.messages import tell
from onehour.training.agreement import Facts, agree, facts_of_data, facts_of_start
from onehour.training.build import build_model, build_optimizer
from onehour.training.console import load_logger
from onehour.training.hosting import pick_loaders
from onehour.training.loop import train_run
from onehour.training.record import DELIBERATE, OUTCOME, Run, ended_on_purpose, finished_run, first_began, move_aside
from onehour.training.refusals import in_words
from onehour.training.start import complete_for, go_on_from, start_from
from onehour.training.store import checkpoint_folders
from onehour.training.task import Sums


def check_start(recipe: Recipe, execution: Execution) -> Run | None:
    """Find what would stop a run before its processes start.

    Returns:
        The run, if the folder already holds it finished.
    """
    place(recipe.fewest_workers, execution.processes)
    refuse_too_few_gpus(execution.processes, pick_device(execution.device))
    with _watching(execution):
        load_logger(execution.log)
        recipe, data = complete_for(recipe, execution)
        folder, here = execution.folder(recipe), torch.device("cpu")
        with in_words(folder):
            model = build_model(recipe, data, here)
            begun = execution.continues or (checkpoint_folders(folder) and not execution.fresh)
            if recipe.init and not begun:
                start_from(recipe, data, model, here)
            build_optimizer(recipe, model)
    return None if execution.fresh else finished_run(folder, recipe)


def run(
    recipe: Recipe,
    execution: Execution,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    data: Any = None,
    task: Callable[..., Sums] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    stop_asked: Callable[[], bool] = never,
    signals: StopSignals | None = None,
) -> Run:
    """As `onehour.train`, for a recipe and an execution that stand.

    Args:
        signals: ask for a stop too, also during evaluations.
    """
    adopt()
    processes = launched().size
    if not is_launched() and (tasks := without_srun(os.environ)) > 1:
        tell(
            f"Slurm has given this job {tasks} tasks, but srun did not start this process: it trains alone;"
            f" `srun onehour train` trains in {tasks} processes",
        )
    if execution.processes not in (1, processes):
        raise ValueError(
            f"processes is {execution.processes}, but {processes} were started; from Python one process trains: use"
            " `onehour train --processes`, or start the script with torchrun"
        )
    execution = dataclasses.replace(execution, processes=processes)
    device = pick_device(execution.device)
    facts: Facts = {}
    given, failed, loaded = recipe, None, None
    with _watching(execution):
        try:
            recipe, loaded = _completed(recipe, execution, data, collate)
            if execution.processes > 1:
                facts = _facts(given, execution, recipe, loaded, (execution.log, model, data, task, collate))
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
            train_run(recipe, loaded, execution, group, model=model, task=task, stop_asked=stop_asked, signals=signals)
        return Run(folder)


def refuse_together(error: ValueError, device: str) -> NoReturn:
    """Leave with an error that this process has before it knows its run, and let those that wait for it hear why."""
    with joined(pick_device(device)) as group:
        agree(group, failed=error)
    raise error


def _watching(execution: Execution) -> Watchdog:
    """Data and models are someone's code, and may never end."""
    rank = int(os.environ.get("RANK", "0"))
    return Watchdog(None, rank=rank, size=execution.processes, timeout=execution.hang_timeout)


def _completed(given: Recipe, execution: Execution, data: Any, collate: Any) -> tuple[Recipe, Data]:
    place(given.fewest_workers, execution.processes)
    return complete_for(given, execution, data, collate)


def _facts(given: Recipe, execution: Execution, recipe: Recipe, data: Data, objects: tuple[Any, ...]) -> Facts:
    names = (given.model, given.data, given.optimizer, given.task, given.collate, given.train_transform)
    given = given.replace(continues=recipe.continues)
    facts = facts_of_start(given, torch.device(pick_device(execution.device)), (*names, *objects)) | facts_of_data(
        recipe, data
    )
    return facts | {"measurement": {"noise": execution.noise}}


def _agreed_to_be_finished(folder: Path, recipe: Recipe, execution: Execution, group: Group) -> bool:
    """Process 0 looks at the folder; what it finds, or refuses, every process hears.

    Raises:
        StoppedError, NonFiniteError: in a process that a launcher restarted, if its job had ended so on purpose.
    """
    began, found = _job_began(group), ("", "")
    if group.rank == 0:
        # A host came or went, and torchrun starts all anew: what this job began is not started over.
        this_jobs = began < first_began(folder) < process_began(os.getpid())
        fresh = execution.fresh and not this_jobs
        found = _look_at(recipe, dataclasses.replace(execution, fresh=fresh, out=folder), began)
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


def _look_at(recipe: Recipe, execution: Execution, began: float) -> tuple[str, str]:
    folder = execution.folder(recipe)
    try:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        ended = ended_on_purpose(folder, os.environ.get(JOB)) if restarted else None
        # torchrun calls every job "none", unless told.
        if ended is not None and not (is_torchruns() and (folder / OUTCOME).stat().st_mtime < began):
            return ended
        if execution.fresh and not restarted:
            move_aside(folder)
        if finished_run(folder, recipe):
            return "finished", ""
        go_on_from(recipe, execution)
        return "go", ""
    except ValueError as error:
        return "refused", str(error)
