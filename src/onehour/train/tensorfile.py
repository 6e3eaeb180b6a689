"""Tensors written in safetensors' format as they lie in memory: the library's own writer copies all of them first.

The format is a header's length (8 bytes, little-endian), a JSON header of types, shapes and offsets, then the tensors'
bytes. The library reads it back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onehour.train.snapshot import Snapshot

__all__ = ["write_bytes", "write_tensors"]

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Snapshot) -> dict[str, Any]:
    """Write a file of tensors, on disk when this returns.

    Args:
        tensors: contiguous, in CPU memory; each is read once.

    Returns:
        {"bytes": its size, "sha256": its digest, "finite": whether all its numbers are}.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_tensors(Path(folder) / "a.safetensors", Snapshot({"a": torch.arange(3)}))
    ...     load_file(Path(folder) / "a.safetensors")
    {'a': tensor([0, 1, 2])}
    """
    finite: list[bool] = []
    return _write(path, _parts(tensors, finite)) | {"finite": all(finite)}


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """As `write_tensors`, for bytes that there are.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(Path(folder) / "a", b"abc")["bytes"]
    3
    """
    return _write(path, iter([memoryview(content)]))


def _parts(tensors: Snapshot, finite: list[bool]) -> Iterator[memoryview]:
    # Wide types first, as the format wants tensors aligned to their own size.
    shapes = tensors.shapes
    order = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))
    header, offset = {}, 0
    for name in order:
        tensor = shapes[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        with tensors.reading(name) as tensor:
            finite.append(bool(tensor.isfinite().all()))
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterator[memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += part.nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}
