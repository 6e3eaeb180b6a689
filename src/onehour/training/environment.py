"""Where a run runs: what its result may depend on outside the recipe."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from onehour.machine import cores

__all__ = ["environment"]


def environment(execution: dict[str, Any]) -> dict[str, Any]:
    """What a result may depend on outside the recipe, for a session's line of environment.json.

    Args:
        execution: how it runs, added as it is.

    >>> environment({"processes": 2})["processes"]
    2
    """
    import numpy
    import torch

    import onehour

    return {
        "command": sys.argv,
        "commit": _commit(),
        "onehour": onehour.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        **execution,
    }


def _commit() -> str | None:
    """Of the repository that the command was given in, if it was in one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
