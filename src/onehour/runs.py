"""A run in this process, alone or as one of the processes that a launcher has started: agreed upon, then trained.

A run that goes on from another one is the same but for the schedule of its rate: it has the other's weights, optimizer
and position, in a folder of its own, and so takes the samples that the other would have taken next.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data, complete, refuse_odd_texts
from onehour.dist.devices import pick_device, refuse_too_few_gpus
from onehour.dist.group import Group, joined
from onehour.dist.launch import is_torchruns, process_began
from onehour.dist.launched import JOB, adopt, is_launched, launched, without_srun
from onehour.dist.placement import place
from onehour.dist.signals import StopSignals
from onehour.dist.watchdog import GRACE, Watchdog, never
from onehour.execution import Execution
from onehour.files import replace_whole
from onehour.machine import own_share
from onehour.messages import say, tell
from onehour.rules.schedule import parse_milestones
from onehour.training.agreement import Facts, agree, facts_of_data, facts_of_start
from onehour.training.build import build_model, build_optimizer
from onehour.training.checkpoint import Store, checkpoint_folders, digest_of_recipe
from onehour.training.console import load_logger
from onehour.training.decisions import decisions_of
from onehour.training.feeds import pick_loaders
from onehour.training.loop import train_run
from onehour.training.record import (
    BAD_IMAGES,
    DELIBERATE,
    OUTCOME,
    RECIPE,
    Run,
    differences,
    ended_on_purpose,
    finished_run,
    first_began,
    latest_contents,
    move_aside,
    refuse_other_classes,
)
from onehour.training.recorder import LINES, in_words, take_folder
from onehour.training.state import digest_of
from onehour.training.task import Sums
from onehour.training.weights import start_from

MAY_CHANGE = ("epochs", "base_lr", "decay", "decay_factor", "milestones", "warmup", "warmup_epochs", "continues")
"""Fields in which a run may differ from the one that it goes on from."""
BEHIND = " iteration "
"""What stands behind the run's folder in `Recipe.continues`."""


def check_start(recipe: Recipe, execution: Execution) -> Run | None:
    """Find what would stop a run before its processes start.

    Returns:
        The run, if the folder already holds it finished.
    """
    execution.refuse(recipe)
    place(recipe.fewest_workers, execution.processes, together=recipe.together)
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
    return None if execution.fresh else _finished(folder, recipe, data)


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
        if not _agreed_to_be_finished(folder, recipe, loaded, execution, group):
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
    execution.refuse(given)
    place(given.fewest_workers, execution.processes, together=given.together)
    return complete_for(given, execution, data, collate)


def _facts(given: Recipe, execution: Execution, recipe: Recipe, data: Data, objects: tuple[Any, ...]) -> Facts:
    names = (given.model, given.data, given.optimizer, given.task, given.collate, given.train_transform)
    given = given.replace(continues=recipe.continues)
    facts = facts_of_start(given, torch.device(pick_device(execution.device)), (*names, *objects)) | facts_of_data(
        recipe, data
    )
    return facts | {"measurement": {"noise": execution.noise}}


def _agreed_to_be_finished(folder: Path, recipe: Recipe, data: Data, execution: Execution, group: Group) -> bool:
    """Process 0 looks at the folder; what it finds, or refuses, every process hears.

    Raises:
        StoppedError, NonFiniteError: in a process that a launcher restarted, if its job had ended so on purpose.
    """
    began, found = _job_began(group), ("", "")
    if group.rank == 0:
        # A host came or went, and torchrun starts all anew: what this job began is not started over.
        this_jobs = began < first_began(folder) < process_began(os.getpid())
        fresh = execution.fresh and not this_jobs
        found = _look_at(recipe, data, dataclasses.replace(execution, fresh=fresh, out=folder), began)
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


def _look_at(recipe: Recipe, data: Data, execution: Execution, began: float) -> tuple[str, str]:
    folder = execution.folder(recipe)
    try:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        ended = ended_on_purpose(folder, os.environ.get(JOB)) if restarted else None
        # torchrun calls every job "none", unless told.
        if ended is not None and not (is_torchruns() and (folder / OUTCOME).stat().st_mtime < began):
            return ended
        if execution.fresh and not restarted:
            move_aside(folder)
        if _finished(folder, recipe, data):
            return "finished", ""
        go_on_from(recipe, execution)
        return "go", ""
    except ValueError as error:
        return "refused", str(error)


def _finished(folder: Path, recipe: Recipe, data: Data) -> Run | None:
    """As `finished_run`; one that is resumed must have the classes that it had."""
    finished = finished_run(folder, recipe)
    if finished is None and (folder / RECIPE).is_file() and checkpoint_folders(folder):
        refuse_other_classes(Run(folder), data.names)
    return finished


