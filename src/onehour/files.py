"""Small files that others read at any moment: replaced or appended to whole, or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["append_whole", "replace_whole", "to_json"]


def replace_whole(path: Path, text: str) -> None:
    """Write a file under another name, bring it to disk, and give it its name.

    Raises:
        OSError: if the disk refuses; what stood there stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     replace_whole(Path(folder) / "a", "all")
    ...     (Path(folder) / "a").read_text()
    'all'
    """
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_whole(path: Path, content: bytes, *, behind: int | None = None) -> None:
    """Append to a file; what a full disk takes of it is cut off again.

    Args:
        behind: how many of its bytes stay; None for all.

    Raises:
        OSError: if the disk refuses; the file then ends where it would have been appended to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     append_whole(Path(folder) / "a", b"one\\nhal")
    ...     append_whole(Path(folder) / "a", b"two\\n", behind=4)
    ...     (Path(folder) / "a").read_bytes()
    b'one\\ntwo\\n'
    """
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if behind is not None:
            size = file.truncate(behind)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def to_json(content: Any, *, indent: int | None = None) -> str:
    """JSON of plain values, as every reader of JSON takes it: a number that is not finite is null.

    >>> to_json({"loss": float("nan"), "η": 0.1})
    '{"loss": null, "η": 0.1}'
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
