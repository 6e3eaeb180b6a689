"""`python -m onehour` and the command `onehour`."""

from __future__ import annotations

import os
import signal
import sys


def run() -> None:
    """Run the command and leave with its code, from the first instruction on with one line where a signal ends it.

    One of several processes leaves at once when it is done: Gloo's threads now and then abort an interpreter that
    shuts down in the usual way, and the whole run would then count as failed.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from onehour.dist.signals import OURS, STOPPED, StopSignals, ignore_stops

    StopSignals(speaks=OURS not in os.environ, text=STOPPED).__enter__()  # to the end: nothing is put back
    from onehour.cli import main
    from onehour.dist.launched import is_launched
    from onehour.messages import escape_output, let_go

    escape_output()
    code = main()
    ignore_stops()  # the interpreter's end takes a while
    let_go()
    if is_launched():
        os._exit(code)
    sys.exit(code)


def _leave(number: int, frame: object) -> None:
    """Before anything is imported that could listen."""
    os.write(2, b"onehour: stopped\n")
    os._exit(75)


if __name__ == "__main__":
    run()
