"""Small files that others read at any moment: replaced or appended to whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["append_whole", "replace_whole"]


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
