"""`onehour plan`: what follows from a minibatch, before anything runs."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from onehour.cli.parser import add_recipe_argument, add_recipe_fields, recipe_changes, sizes
from onehour.config import Recipe
from onehour.messages import say
from onehour.planner import Plan, plan, tabulate
from onehour.recipes import recipe as named
from onehour.recipes import resnet50
from onehour.rules.minibatch import parse_size


def add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="print what follows from a minibatch, before anything runs",
        description="Print every derived value of a run with its rule and the paper's section.",
    )
    add_recipe_argument(parser, nargs="?")
    parser.add_argument(
        "--base", metavar="LR@MINIBATCH", help="instead of a recipe: a rate and its minibatch, such as 0.1@256"
    )
    parser.add_argument("--processes", type=sizes, metavar="P[,P…]", help="p, the processes to place the k workers on")
    parser.add_argument(
        "--holds-to",
        type=sizes,
        metavar="LOW,HIGH",
        help="an interval for the largest minibatch to which the rule holds; adds the largest k",
    )
    hours = parser.add_argument_group("how long it takes")
    hours.add_argument(
        "--images-per-second", type=float, metavar="X", help="total over all processes; adds the run's duration"
    )
    hours.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help="a finished run, of the recipe or in its place; adds hours and efficiency",
    )
    hours.add_argument(
        "--bandwidth",
        type=float,
        metavar="GBIT",
        help="Gbit/s of each process's link; for a number of processes that the run did not have",
    )
    hours.add_argument("--latency", type=float, default=50, metavar="US", help="µs from one process to the next (50)")
    hours.add_argument(
        "--spread",
        type=float,
        metavar="SIGMA",
        help="σ of a process's iterations, as a share of their mean: all wait for the slowest (the run's)",
    )
    hours.add_argument("--price", type=float, metavar="X", help="price of one process for an hour")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--as", dest="tool", metavar="TOOL", help="print it for another tool: torch, timm, lightning, accelerate or hf"
    )
    add_recipe_fields(parser, several=("minibatch",))
    parser.set_defaults(command=plan_command)


def plan_command(options: argparse.Namespace, arguments: list[str]) -> int:
    changes = recipe_changes(options)
    minibatches = changes.pop("minibatch", (None,))
    largest = max((minibatch for minibatch in minibatches if minibatch is not None), default=None)
    recipe = _base_recipe(options, changes | _given(minibatch=largest))  # a ramp grows to a minibatch above its own
    if options.images_per_second is not None and len(minibatches) > 1:
        raise ValueError("--images-per-second applies to one minibatch; for several give --run")
    if options.holds_to is not None and len(options.holds_to) != 2:
        raise ValueError("--holds-to takes an interval of minibatches, for example 512,2k")
    names = ("images_per_second", "run", "bandwidth", "latency", "spread", "price", "holds_to")
    given = {name: getattr(options, name) for name in names}
    for minibatch in minibatches:
        recipe.replace(**_given(minibatch=minibatch))  # one that no run can have is refused, whatever the others are
    pairs = list(itertools.product(minibatches, options.processes or (None,)))
    plans, impossible = list[Plan](), list[tuple[str, ValueError]]()
    for minibatch, processes in pairs:
        try:
            plans.append(plan(recipe, processes=processes, **given, **_given(minibatch=minibatch)))
        except ValueError as error:
            pair = _given(minibatch=minibatch, processes=processes)
            impossible.append((", ".join(f"{name} {value}" for name, value in pair.items()), error))
    if not plans:
        raise impossible[0][1]
    for pair, error in impossible:
        say(f"note: {pair} is not possible: {error}", sys.stderr)
    for remark in dict.fromkeys(remark for each in plans for remark in each.recipe.remarks):
        say(f"note: {remark}", sys.stderr)
    if options.tool is not None:
        from onehour.translate import translate

        if options.json:
            raise ValueError("give --as or --json, not both")
        if len(pairs) > 1:
            raise ValueError(
                f"--as translates one plan, got {len(pairs)}; give one minibatch and one number of processes"
            )
        print(translate(plans[0], options.tool))
    elif options.json:
        text = ",\n".join(each.to_json() for each in plans)
        print(text if len(pairs) == 1 else f"[{text}]")
    else:
        print(tabulate(plans))
    return 0


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _base_recipe(options: argparse.Namespace, changes: dict[str, Any]) -> Recipe:
    if (options.recipe is None) == (options.base is None):
        if options.recipe is None and options.run is not None:
            from onehour.training.record import Run

            return Run(options.run).recipe.replace(**changes)
        raise ValueError(
            "plan needs a RECIPE or --base LR@MINIBATCH, and not both, or a --run; for example `onehour plan resnet50`"
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
    defaults = {"base_lr": base_lr, "base_minibatch": size, "minibatch": size, "name": "base", "samples": None}
    return resnet50(**(defaults | changes))
