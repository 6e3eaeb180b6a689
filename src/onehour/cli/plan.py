"""`onehour plan`: what follows from a minibatch, before anything runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from onehour.cli.parser import add_recipe_argument, add_recipe_fields, recipe_changes, size
from onehour.config import Recipe
from onehour.messages import say
from onehour.planner import Plan, plan, tabulate
from onehour.recipes import recipe as named
from onehour.recipes import resnet50
from onehour.rules.minibatch import parse_size

__all__ = ["add_plan", "plan_command"]


def add_plan(commands: Any) -> None:
    """Add the command to the command line's parsers."""
    parser = commands.add_parser(
        "plan",
        help="print what follows from a minibatch, before anything runs",
        description="Print every derived value of a run with its rule and the paper's section.",
        allow_abbrev=False,
    )
    add_recipe_argument(parser, nargs="?")
    parser.add_argument(
        "--base", metavar="LR@MINIBATCH", help="in place of a recipe: a rate and its minibatch, 0.1@256"
    )
    parser.add_argument("--processes", type=size, metavar="P", help="p, to place the k workers on")
    parser.add_argument(
        "--images-per-second", type=float, metavar="X", help="total over all processes; adds the run's duration"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="take images/s from a run's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--as", dest="tool", metavar="TOOL", help="print it for another tool: torch, timm, lightning, accelerate or hf"
    )
    add_recipe_fields(parser, several=("minibatch",))
    parser.set_defaults(command=plan_command)


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
        say(f"note: {remark}", sys.stderr)
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
