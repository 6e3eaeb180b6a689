"""Images made smaller before they are packed: faster to decode, and no longer the pixels that the paper trained on."""

from __future__ import annotations

import simplejpeg

from onehour.data.augment import resized
from onehour.data.decode import PIXELS, decode, orientation_of
from onehour.data.faults import FaultError

__all__ = ["QUALITY", "shrunk"]

QUALITY = 95
LONGEST = 65_500
"""Pixels of a side that libjpeg writes."""


def shrunk(data: bytes, name: str, shorter: int, *, pixels: int = PIXELS) -> bytes | None:
    """An image file whose shorter side is `shorter`, as JPEG of quality 95; None for one that is not larger.

    The aspect is kept, the resize is bilinear and antialiased as the crops' is. An EXIF orientation is kept, other
    metadata is not.

    Args:
        data, name, pixels: as of `decode`.
        shorter: pixels.

    Raises:
        FaultError: if the image cannot be decoded, or is too long for a JPEG even so.

    >>> import numpy as np
    >>> photo = simplejpeg.encode_jpeg(np.zeros((375, 500, 3), np.uint8))
    >>> decode(shrunk(photo, "a.jpg", 300) or b"", "a.jpg").shape
    (300, 400, 3)
    """
    image = decode(data, name, pixels=pixels)
    height, width = image.shape[:2]
    side = min(height, width)
    if side <= shorter:
        return None
    height, width = round(height * shorter / side), round(width * shorter / side)
    if max(height, width) > LONGEST:
        raise FaultError(
            name, f"would have {width}×{height} pixels, too many for a JPEG", "pack as it is, or remove it"
        )
    smaller = resized(image, height, width)
    encoded = simplejpeg.encode_jpeg(smaller, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
    orientation = orientation_of(data)
    if orientation == 1:
        return encoded
    # The smallest EXIF block: TIFF's header, one entry (tag, type SHORT, one value), no further directory.
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation, 0, 0])
    block = b"Exif\0\0MM\0*\0\0\0\x08\x00\x01" + entry + bytes(4)
    return encoded[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + encoded[2:]
