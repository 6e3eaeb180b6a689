"""`onehour advise`: up to which minibatch the linear rule should hold, from the gradient noise of one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from onehour.cli.parser import size
from onehour.files import to_json


def add_advise(commands: Any) -> None:
    advise = commands.add_parser(
        "advise",
        help="predict from one run how far the linear rule should hold",
        description="Foresee the linear rule's end from the gradient noise of a run that was trained with --noise.",
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
