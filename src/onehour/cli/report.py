"""`onehour report`: a page, figures and a verdict of a sweep, of runs, or of others' CSVs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onehour.cli.parser import add_margin


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
