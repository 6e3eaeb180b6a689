"""`onehour advise`: up to which minibatch the linear rule should hold, from the gradient noise of one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from onehour.files import to_json


def add_advise(commands: Any) -> None:
    advise = commands.add_parser(
        "advise",
        help="up to which minibatch the rule should hold, from one run",
        description="Foresee the linear rule's end from the gradient noise of a run that was trained with --noise.",
    )
    advise.add_argument("run", metavar="RUN", type=Path, help="a run's folder, at its base minibatch")
    advise.add_argument("--json", action="store_true", help="print JSON")
    advise.set_defaults(command=advise_command)


def advise_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.study.advice import advice_of
    from onehour.training.record import Run

    advice = advice_of(Run(options.run))
    content = {"run": str(options.run), **advice.as_dict()}
    print(to_json(content, indent=2) if options.json else "\n".join(advice.lines()))
    return 0