def complete_for(
    recipe: Recipe, execution: Execution, data: Any = None, collate: Callable[[list[Any]], Any] | None = None
) -> tuple[Recipe, Data]:
    """As `complete`; the recipe of a run that goes on from `execution.continues` names it."""
    old, folder = execution.continues, execution.folder(recipe)
    if old is None:
        if recipe.continues and (execution.fresh or not checkpoint_folders(folder)):
            raise ValueError(
                f"the recipe goes on from {recipe.continues}, and {folder} has no checkpoint to continue from: give"
                " that --continue again, or take the line `continues` out of the recipe to train all of it"
            )
        return complete(recipe, data, collate=collate)
    if folder.resolve() == old.resolve():
        raise ValueError(f"--continue goes on in a new folder, and --out {folder} is the run itself; choose another")
    named = Run(folder).recipe.continues if (folder / RECIPE).is_file() and not execution.fresh else ""
    if named and Path(named.partition(BEHIND)[0]).resolve() == old.resolve():
        recipe, loaded = complete(recipe, data, collate=collate)  # whatever has become of the old run since
        return recipe.replace(continues=named), loaded
    _refuse_changes(old, recipe)
    recipe, loaded = complete(recipe, data, collate=collate)
    _refuse_changes(old, recipe)
    refuse_other_classes(Run(old), loaded.names)
    iteration, _, named = _stands(old)
    decisions = decisions_of(recipe)
    if iteration >= decisions.iterations:
        done = iteration * recipe.minibatch / decisions.samples
        raise ValueError(f"{old} has done {done:.4g} epochs, and epochs is {recipe.epochs}; give more --epochs")
    recipe = recipe.replace(continues=named)
    refuse_odd_texts(recipe)
    return recipe, loaded


def _refuse_changes(old: Path, recipe: Recipe) -> None:
    """Refuse what is no schedule; what only the data says may be unsaid."""
    unsaid = [name for name in ("samples", "classes", "resized") if getattr(recipe, name) is None]
    before = Run(old).recipe
    if before.epochs % 1:
        raise ValueError(
            f"{old} has {before.epochs:g} epochs, and --continue goes on only from whole ones; train anew from its"
            f" weights: --init {old}"
        )
    if before.ramp:
        raise ValueError(
            f"{old} has a ramp, and --continue goes on only from one minibatch; train anew from its weights:"
            f" --init {old}"
        )
    changed = differences(before, recipe)
    changed = [text for text in changed if text.partition(":")[0] not in (*MAY_CHANGE, *unsaid)]
    if changed:
        raise ValueError(
            f"--continue changes nothing but the schedule of {old} ({'; '.join(changed)}); leave that out, or train"
            f" anew from its weights: --init {old}"
        )


def go_on_from(recipe: Recipe, execution: Execution) -> None:
    """Let the run's folder be that of one which has come as far as the old run, unless it has a checkpoint.

    For process 0. The checkpoint is written last: without one the folder is not trained in.
    """
    folder = execution.folder(recipe)
    if execution.continues is None or checkpoint_folders(folder):
        return
    old = Run(execution.continues)
    iteration, contents, named = _stands(old.folder)
    if named != recipe.continues:
        raise ValueError(f"{old.folder} has gone on meanwhile; give the same command again, with --fresh")
    before = decisions_of(old.recipe)
    progress = {"rate": before.rate(iteration - 1)} | json.loads(contents[2])
    held = take_folder(folder, recipe, warn=say)
    try:
        for path in (old.folder / name for name in (*LINES, BAD_IMAGES)):
            if path.is_file():
                replace_whole(held.inside, path.name, path.read_bytes())
        store = Store(held.inside, recipe=digest_of_recipe(recipe), shown=folder)
        store.write(iteration, [*contents[:2], json.dumps(progress, indent=2).encode()])
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        held.release()
    say(f"goes on from {old.folder} {changed_schedule(old.recipe, recipe, iteration)}")


def changed_schedule(old: Recipe, new: Recipe, iteration: int) -> str:
    """What the rate of a run that goes on behind `iteration` is from there on, and how it jumps; a line each."""
    assert new.samples is not None
    epoch = iteration * new.minibatch / new.samples
    rate, before = new.schedule(epoch), old.schedule((iteration - 1) * new.minibatch / new.samples)
    parts = [f"at epoch {epoch:.4g} of {new.epochs} with rate {rate:.4g}"]
    if new.warms_up and epoch < new.warmup_epochs:
        parts.append(f"warms up to {new.schedule(new.warmup_epochs):.4g} at epoch {new.warmup_epochs:g}")
    if new.decay == "cosine":
        parts.append(f"falls along a cosine to 0 at epoch {new.epochs}")
    else:
        turns = [milestone for milestone in parse_milestones(new.milestones) if epoch < milestone < new.epochs]
        parts += [f"{new.schedule(float(turn)):.4g} from epoch {turn}" for turn in turns]
    lines = [", ".join(parts)]
    if rate != old.schedule(epoch):
        way = "up" if rate > before else "down"
        shares = f"warmup and decay are those of a run of {new.epochs} epochs"
        lines.append(f"the rate jumps {way} there, from {before:.4g} to {rate:.4g}: {shares}")
        if new.decay == old.decay == "step" and new.milestones != old.milestones:
            lines[-1] += f"; --milestones {','.join(old.milestones)} keeps where the old run drops"
    return "\n".join(lines)


def _stands(folder: Path) -> tuple[int, list[bytes], str]:
    """The iteration of a run's newest checkpoint, its files, and what `Recipe.continues` says of it."""
    contents = latest_contents(folder)
    if contents is None:
        raise ValueError(f"{folder} has no checkpoint to go on from yet")
    iteration = json.loads(contents[2])["iteration"]
    digest = digest_of(load(contents[0]), load(contents[1]))
    return iteration, contents, f"{folder}{BEHIND}{iteration} state {digest}"
