"""What each command does with its parsed options."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import uuid
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from onehour.config import Recipe
from onehour.dist.signals import EXIT_STOPPED, StopSignals
from onehour.entry import asked_for
from onehour.execution import Execution
from onehour.planner import Plan, plan, tabulate
from onehour.recipes import recipe as named
from onehour.recipes import resnet50
from onehour.rules.minibatch import parse_size

if TYPE_CHECKING:
    from onehour.training.record import Run

__all__ = ["EXIT_BAD_INPUT", "EXIT_NOT_FINITE", "EXIT_STOPPED", "plan_command", "recipe_changes", "train_command"]

EXIT_PEER_LOST, EXIT_BAD_INPUT, EXIT_NOT_FINITE = 1, 2, 4


def train_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """`onehour train`: check, then run here or in p processes, then print how it ended."""
    from onehour.dist.launch import ENDS, end_with_launcher, is_launched_by_us
    from onehour.dist.launched import is_launched

    with StopSignals(speaks=not is_launched_by_us()) as stop:
        if os.environ.pop(ENDS, None) or is_launched():
            end_with_launcher()
        return _train(options, arguments, stop)


def _train(options: argparse.Namespace, arguments: list[str], stop: StopSignals) -> int:
    if options.restarts < 0:
        raise ValueError(f"restarts must not be below zero, got {options.restarts}")
    from onehour.dist.launch import LaunchError, is_launched_by_us, launch, refuse_used_port
    from onehour.dist.launched import adopt, is_launched, launched
    from onehour.training.record import Run, move_aside

    adopt()
    try:
        recipe = asked_for(named(options.recipe, **recipe_changes(options)), trust=options.trust)
        execution = _execution(options)
    except ValueError as error:
        return _refuse_here(error, options)
    if is_launched():
        code = _train_here(recipe, execution, stop)
        ours = is_launched_by_us() or launched().rank != 0
        return code or (0 if ours else _print_outcome(Run(execution.folder(recipe))))
    from onehour.runs import check_start

    if options.processes == "auto":
        execution = _on_devices(recipe, execution)
    refuse_used_port(execution.port)
    finished = check_start(recipe, execution)
    if finished is not None:
        _say(f"{finished.folder} is finished; --fresh starts over and keeps it under a numbered name")
        return _print_outcome(finished)
    folder = execution.folder(recipe)
    if execution.fresh and (kept := move_aside(folder)):
        _say(f"kept the old run as {kept}")
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
            _say(f"onehour: {error}", sys.stderr)
            return error.code
    return code or _print_outcome(Run(folder))


def _on_devices(recipe: Recipe, execution: Execution) -> Execution:
    """As many processes as the devices of this machine are for."""
    from onehour.dist.devices import pick_processes
    from onehour.training.build import pick_device

    processes, line = pick_processes(pick_device(execution.device), recipe.workers.workers)
    if line:
        _say(line)
    return dataclasses.replace(execution, processes=processes)


def _refuse_here(error: ValueError, options: argparse.Namespace) -> int:
    """What is wrong on this host alone must be heard on the others, which would wait for it."""
    from onehour.dist.launched import is_launched

    if not is_launched():
        raise error
    from onehour.runs import refuse_together

    refuse_together(error, options.device or "auto")


def _train_here(recipe: Recipe, execution: Execution, stop: StopSignals) -> int:
    """Train in this process, alone or as one of several; whatever is wrong is one message."""
    from onehour.dist.group import PeerLateError, PeerLostError
    from onehour.dist.launch import is_launched_by_us, report_failure
    from onehour.lock import FolderLostError
    from onehour.runs import run
    from onehour.training.record import NonFiniteError, StoppedError

    try:
        run(recipe, execution, signals=stop)
    except (NonFiniteError, StoppedError) as error:
        if is_launched_by_us():
            return 0  # a failure would be restarted; the launcher reads in the folder how it ended
        _say(f"onehour: {error}", sys.stderr)
        return EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_NOT_FINITE
    except PeerLostError as error:
        told = isinstance(error, PeerLateError) and report_failure(str(error))
        if not told and not is_launched_by_us():  # which knows what became of one that is gone
            _say(f"onehour: {error}", sys.stderr)
        return EXIT_PEER_LOST
    except ValueError as error:
        if not report_failure(str(error), final=isinstance(error, FolderLostError)):
            _say(f"onehour: {error}", sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _deliberate_end(folder: Path, job: str) -> int:
    """The exit code of a run whose processes ended on purpose, said once; 0 where they did not."""
    from onehour.training.record import ended_on_purpose

    ended = ended_on_purpose(folder, job)
    if ended is None:
        return 0
    _say(f"onehour: {ended[1]}", sys.stderr)
    return EXIT_STOPPED if ended[0] == "stopped" else EXIT_NOT_FINITE


def _end_without_a_note(run: Run) -> int:
    """The exit code where all processes ended well: 0 if the run is finished; else a full disk has taken no note."""
    if run.finished:
        return 0
    if run.summary.get("outcome") == "non-finite":
        _say(f"onehour: {run.folder} ended as non-finite", sys.stderr)
        return EXIT_NOT_FINITE
    text = f"stopped, and {run.folder} took no note of it: is its disk full? The same command goes on"
    _say(f"onehour: {text} from the last checkpoint", sys.stderr)
    return EXIT_STOPPED


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print; a full disk, or a reader that is gone, makes no failure of a run."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def _print_outcome(run: Run) -> int:
    from onehour.study.outcome import outcome_lines

    for line in outcome_lines(run):
        _say(line)
    return 0


def plan_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """`onehour plan`: one minibatch as a list of derived values, several as the paper's table."""
    changes = recipe_changes(options)
    sizes = changes.pop("minibatch", (None,))
    recipe = _base_recipe(options, changes)
    speed = _images_per_second(options)
    plans = [
        plan(
            recipe,
            processes=options.processes,
            images_per_second=speed,
            **({} if size is None else {"minibatch": size}),
        )
        for size in sizes
    ]
    for remark in dict.fromkeys(remark for each in plans for remark in each.recipe.remarks):
        _say(f"note: {remark}", sys.stderr)
    if options.tool is not None:
        print(_translated(plans, options))
    elif options.json:
        print(plans[0].to_json() if len(plans) == 1 else _json_list(plans))
    else:
        print(tabulate(plans))
    return 0


