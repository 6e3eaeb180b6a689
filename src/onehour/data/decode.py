"""From an image file's bytes to RGB pixels, under one fixed rule for every format."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

__all__ = ["decode"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may try; named, because its others include some that start programs (EPS)."""
JPEG_START = b"\xff\xd8"


def decode(data: bytes, name: str) -> np.ndarray:
    """The pixels of an image file's bytes, as RGB.

    The rule: a YCbCr or grey JPEG is decoded by libjpeg-turbo (accurate DCT, smooth upsampling, the pixels that Pillow
    gives); anything else by Pillow: the first frame, palettes looked up, CMYK converted without a profile, of 16 bits
    the upper 8, transparency dropped (the colours below it stay). EXIF orientation is ignored, as in the paper's time.

    Args:
        data: the file's bytes; their content decides the format, never the name.
        name: the file's path, for messages.

    Returns:
        uint8 array of shape (H, W, 3), writable and contiguous.

    Raises:
        ValueError: naming the file, if the bytes are no image, are cut short or damaged, or have no rule to RGB.

    >>> decode(b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255]), "two.ppm").tolist()
    [[[255, 0, 0], [0, 0, 255]]]
    """
    if data.startswith(JPEG_START):
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # It also refuses what can be read in full, as with bytes between segments; Pillow tells them apart.
    if not data:
        raise ValueError(f"{name} is an empty file; replace or remove it")
    try:
        # Pillow warns of metadata that it cannot read, which has no part in the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _rgb(image)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image that can be read; expected {', '.join(FORMATS)}: remove it") from error
    # Damaged files raise nearly anything in Pillow's readers, and the bomb error is no OSError.
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ValueError(f"{name} cannot be decoded: {text}; replace or remove it") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """Pillow's image as RGB by the rule of `decode`."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255; mode I holds 16 bits as well, in 32.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"its values reach from {values.min()} to {values.max()}; expected 8 or 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
