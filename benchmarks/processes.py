"""Fresh processes for a measurement, as a launcher would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

__all__ = ["measured"]


def measured(script: str, *arguments: str, processes: int, threads: int, **environment: str) -> Any:
    """Run `python SCRIPT ARGUMENTS` in p processes; the JSON in the last line that process 0 prints."""
    shared = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    return json.loads(outputs[0].splitlines()[-1])
