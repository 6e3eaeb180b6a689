"""`onehour train`: a recipe, here or in several processes; the same command again resumes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import uuid
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import (
    EXIT_BAD_INPUT,
    EXIT_NOT_FINITE,
    EXIT_PEER_LOST,
    OF_THE_DATA,
    add_execution_fields,
    add_recipe_argument,
    add_recipe_fields,
    add_trust,
    recipe_changes,
)
from onehour.config import Recipe
from onehour.dist.launch import (
    ENDS,
    LaunchError,
    end_with_launcher,
    is_launched_by_us,
    launch,
    refuse_used_port,
    report_failure,
)
from onehour.dist.launched import adopt, is_launched, launched
from onehour.dist.signals import EXIT_STOPPED, StopSignals
from onehour.entry import asked_for
from onehour.execution import WHERE, Execution
from onehour.messages import say, tell
from onehour.recipes import RECIPES
from onehour.recipes import recipe as named

if TYPE_CHECKING:
    from onehour.training.record import Run


def add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a recipe; the same command again resumes",
        description="Train a recipe, or resume it. k, the number of workers, is never typed: it is kn / n.",
    )
    add_recipe_argument(train)
    train.add_argument(
        "--continue",
        dest="goes_on",
        action="store_true",
        help="RECIPE is a run's folder: continue it in a new one, with more --epochs and their schedule",
    )
    groups = add_execution_fields(train)
    groups[WHERE].add_argument(
        "--restarts", type=int, default=0, metavar="R", help="how often to restart all processes if one fails (0)"
    )
    add_recipe_fields(train, but=OF_THE_DATA)
    add_trust(train)
    train.set_defaults(command=train_command)


def train_command(options: argparse.Namespace, arguments: list[str]) -> int:
    with StopSignals(speaks=not is_launched_by_us()) as stop:
        if os.environ.pop(ENDS, None) or is_launched():
            end_with_launcher()
        return _train(options, arguments, stop)


def _train(options: argparse.Namespace, arguments: list[str], stop: StopSignals) -> int:
    if options.restarts < 0:
        raise ValueError(f"restarts must not be below zero, got {options.restarts}")
    from onehour.training.record import Run, move_aside

    adopt()
    try:
        recipe = asked_for(_recipe(options), trust=options.trust)
        execution = execution_of(options)
    except ValueError as error:
        return _refuse_here(error, options)
    if is_launched():
        code = _train_here(recipe, execution, stop)
        ours = is_launched_by_us() or launched().rank != 0
        return code or (0 if ours else _print_outcome(Run(execution.folder(recipe))))
    from onehour.runs import check_start

    if vars(options).get("processes", 1) is None:  # auto
        execution = _on_devices(recipe, execution)
    refuse_used_port(execution.port)
    finished = check_start(recipe, execution)
    if finished is not None:
        say(f"{finished.folder} is finished; --fresh starts over and keeps it under a numbered name")
        return _print_outcome(finished)
    folder = execution.folder(recipe)
    if execution.fresh and (kept := move_aside(folder)):
        say(f"kept the old run as {kept}")
    if execution.processes == 1 and not options.restarts:
        code = _train_here(recipe, dataclasses.replace(execution, fresh=False), stop)
    else:
        job = uuid.uuid4().hex
        try:
            launch(
                [argument for argument in arguments if argument != "--fresh"],
                processes=execution.processes,
                port=execution.port,
                threads=execution.threads,
                restarts=options.restarts,
                job=job,
                stop=stop,
            )
            code = _deliberate_end(folder, job) or _end_without_a_note(Run(folder))
        except LaunchError as error:
            if code := _deliberate_end(folder, job):
                return code
            tell(error)
            return error.code
    return code or _print_outcome(Run(folder))


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that was named, or with --continue that of the run, with what the options change."""
    from onehour.training.record import RECIPE, Run

    changes = recipe_changes(options)
    if options.goes_on:
        return Run(Path(options.recipe)).recipe.replace(**changes)
    if options.recipe not in RECIPES and Path(options.recipe, RECIPE).is_file():
        resumes = shlex.join(["onehour", "train", f"{options.recipe}/{RECIPE}", "--out", options.recipe])
        raise ValueError(
            f"{options.recipe} is a run: `{resumes}` resumes it, and --continue goes on from it in a new folder"
        )
    return named(options.recipe, **changes)


