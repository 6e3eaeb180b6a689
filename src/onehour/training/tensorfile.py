"""Tensors written in safetensors' format, a piece at a time: the library's own writer copies all of them first.

The format is a header's length (8 bytes, little-endian), a JSON header of types, shapes and offsets, then the tensors'
bytes. The library reads it back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.training.snapshot import Snapshot

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
    """Write a new file of tensors, on disk when this returns.

    Args:
        tensors: each is read once.

    Returns:
        {"bytes": its size, "sha256": its digest, "finite": whether all its numbers are}.

    Raises:
        OSError: if the disk refuses, or the file is there already.
        ValueError: for a type that the format does not have.

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
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files here do not hold; use float32")
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        for piece in tensors.pieces(name):
            finite.append(_is_finite(piece))
            yield piece.view(torch.uint8).numpy().data


def _is_finite(piece: Tensor) -> bool:
    """Smallest and largest take one pass and no memory; a NaN is both."""
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(piece))


def _write(path: Path, parts: Iterator[memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    # A new file: neither through a link that somebody left there, nor into a file that somebody reads.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            digest.update(part)
            size += part.nbytes
            while part.nbytes:
                part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}
