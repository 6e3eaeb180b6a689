"""What is odd about one image's bytes, beyond whether they can be decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress

import simplejpeg
from PIL import Image

from onehour.data.decode import FORMATS, JPEG_START, decode, plain
from onehour.data.faults import FaultError

__all__ = ["inspect_image"]

SUFFIXES_OF = {
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
}
SMALL, LONG = 8, 16
"""Pixels of the shorter side, and length in shorter sides, beyond which a crop shows next to nothing."""


def inspect_image(data: bytes, name: str, *, pixels: int) -> Iterator[FaultError]:
    """Everything that is wrong with an image file, and what a person should know of it as notes.

    Args:
        data, name, pixels: as of `decode`.

    >>> [fault.problem for fault in inspect_image(b"", "a.jpg", pixels=100)]
    ['is an empty file']
    """
    try:
        height, width = decode(data, name, pixels=pixels).shape[:2]
    except FaultError as fault:
        yield fault
        return
    if min(height, width) < SMALL or max(height, width) > LONG * min(height, width):
        yield FaultError(
            name, f"has {width}×{height} pixels", "look at it: a crop of it shows next to nothing", note=True
        )
    kind, frames = _kind_and_frames(data)
    suffixes = SUFFIXES_OF.get(kind)
    if suffixes and os.path.splitext(name)[1].lower() not in suffixes:
        yield FaultError(
            name, f"is {kind} by its content", f"nothing is lost; other tools expect {suffixes[0]}", note=True
        )
    if frames > 1 and kind != "MPO":
        yield FaultError(name, f"has {frames} frames", "nothing, if the first one is what you want", note=True)
    damage = _damage(data)
    if damage:
        yield FaultError(
            name, f"is damaged, and decoded as far as it goes: {damage}", "look at it, or replace it", note=True
        )


def _kind_and_frames(data: bytes) -> tuple[str, int]:
    """The format, and how many frames; "" and 1 where Pillow cannot say, since the first one was decoded."""
    kind = ""
    # What libjpeg-turbo reads Pillow may refuse, and its readers of damaged directories raise nearly anything.
    with (
        suppress(Exception),
        warnings.catch_warnings(action="ignore"),
        Image.open(io.BytesIO(plain(data)), formats=FORMATS) as image,
    ):
        kind = image.format or ""
        return kind, getattr(image, "n_frames", 1)
    return kind, 1


def _damage(data: bytes) -> str:
    """What libjpeg warns of and goes on."""
    if not data.startswith(JPEG_START):
        return ""
    try:
        if simplejpeg.decode_jpeg_header(data, strict=False)[2] in ("YCbCr", "Gray"):
            simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        return str(error)
    return ""
