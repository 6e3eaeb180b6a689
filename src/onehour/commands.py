"""What each command does with its parsed options."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from onehour.config import Recipe
from onehour.execution import Execution
from onehour.planner import Plan, plan, tabulate
from onehour.recipes import recipe as named
from onehour.recipes import resnet50
from onehour.rules.minibatch import parse_size

if TYPE_CHECKING:
    from onehour.train.record import Run

__all__ = ["EXIT_BAD_INPUT", "EXIT_NOT_FINITE", "EXIT_STOPPED", "plan_command", "train_command"]

EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_STOPPED = 2, 4, 75


def train_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """`onehour train`: check, then run here or in p processes, then print how it ended."""
    recipe = named(options.recipe, **_recipe_changes(options))
    execution = _execution(options)
    from onehour.dist.launch import (
        LaunchError,
        adopt_slurm,
        is_launched,
        is_launched_by_us,
        launch,
        refuse_used_port,
    )
    from onehour.train.record import Run, move_aside

    adopt_slurm()
    if is_launched():
        code = _train_here(recipe, execution)
        ours = is_launched_by_us() or os.environ["RANK"] != "0"
        return code or (0 if ours else _print_outcome(Run(execution.folder(recipe))))
    from onehour.api import check

    refuse_used_port(execution.port)
    finished = check(recipe, execution)
    if finished is not None:
        print(f"{finished.folder} is finished; --fresh starts over and keeps it under a numbered name")
        return _print_outcome(finished)
    folder = execution.folder(recipe)
    if execution.fresh and (kept := move_aside(folder)):
        print(f"kept the old run as {kept}")
    if execution.processes == 1:
        code = _train_here(recipe, dataclasses.replace(execution, fresh=False))
    else:
        try:
            launch(
                [argument for argument in arguments if argument != "--fresh"],
                processes=execution.processes,
                port=execution.port,
                threads=execution.threads,
            )
            code = 0
        except LaunchError as error:
            print(f"onehour: {error}", file=sys.stderr)
            return error.code
    return code or _print_outcome(Run(folder))


def _train_here(recipe: Recipe, execution: Execution) -> int:
    """Train in this process, alone or as one of several; whatever is wrong is one message."""
    from onehour.api import run
    from onehour.dist.launch import report_failure
    from onehour.train.run import NonFiniteError, StoppedError

    try:
        run(recipe, execution, stop_asked=_StopOnSignals())
    except (ValueError, NonFiniteError, StoppedError) as error:
        if not report_failure(str(error)):
            print(f"onehour: {error}", file=sys.stderr)
        codes: dict[type, int] = {NonFiniteError: EXIT_NOT_FINITE, StoppedError: EXIT_STOPPED}
        return codes.get(type(error), EXIT_BAD_INPUT)
    return 0


class _StopOnSignals:
    """From the first iteration on, SIGTERM or SIGINT asks the run to save and stop; a second one ends it at once.

    Before that there is nothing to save, and a signal ends the process as usual.
    """

    def __init__(self) -> None:
        self._asked: bool | None = None

    def __call__(self) -> bool:
        if self._asked is None:
            self._asked = False
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)
        return self._asked

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)


def _print_outcome(run: Run) -> int:
    from onehour.study.outcome import outcome_lines

    for line in outcome_lines(run):
        print(line)
    return 0


def plan_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """`onehour plan`: one minibatch as a list of derived values, several as the paper's table."""
    changes = _recipe_changes(options)
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
    from onehour.train.record import Run

    speed = Run(options.run).summary.get("images_per_second")
    if not speed:
        raise ValueError(f"{options.run} has no images_per_second yet: it has no summary.json")
    return speed


def _json_list(plans: list[Plan]) -> str:
    return "[" + ",\n".join(plan.to_json() for plan in plans) + "]"


def _recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    names = {f.name for f in fields(Recipe)} - {"name"}
    return {key: value for key, value in vars(options).items() if key in names}


def _execution(options: argparse.Namespace) -> Execution:
    names = {f.name for f in fields(Execution)}
    given = {key: value for key, value in vars(options).items() if key in names and value is not None}
    if "WORLD_SIZE" in os.environ:
        given["processes"] = int(os.environ["WORLD_SIZE"])
    return Execution(**given)
