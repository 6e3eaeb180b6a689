"""`python -m onehour` and the command `onehour`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from onehour.cli import main
from onehour.dist.launched import is_launched
from onehour.dist.signals import ignore_stops

__all__ = ["run"]


def run() -> NoReturn:
    """Run the command and leave with its code.

    One of several processes leaves at once when it is done: Gloo's threads now and then abort an interpreter that
    shuts down in the usual way, and the whole run would then count as failed.
    """
    code = main()
    if not is_launched():
        ignore_stops()  # the interpreter's end takes a while
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
