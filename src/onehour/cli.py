"""The command line: parse, call, print. Imports torch only where something trains."""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from onehour.commands import EXIT_BAD_INPUT, plan_command, train_command
from onehour.commands_check import add_check
from onehour.commands_data import add_data
from onehour.commands_report import report_command
from onehour.commands_sweep import sweep_command
from onehour.commands_verify import trace_command, verify_command
from onehour.commands_weights import evaluate_command, export_command
from onehour.config import SIZES, Recipe, nearest
from onehour.dist.signals import EXIT_STOPPED, STOPPED
from onehour.one_message import in_one_message
from onehour.output import shown
from onehour.recipes import RECIPES
from onehour.rules.minibatch import parse_size

__all__ = ["main"]

OF_THE_DATA = ("samples", "resized")
"""What a run reads from its data; only a plan, which has none, is told."""
WORKERS = (
    "--workers is not a flag, because it means two things. The paper's k workers follow from the minibatch: k = kn / n,"
    " with --minibatch and --per-worker. Processes that load data are --loaders; processes that train are --processes"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 4 not finite, 75 stopped and saved.

    >>> main(["plan", "resnet5"])
    2
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    try:
        options = _parse(parser, arguments)
        return in_one_message(lambda: options.command(options, arguments))
    except ValueError as error:
        print(f"onehour: {shown(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:  # raised by somebody's code: signals come to `StopSignals`
        print(f"onehour: {STOPPED}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a name that is too long, a folder that may not be written
        where = f"{error.filename!r}: " if error.filename else ""
        print(f"onehour: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """argparse, with one message of ours in place of usage and message."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's own: no 1e-4

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse would name the commands that are not listed, too."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            listed = [choice.dest for choice in action._choices_actions]
            self.error(f"no command is called {value!r}; expected {nearest(value, listed)}")
        super()._check_value(action, value)


def _parser() -> _Parser:
    parser = _Parser(
        prog="onehour",
        description="Large minibatches on many workers without losing accuracy.",
        epilog=f"Recipes: {', '.join(RECIPES)}, or a .toml file (RUN/recipe.toml repeats a run).",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_train(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_report(commands)
    _add_verify(commands)
    add_check(commands)
    _add_evaluate(commands)
    _add_export(commands)
    add_data(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a recipe; the same command again resumes",
        description="Train a recipe, or resume it. k, the number of workers, is never typed: it is kn / n.",
        allow_abbrev=False,
    )
    train.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(RECIPES)}, or a .toml file")
    where = train.add_argument_group("where it runs (changes nothing that it learns, beyond rounding)")
    where.add_argument(
        "--processes",
        type=_processes,
        metavar="auto|P",
        help="p, to host the k workers; auto: one a GPU, or 2 (1)",
    )
    where.add_argument(
        "--workers-per-pass", type=_auto, metavar="auto|G", help="workers that share a forward pass (auto)"
    )
    where.add_argument(
        "--loaders", type=_auto, metavar="auto|L", help="processes that load data, for each process (auto)"
    )
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (auto)")
    where.add_argument("--threads", type=int, metavar="T", help="for each process's computation (cores / P)")
    where.add_argument(
        "--restarts", type=int, default=0, metavar="R", help="how often to start all processes anew if one fails (0)"
    )
    where.add_argument(
        "--hang-timeout",
        type=float,
        metavar="S",
        help="seconds for an iteration; ten times as many for the start (120)",
    )
    where.add_argument("--port", type=int, help="for the processes to meet at (a free one)")
    where.add_argument(
        "--allow-different", nargs=1, choices=("versions",), help="train though hosts have other versions of packages"
    )
    folder = train.add_argument_group("its folder")
    folder.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/RECIPE-kn-sSEED)")
    folder.add_argument("--fresh", action="store_true", help="start over; keep the old folder under a numbered name")
    folder.add_argument(
        "--save-every",
        type=_interval,
        metavar="I|Mm",
        help="iterations, or minutes as 5m, between checkpoints (an epoch)",
    )
    folder.add_argument("--log", metavar="LOGGER", help="tensorboard, wandb or package.module:Class")
    folder.add_argument("--profile", type=int, metavar="I", help="iterations to trace into trace-RANK.json")
    _add_recipe_fields(train, but=OF_THE_DATA)
    _add_trust(train)
    train.set_defaults(command=train_command)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="print what follows from a minibatch, before anything runs",
        description="Print every derived value of a run with its rule and the paper's section.",
        allow_abbrev=False,
    )
    plan.add_argument("recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(RECIPES)}, or a .toml file")
    plan.add_argument("--base", metavar="LR@MINIBATCH", help="in place of a recipe: a rate and its minibatch, 0.1@256")
    plan.add_argument("--processes", type=_size, metavar="P", help="p, to place the k workers on")
    plan.add_argument("--images-per-second", type=float, metavar="X", help="of the whole run; adds hours")
    plan.add_argument("--run", type=Path, metavar="RUN", help="take images/s from a run's folder")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--as", dest="tool", metavar="TOOL", help="print it for another tool: torch, timm, lightning, accelerate or hf"
    )
    _add_recipe_fields(plan, several=("minibatch",))
    plan.set_defaults(command=plan_command)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="error against minibatch, over seeds and arms, as the paper's figure 1",
        description="Train a recipe at several minibatches and seeds, and with one thing changed at some of them.",
        allow_abbrev=False,
    )
    sweep.add_argument("recipe", metavar="RECIPE", help=f"{', '.join(RECIPES)}, or a .toml file")
    sweep.add_argument("--seeds", type=_size, default=5, metavar="N", help="runs of each cell, from --seed on (5)")
    sweep.add_argument(
        "--arm", action="append", metavar="FIELD=V[,V…]", help="one thing changed, or: table, pitfalls, none (table)"
    )
    sweep.add_argument("--arms-at", type=_sizes, metavar="KN[,KN…]", help="minibatches of the arms (16 times base)")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder (runs/RECIPE-sweep)")
    sweep.add_argument("--dry-run", action="store_true", help="print the cells and the time they will take")
    sweep.add_argument("--jobs", type=_auto, metavar="auto|J", help="runs at once (cores or GPUs)")
    sweep.add_argument("--processes", type=int, metavar="P", help="of each run (1)")
    sweep.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (auto)")
    sweep.add_argument(
        "--seeds-together", type=_auto, metavar="auto|S", help="seeds trained as one network; 1 for none (auto)"
    )
    sweep.add_argument("--margin", type=float, default=0.5, metavar="POINTS", help="of the verdict (0.5)")
    _add_recipe_fields(sweep, several=("minibatch",), but=OF_THE_DATA)
    _add_trust(sweep)
    sweep.set_defaults(command=sweep_command)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="a sweep, runs or others' curves as a page, figures and a verdict",
        description="Write report.html, figures/ and results.json of a sweep's folder, of runs, or of CSVs.",
        allow_abbrev=False,
    )
    report.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a sweep, runs, or CSVs of epoch,error")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (the sweep's folder, else report/)")
    report.add_argument("--margin", type=float, default=0.5, metavar="POINTS", help="of the verdict (0.5)")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(command=report_command)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove on this machine that the number of processes does not matter",
        description="Run a few iterations on several numbers of processes and compare weights, statistics, velocity.",
        allow_abbrev=False,
    )
    verify.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe, or give --model and --data")
    verify.add_argument("--processes", metavar="P,P,…", help="numbers of processes (1,2,4)")
    verify.add_argument("--steps", type=int, default=20, metavar="I", help="iterations (20)")
    verify.add_argument("--model", metavar="M", help="in place of the recipe's")
    verify.add_argument("--data", metavar="D", help="in place of the recipe's")
    verify.add_argument("--minibatch", type=_size, metavar="SIZE", help="kn; grows to the largest p times n")
    verify.add_argument("--per-worker", type=_size, metavar="SIZE", help="n")
    verify.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    _add_trust(verify)
    verify.set_defaults(command=verify_command)
    traced = commands.add_parser("trace-for-verify")  # without help, so that it is not listed
    traced.add_argument("folder", type=Path)
    _add_trust(traced)
    traced.set_defaults(command=trace_command)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="the error of a run's newest checkpoint, or of a file",
        description="Evaluate weights on validation data: integer counts, every sample once.",
        allow_abbrev=False,
    )
    evaluate.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    evaluate.add_argument("--recipe", metavar="RECIPE", help="for a file: its recipe, or give --model and --data")
    evaluate.add_argument("--data", metavar="D", help="in place of the recipe's")
    evaluate.add_argument("--model", metavar="M", help="in place of the recipe's")
    evaluate.add_argument("--classes", type=_size, help="labels, where the data does not say")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_trust(evaluate)
    evaluate.set_defaults(command=evaluate_command)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a run's weights for torchvision, timm and others",
        description="Write a run's weights as a plain state dict under torch's own names.",
        allow_abbrev=False,
    )
    export.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    export.add_argument("--to", metavar="FILE", type=Path, required=True, help="ends in .safetensors or .pt")
    export.set_defaults(command=export_command)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust", action="store_true", help="import the code that a recipe's file names, untyped")


