"""From an image file's bytes to RGB pixels, under one fixed rule for every format, and to those of a smaller file."""

from __future__ import annotations

import io
import warnings
from contextlib import nullcontext

import numpy as np
import simplejpeg
from PIL import Image

from onehour.data.augment import resized
from onehour.data.dataset import FaultError
from onehour.data.listing import SUFFIXES
from onehour.messages import stderr_muted

FORMATS = tuple(SUFFIXES)
JPEG_START = b"\xff\xd8"
PNG_START = b"\x89PNG\r\n\x1a\n"
USED = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
"""Chunks of a PNG that a reader may leave out, and that matter here: transparency, EXIF, further frames."""
EXIF_AS_TEXT = b"Raw profile type exif\0"
PIXELS = 64_000_000
"""The most pixels of an image, unless told otherwise: a file of kilobytes may ask for gigabytes."""
LARGEST_PIXELS = 2 * 89_478_485
"""Pillow refuses more, whatever the cap."""
STRIP = 2**20
"""Pixels that are converted together: beside Pillow's image and the result, memory is needed for no third one."""
WIDE = {"WEBP": 2, "JPEG2000": 4}
"""Formats whose decoder needs several times the memory of others for a pixel; their cap is that much lower."""
ORIENTATION = 0x0112
QUALITY = 95
"""Of the JPEGs that are written here."""
LONGEST = 65_500
"""Pixels of a side that libjpeg writes."""


def decode(data: bytes, name: str, *, exif: bool = False, pixels: int = PIXELS) -> np.ndarray:
    """The pixels of an image file's bytes, as RGB.

    The rule: a YCbCr or grey JPEG is decoded by libjpeg-turbo (accurate DCT, smooth upsampling, the pixels that Pillow
    gives); anything else by Pillow: the first frame, palettes looked up, CMYK converted without a profile, of 16 bits
    the upper 8, transparency dropped (the colours below it stay). EXIF orientation is ignored, as in the paper's time;
    a TIFF's own is part of its format, and followed.

    Args:
        data: the file's bytes; their content decides the format, never the name.
        name: the file's path, for messages.
        exif: turn the image as its EXIF orientation says.
        pixels: the most pixels, by the header, before anything is decoded; for WebP half of it and for JPEG 2000 a
            quarter, since their decoders need that much more memory.

    Returns:
        uint8 array of shape (H, W, 3), writable and contiguous.

    Raises:
        FaultError: a ValueError, naming the file, if the bytes are no image, are cut short or damaged, are too large,
            or have no rule to RGB.

    >>> decode(b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255]), "two.ppm").tolist()
    [[[255, 0, 0], [0, 0, 255]]]
    """
    if data.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray"):
                _refuse_bomb(int(height), int(width), pixels, name)
                image = simplejpeg.decode_jpeg(data, "RGB")
                return oriented(image, orientation_of(data)) if exif else image
        except FaultError:
            raise
        except ValueError:
            pass  # It also refuses what can be read in full, as with bytes between segments; Pillow tells them apart.
    if not data:
        raise FaultError(name, "is an empty file", "replace or remove it")
    try:
        # Pillow warns of metadata that it cannot read, which has no part in the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(plain(data)), formats=FORMATS) as image:
            _refuse_bomb(image.height, image.width, pixels // WIDE.get(image.format or "", 1), name)
            orientation = _orientation(image) if exif else 1
            with stderr_muted() if image.format == "TIFF" else nullcontext():  # what libtiff says comes as an error too
                pixels_of = _rgb(image)
            return oriented(pixels_of, orientation)
    except FaultError:
        raise
    except Image.UnidentifiedImageError as error:
        raise FaultError(name, "is not a readable image", f"expected {', '.join(FORMATS)}: remove it") from error
    # Damaged files raise nearly anything in Pillow's readers, and the bomb error is no OSError.
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise FaultError(name, f"cannot be decoded: {text}", "replace or remove it") from error


def of_size(image: np.ndarray, side: int, name: str) -> np.ndarray:
    """An image (H, W, 3) itself, if it has `side` × `side` pixels; else a FaultError."""
    if image.shape[:2] != (side, side):
        height, width = image.shape[:2]
        raise FaultError(name, f"has {width}×{height} pixels; this run's images have {side}×{side}", "resize it first")
    return image


def plain(data: bytes) -> bytes:
    """An image file without those chunks of a PNG that have no part in the pixels.

    Pillow refuses an image for more than a megabyte of text or of a colour profile, and for some that are damaged.
    Older programs wrote EXIF as text, which stays.
    """
    if not data.startswith(PNG_START):
        return data
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if not kind[:1].islower() or kind in USED or data.startswith(EXIF_AS_TEXT, place + 8):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, 3) turned and mirrored as EXIF's orientation 1 … 8 says; other values leave it."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def orientation_of(data: bytes) -> int:
    """What `decode` makes of an image file's EXIF orientation, 1 … 8; 1 is upright, also where there is none."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(plain(data)), formats=FORMATS) as image:
            return _orientation(image)
    except Exception:  # as of `decode`
        return 1


def shrunk(data: bytes, name: str, shorter: int, *, pixels: int = PIXELS) -> bytes | None:
    """An image file whose shorter side is `shorter`, as JPEG of quality 95; None for one that is not larger.

    The aspect is kept, the resize is bilinear and antialiased as the crops' is. An EXIF orientation is kept, other
    metadata is not.
    """
    image = decode(data, name, pixels=pixels)
    height, width = image.shape[:2]
    side = min(height, width)
    if side <= shorter:
        return None
    height, width = round(height * shorter / side), round(width * shorter / side)
    if max(height, width) > LONGEST:
        problem = f"would have {width}×{height} pixels, too many for a JPEG"
        raise FaultError(name, problem, "pack as it is, or remove it")
    smaller = resized(image, height, width)
    encoded = simplejpeg.encode_jpeg(smaller, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
    orientation = orientation_of(data)
    if orientation == 1:
        return encoded
    # The smallest EXIF block: TIFF's header, one entry (tag, type SHORT, one value), no further directory.
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation, 0, 0])
    block = b"Exif\0\0MM\0*\0\0\0\x08\x00\x01" + entry + bytes(4)
    return encoded[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + encoded[2:]


def _refuse_bomb(height: int, width: int, pixels: int, name: str) -> None:
    if height * width > pixels:
        raise FaultError(
            name,
            f"has {width}×{height} pixels, more than the cap of {pixels:,}",
            "remove it, make it smaller, or raise the pixel cap",
        )


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    image.load()
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _grey16(strip) if image.mode.startswith("I") else _converted(strip)
    return pixels


def _grey16(strip: Image.Image) -> np.ndarray:
    """(h, W, 1) of 16-bit grey: Pillow's own conversion clips it at 255; mode I holds 16 bits as well, in 32."""
    values = np.asarray(strip)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"its values reach from {values.min()} to {values.max()}; expected 8 or 16 bits")
    return (values >> 8).astype(np.uint8)[:, :, None]


def _converted(strip: Image.Image) -> np.ndarray:
    if strip.mode in ("P", "PA"):
        strip = strip.convert("RGBA")
    return np.asarray(strip.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none, none that can be read, or one that Pillow follows by itself."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # what a damaged block of it raises
        return 1
    return int(orientation) if orientation in range(1, 9) else 1  # it may be a fraction, of another type
