"""Whether all hosts of a run see its folder. Process 0 alone writes it, but next time 0 may be on another host."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from onehour.dist.group import Group

__all__ = ["look_for_folder"]

TOKEN = ".seen-"
PATIENCE = 10.0


def look_for_folder(folder: Path, group: Group, *, patience: float = PATIENCE, inside: Path | None = None) -> None:
    """Process 0 writes a token, the others look for it; all processes call it together.

    Args:
        folder: the run's.
        inside: a path to the very folder that process 0 holds; None for its name.
        patience: seconds that a file system may take to show one host what another one has written.

    Raises:
        ValueError: naming both hosts, if some host does not see the folder. After a failure its process may be 0, would
            find no checkpoint and begin again.

    >>> look_for_folder(Path("nowhere"), Group())
    """
    if group.size == 1:
        return
    token = b""
    if group.rank == 0:
        inside = inside or folder
        for old in inside.glob(f"{TOKEN}*"):
            old.unlink(missing_ok=True)
        token = f"{TOKEN}{uuid.uuid4().hex}".encode()
        (inside / token.decode()).touch()
    sent = group.broadcast(token)
    assert sent is not None
    seen = {"seen": _appears(folder, sent.decode(), patience), "host": socket.gethostname()}
    rows = [json.loads(row) for row in group.gather(json.dumps(seen).encode())]
    if group.rank == 0:
        assert inside is not None
        (inside / token.decode()).unlink(missing_ok=True)
    blind = [rank for rank, row in enumerate(rows) if not row["seen"]]
    if blind:
        raise ValueError(
            f"{folder} is not shared: process {blind[0]} on {rows[blind[0]]['host']} does not see what process 0 on"
            f" {rows[0]['host']} writes there; give --out on a file system that all hosts share"
        )


def _appears(folder: Path, token: str, patience: float) -> bool:
    """Whether a file is there, or comes. Opening the folder asks a network file system for its present state."""
    deadline = time.monotonic() + patience
    while True:
        with suppress(OSError):
            if token in os.listdir(folder):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