def _translated(plans: list[Plan], options: argparse.Namespace) -> str:
    from onehour.translate import translate

    if options.json:
        raise ValueError("give --as or --json, not both")
    if len(plans) > 1:
        raise ValueError(f"--as translates one minibatch, got {len(plans)}; give --minibatch a single one")
    return translate(plans[0], options.tool)


def _base_recipe(options: argparse.Namespace, changes: dict[str, Any]) -> Recipe:
    if (options.recipe is None) == (options.base is None):
        raise ValueError(
            "plan needs a RECIPE or --base LR@MINIBATCH, and not both; for example `onehour plan resnet50`"
        )
    if options.recipe is not None:
        return named(options.recipe, **changes)
    rate, _, minibatch = options.base.partition("@")
    try:
        base_lr = float(rate if minibatch else "")
    except ValueError:
        raise ValueError(
            f"--base is {options.base!r}; expected a rate and its minibatch, for example 0.1@256"
        ) from None
    size = parse_size(minibatch)
    defaults = {
        "base_lr": base_lr,
        "base_minibatch": size,
        "minibatch": size,
        "name": "base",
        "samples": None,
    }
    return resnet50(**(defaults | changes))


def _images_per_second(options: argparse.Namespace) -> float | None:
    if options.run is None:
        return options.images_per_second
    if options.images_per_second is not None:
        raise ValueError("give --images-per-second or --run, not both")
    from onehour.training.record import Run

    speed = Run(options.run).summary.get("images_per_second")
    if not speed:
        raise ValueError(f"{options.run} has no images_per_second yet: it has no summary.json")
    return speed


def _json_list(plans: list[Plan]) -> str:
    return "[" + ",\n".join(plan.to_json() for plan in plans) + "]"


def recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields that options give.

    >>> recipe_changes(argparse.Namespace(minibatch=64, out=None))
    {'minibatch': 64}
    """
    names = {f.name for f in fields(Recipe)} - {"name"}
    return {key: value for key, value in vars(options).items() if key in names}


def _execution(options: argparse.Namespace) -> Execution:
    from onehour.dist.launched import is_launched, launched

    names = {f.name for f in fields(Execution)}
    given = {key: value for key, value in vars(options).items() if key in names and value is not None}
    if isinstance(given.get("save_every"), float):
        given["save_minutes"] = given.pop("save_every")
    if given.get("processes") == "auto":
        del given["processes"]
    if "allow_different" in given:
        given["allow_different"] = tuple(given["allow_different"])
    if is_launched():
        started = launched().size
        if given.get("processes", started) != started:
            raise ValueError(f"--processes is {given['processes']}, but {started} were started; leave --processes out")
        given["processes"] = started
    return Execution(**given)
