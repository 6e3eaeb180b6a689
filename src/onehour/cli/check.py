"""`onehour check`: the paper's pitfalls in anyone's training script."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.rules.arguments import positive
from onehour.rules.minibatch import parse_size

if TYPE_CHECKING:
    from onehour.check.run.checking import Checked

__all__ = ["add_check", "check_command"]


def add_check(commands: Any) -> None:
    """Add the command to the command line's parsers."""
    check = commands.add_parser(
        "check",
        help="find the paper's pitfalls in your own training script",
        description="Run a training script, unedited, for a few iterations, and say what in it breaks the paper's"
        " rules, by how much, where, and what to change. Leaves with 0 if nothing was found, 1 if something was, 2 if"
        " the script could not be checked, 3 if nothing was found and something that was asked for was not judged.",
        allow_abbrev=False,
    )
    check.add_argument("script", metavar="SCRIPT", nargs="?", help="a Python file; its own arguments come after --")
    check.add_argument(
        "arguments",
        metavar="-- ARGUMENTS",
        nargs="*",
        help="the script's own arguments; without SCRIPT a command: -- torchrun --nproc-per-node 2 train.py --lr 1",
    )
    base = check.add_argument_group("the recipe that it was scaled from (else rates are not judged against it)")
    base.add_argument("--base-lr", type=float, metavar="LR", help="the rate that is right for the base minibatch")
    base.add_argument("--base-minibatch", type=_size, metavar="SIZE", help="images per update at that rate")
    base.add_argument("--base-per-worker", type=_size, metavar="N", help="n, images that BatchNorm sees at once there")
    base.add_argument("--base-weight-decay", type=float, metavar="λ", help="as given to the optimizer")
    check.add_argument("--only", type=_ids, default=(), metavar="ID,…", help="pitfalls to look for (all)")
    check.add_argument("--skip", type=_ids, default=(), metavar="ID,…", help="pitfalls to leave out")
    check.add_argument("--strict", action="store_true", help="leave with 3 if any pitfall could not be judged")
    check.add_argument("--limit", type=float, default=120.0, metavar="S", help="seconds for the whole check (120)")
    form = check.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of findings as JSON")
    form.add_argument("--sarif", action="store_true", help="print the findings as SARIF 2.1.0, for code scanning")
    form.add_argument("--github", action="store_true", help="print the findings as annotations of a GitHub workflow")
    check.set_defaults(command=check_command)


def check_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """Check a script and print its findings: 0 without any, 1 with some, 2 if it could not be checked."""
    from onehour.check.case import Base
    from onehour.check.finding import as_json
    from onehour.check.judge import as_table
    from onehour.check.run.checking import check_script
    from onehour.check.run.command import Command, read_command
    from onehour.check.run.forkserver import CheckError
    from onehour.check.run.formats import as_annotations, as_sarif

    try:
        if options.script:
            command = Command(options.script, options.arguments)
        elif options.arguments:
            command = read_command(options.arguments, Path())
        else:
            raise ValueError("check needs a script: `onehour check train.py -- ITS ARGUMENTS`")
        checked = check_script(
            command,
            base=Base(options.base_lr, options.base_minibatch, options.base_per_worker, options.base_weight_decay),
            only=options.only,
            skip=options.skip,
            strict=options.strict,
            limit=positive("--limit", options.limit),
        )
    except CheckError as error:
        print(f"onehour: {error}", file=sys.stderr)
        return 2
    if options.json or options.sarif:
        print(as_json(checked.findings) if options.json else as_sarif(checked.findings, command.script))
        return _exit_code(checked, options)
    for note in checked.notes:
        print(f"note: {note}")
    if checked.findings and options.github:
        print(as_annotations(checked.findings, command.script))
    elif checked.findings:
        print(as_table(checked.findings, width=min(shutil.get_terminal_size((100, 24)).columns, 120)))
        print()
    count = len(checked.findings)
    print(checked.runs)
    print(f"{command.script}: " + (f"{count} finding{'s' * (count != 1)}" if count else "nothing found"))
    return _exit_code(checked, options)


def _exit_code(checked: Checked, options: argparse.Namespace) -> int:
    """1 with findings; else 3 where a pitfall that was asked for was not judged."""
    unjudged = {name for note in checked.notes for name in note.pitfalls} - {*options.skip}
    missing = unjudged if options.strict else unjudged & {*options.only}
    return 1 if checked.findings else 3 if missing else 0


def _ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:  # argparse would replace the text of any other error
        raise argparse.ArgumentTypeError(str(error)) from None
