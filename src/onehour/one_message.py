"""What ends Python in the midst of a command is somebody's code, or a lack of something: one message says which."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from onehour.entry import blame

__all__ = ["in_one_message"]

SCARCE = re.compile("can't start new thread|Resource temporarily unavailable|failed to map segment|Cannot allocate")
"""What Python, OpenMP and the loader of libraries say where threads, processes or memory run out."""


def in_one_message(command: Callable[[], int]) -> int:
    """Run a command, whose code it returns.

    Raises:
        ValueError: where somebody's code left Python, or the machine lacks memory, threads or processes.

    >>> in_one_message(lambda: 0)
    0
    """
    try:
        return command()
    except SystemExit as error:
        said = blame(error)
        if f"{os.sep}rich{os.sep}" in said:  # how it leaves when nobody reads any more
            raise BrokenPipeError from error
        raise ValueError(f"code that was called leaves Python: {said}; it should raise an error instead") from error
    except MemoryError as error:
        raise ValueError("memory ran out; use fewer processes, --loaders or --jobs, or smaller images") from error
    except ImportError as error:
        if not SCARCE.search(str(error)):
            raise
        raise ValueError(f"memory ran out while Python imported: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if not SCARCE.search(str(error)):
            raise
        raise ValueError(
            f"this machine gives no more threads or processes ({str(error).splitlines()[0]}); use fewer --processes,"
            " --loaders or --jobs, or raise `ulimit -u`"
        ) from error