def _add_recipe_fields(
    parser: argparse.ArgumentParser, several: tuple[str, ...] = (), but: tuple[str, ...] = ()
) -> None:
    group = parser.add_argument_group("the recipe (default: the recipe's own)")
    hints = get_type_hints(Recipe)
    for field in fields(Recipe):
        if field.name == "name" or field.name in but:
            continue
        flag, options = f"--{field.name.replace('_', '-')}", _options(field, hints[field.name])
        if field.name in several:
            options |= {"type": _sizes, "metavar": "KN[,KN…]"}
        group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **options)


def _options(field: Field[Any], hint: Any) -> dict[str, Any]:
    assert field.default is not MISSING
    about = {"help": field.metadata["help"].replace("%", "%%")}
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, **about}
    if get_origin(hint) is Literal:
        return {"metavar": "|".join(get_args(hint)), **about}  # the Recipe checks it, and offers the nearest
    if field.name in SIZES:
        return {"type": _size, "metavar": "SIZE", **about}
    if get_origin(hint) is tuple:
        return {"type": lambda text: tuple(text.split(",")), "metavar": "E,E,…", **about}
    return {"type": hint, "metavar": hint.__name__.upper(), **about}


def _parse(parser: _Parser, arguments: list[str]) -> argparse.Namespace:
    if any(argument.split("=")[0] == "--workers" for argument in arguments):
        raise ValueError(WORKERS)
    theirs: list[str] = []
    if arguments[:1] == ["check"] and "--" in arguments:  # argparse would give the script none, and then not know them
        cut = arguments.index("--")
        arguments, theirs = arguments[:cut], arguments[cut + 1 :]
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in _actions(parser, arguments) for flag in action.option_strings]
        word = unknown[0].split("=")[0]
        if word.removeprefix("--") in OF_THE_DATA:
            raise ValueError(f"{word} is read from the data; only `onehour plan`, which has none, takes it")
        hint = f"; expected {nearest(word, flags)}" if word.startswith("--") and flags else ""
        raise ValueError(f"unknown argument {unknown[0]!r}{hint}; see `onehour --help`")
    if theirs:
        options.arguments = [*options.arguments, *theirs]
    return options


def _actions(parser: _Parser, arguments: list[str]) -> list[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and arguments and arguments[0] in action.choices:
            return action.choices[arguments[0]]._actions
    return parser._actions


def _auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a whole number, got {text!r}") from None


def _processes(text: str) -> int | str:
    number = _auto(text)
    return text if number is None else number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:  # argparse would replace the text of any other error
        raise argparse.ArgumentTypeError(str(error)) from None


def _interval(text: str) -> int | float:
    """Iterations as a whole number; minutes, which end in m, as a float."""
    if not text.endswith("m"):
        return _size(text)
    try:
        return float(text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected iterations, or minutes as 5m, got {text!r}") from None


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_size(part) for part in text.split(","))
