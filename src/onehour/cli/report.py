"""`onehour report` and `onehour advise`: what a sweep, runs or others' CSVs show, and what a run's noise foresees."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onehour.cli.parser import add_margin, size
from onehour.files import to_json


def add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="make a page, figures and a verdict from a sweep, runs or CSVs",
        description="Write report.html, figures/ and results.json of a sweep's folder, of runs, or of CSVs.",
    )
    report.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a sweep, runs, or CSVs of epoch,error")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (the sweep's folder, else report/)")
    add_margin(report)
    report.add_argument("--json", action="store_true", help="print JSON")
    report.set_defaults(command=report_command)


def report_command(options: argparse.Namespace, arguments: list[str]) -> int:
    return print_report(options.paths, options.out, options.margin, options.looks, as_json=options.json)


def print_report(
    paths: Sequence[Path], out: Path | None, margin: float | None, looks: int, *, as_json: bool = False
) -> int:
    """Write the report of these paths and print its verdict, or with `as_json` results.json; returns the exit code."""
    from onehour.study.report import write_report
    from onehour.study.reproduce import more_seeds
    from onehour.study.wording import headline, printable

    report = write_report(paths, out, margin, looks)
    if as_json:
        print(report.results.read_text(encoding="utf-8"), end="")
        return 0
    for sentence in headline(report.findings):
        print(printable(sentence.text))
        command = more_seeds(report.findings, sentence.seeds) if sentence.seeds else ""
        if command:
            print(printable(f"  {command}"))
    print(printable(f"report  {report.page}"))
    return 0


def add_advise(commands: Any) -> None:
    advise = commands.add_parser(
        "advise",
        help="predict from one run how far the linear rule should hold",
        description="Predict where the linear rule stops holding, from the gradient noise of a run with --noise.",
    )
    advise.add_argument("run", metavar="RUN", type=Path, help="a run's folder, at its base minibatch")
    advise.add_argument("--minibatch", type=size, metavar="SIZE", help="print a ramp that reaches this minibatch")
    advise.add_argument("--json", action="store_true", help="print JSON")
    advise.set_defaults(command=advise_command)


def advise_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.study.advice import advice_of
    from onehour.training.record import Run

    run = Run(options.run)
    advice = advice_of(run)
    content, lines, wanted = {"run": str(options.run), **advice.as_dict()}, advice.lines(), options.minibatch
    if wanted is not None:
        ramp = advice.ramp(run.recipe, wanted)
        content |= {"minibatch": wanted, "ramp": list(ramp)}
        flags = f"--minibatch {wanted}{' --ramp ' * bool(ramp)}{','.join(ramp)}"
        lines.append(f"ramp         {flags}{'' if ramp else ': none is needed, the rule should hold to it'}")
    print(to_json(content, indent=2) if options.json else "\n".join(lines))
    return 0
