"""The command line: flags beside what the commands do. Imports torch only where something trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from onehour.cli.check import add_check
from onehour.cli.data import add_data
from onehour.cli.parser import EXIT_BAD_INPUT, Parser, parse
from onehour.cli.plan import add_plan
from onehour.cli.report import add_advise, add_report
from onehour.cli.sweep import add_sweep
from onehour.cli.train import add_train
from onehour.cli.verify import add_verify
from onehour.cli.weights import add_evaluate, add_export, add_predict, add_recalibrate
from onehour.dist.signals import EXIT_STOPPED, STOPPED
from onehour.messages import in_one_message, shown, tell
from onehour.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 4 not finite, 75 stopped and saved."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(make_parser(), arguments)
        return in_one_message(lambda: options.command(options, arguments))
    except ValueError as error:
        tell(shown(str(error)))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:  # raised by somebody's code: signals come to `StopSignals`
        tell(STOPPED)
        return EXIT_STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a name that is too long, a folder that may not be written
        where = f"{error.filename!r}: " if error.filename else ""
        tell(f"{where}{error.strerror or error}")
        return EXIT_BAD_INPUT


def make_parser() -> Parser:
    parser = Parser(
        prog="onehour",
        description="Train with large minibatches on many workers without losing accuracy.",
        epilog=f"Recipes: {', '.join(RECIPES)}, or a .toml file (RUN/recipe.toml repeats a run).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for add in (
        *(add_train, add_plan, add_sweep, add_report, add_verify, add_check, add_advise, add_evaluate, add_predict),
        *(add_recalibrate, add_export, add_data),
    ):
        add(commands)
    return parser
