"""Named arrays in one file, read into memory once: processes that are forked afterwards have them in common.

They are not mapped: a file that is cut short in its place would end every process that looks at it, without a word.

The file is safetensors, so that anyone can read it. Its metadata has one entry, "onehour": JSON with what the arrays
are about and a SHA-256 of everything, so that a damaged file is never half believed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from onehour.data.faults import FaultError
from onehour.files import replace_whole

__all__ = ["open_arrays", "write_arrays"]

KEY = "onehour"
AGAIN = "make it again"
LONGEST = 2**28
"""Bytes of a header at most: it names every class."""
TYPES = {"U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write a file of arrays, whole or not at all.

    Args:
        arrays: of uint8, int32, uint32 or int64.
        about: any JSON.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arrays(Path(folder) / "a.index", {"ends": np.arange(3)}, {"kind": "example"})
    ...     arrays, about = open_arrays(Path(folder) / "a.index")
    >>> arrays["ends"].tolist(), about
    ([0, 1, 2], {'kind': 'example'})
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    text = json.dumps(about, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, array in arrays.items():
        digest.update(_described(name, array))
        digest.update(array.data)
    metadata = {KEY: json.dumps({"about": about, "sha256": digest.hexdigest()})}
    replace_whole(path.parent, path.name, save(arrays, metadata=metadata))


def open_arrays(path: Path, *, verify: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, read-only views of its bytes, and what they are about.

    Args:
        verify: read all of it and compare the digest; a process that opens what another has verified need not.

    Raises:
        FaultError: a ValueError, if the file cannot be read, is of another kind, or is damaged.

    >>> open_arrays(Path("nowhere.index"))
    Traceback (most recent call last):
    onehour.data.faults.FaultError: nowhere.index cannot be read: No such file or directory; make it again
    """
    try:
        with path.open("rb") as file:
            header = _header(file)
            own = json.loads(header.pop("__metadata__")[KEY])
            about, expected = own["about"], own["sha256"]
            content = _shared(file)
        arrays = {name: _array(content, entry) for name, entry in header.items()}
    except OSError as error:
        raise FaultError(str(path), f"cannot be read: {error.strerror or error}", AGAIN) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FaultError(str(path), "is no index of onehour, or a damaged one", AGAIN) from error
    if verify:
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, array in sorted(arrays.items()):
            digest.update(_described(name, array))
            digest.update(array.data)
        if digest.hexdigest() != expected:
            raise FaultError(str(path), "is damaged: its SHA-256 is not the one that it was written with", AGAIN)
    return arrays, about


def _described(name: str, array: np.ndarray) -> bytes:
    return f"\n{name} {array.dtype.str} {array.shape}\n".encode()


def _header(file: BufferedReader) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if length > LONGEST:
        raise ValueError("it begins with no header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise TypeError("its header is no object")
    return header


def _shared(file: BufferedReader) -> memoryview:
    """The rest of a file, in memory that this process and all forked from it have in common."""
    size = os.fstat(file.fileno()).st_size - file.tell()
    memory = memoryview(mmap.mmap(-1, max(size, 1)))[: max(size, 0)]
    if file.readinto(memory) != len(memory):
        raise ValueError("it ends while it is read")
    return memory.toreadonly()


def _array(content: memoryview, entry: dict[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    kind = np.dtype(TYPES[entry["dtype"]]).newbyteorder("<")
    return np.frombuffer(content, kind, (last - first) // kind.itemsize, first).reshape(entry["shape"])