def _on_devices(recipe: Recipe, execution: Execution) -> Execution:
    from onehour.dist.devices import pick_device, pick_processes

    processes, line = pick_processes(pick_device(execution.device), recipe.fewest_workers // recipe.together)
    if line:
        say(line)
    return dataclasses.replace(execution, processes=processes)


def _refuse_here(error: ValueError, options: argparse.Namespace) -> int:
    """What is wrong on this host alone must be heard on the others, which would wait for it."""
    if not is_launched():
        raise error
    from onehour.runs import refuse_together

    refuse_together(error, vars(options).get("device", "auto"))


def _train_here(recipe: Recipe, execution: Execution, stop: StopSignals) -> int:
    """Train in this process, alone or as one of several; whatever is wrong is one message."""
    from onehour.dist.group import PeerLateError, PeerLostError
    from onehour.lock import FolderLostError
    from onehour.runs import run
    from onehour.training.record import NonFiniteError, StoppedError

    try:
        run(recipe, execution, signals=stop)
    except (NonFiniteError, StoppedError) as error:
        if is_launched_by_us():
            return 0  # a failure would be restarted; the launcher reads in the folder how it ended
        tell(error)
        return EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_NOT_FINITE
    except PeerLostError as error:
        told = isinstance(error, PeerLateError) and report_failure(str(error))
        if not told and not is_launched_by_us():  # which knows what became of one that is gone
            tell(error)
        return EXIT_PEER_LOST
    except ValueError as error:
        if not report_failure(str(error), final=isinstance(error, FolderLostError)):
            tell(error)
        return EXIT_BAD_INPUT
    return 0


def _deliberate_end(folder: Path, job: str) -> int:
    """The exit code of a run whose processes ended on purpose, said once; 0 where they did not."""
    from onehour.training.record import ended_on_purpose

    ended = ended_on_purpose(folder, job)
    if ended is None:
        return 0
    tell(ended[1])
    return EXIT_STOPPED if ended[0] == "stopped" else EXIT_NOT_FINITE


def _end_without_a_note(run: Run) -> int:
    """The exit code where all processes ended well: 0 if the run is finished; else a full disk has taken no note."""
    if run.finished:
        return 0
    if run.summary.get("outcome") == "non-finite":
        tell(f"{run.folder} ended as non-finite")
        return EXIT_NOT_FINITE
    text = f"stopped, and {run.folder} took no note of it: is its disk full? The same command goes on"
    tell(f"{text} from the last checkpoint")
    return EXIT_STOPPED


def _print_outcome(run: Run) -> int:
    from onehour.study.outcome import outcome_lines

    for line in outcome_lines(run):
        say(line)
    return 0


def execution_of(options: argparse.Namespace) -> Execution:
    """Where and how to run, as the options and whoever has started this process say."""
    names = {f.name for f in fields(Execution)}
    given = {key: value for key, value in vars(options).items() if key in names and value is not None}
    if isinstance(given.get("save_every"), float):
        given["save_minutes"] = given.pop("save_every")
    if "allow_different" in given:
        given["allow_different"] = tuple(given["allow_different"])
    if vars(options).get("goes_on"):
        given["continues"] = Path(options.recipe)
    if is_launched():
        started = launched().size
        if given.get("processes", started) != started:
            raise ValueError(f"--processes is {given['processes']}, but {started} were started; leave --processes out")
        given["processes"] = started
    return Execution(**given)
