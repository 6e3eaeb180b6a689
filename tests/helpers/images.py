"""Image files of every format and kind, trees of them, and ways to break them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = ("cat", "dog", "é x")


def smooth(width: int, height: int, seed: int, bands: int = 3) -> np.ndarray:
    """uint8 (height, width, bands) with structure at every scale, so that a resize has something to lose."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, bands))
    for scale in (1, 4, 16):
        small = random.normal(size=(-(-height // scale), -(-width // scale), bands))
        image += scale * np.kron(small, np.ones((scale, scale, 1)))[:height, :width]
    return (128 + 6 * image).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (61, 47), mode: str = "RGB") -> Image.Image:
    """A picture in one of Pillow's modes."""
    if mode == "I;16":
        return Image.fromarray(smooth(*size, seed)[:, :, 0].astype(np.uint16) * 257)
    if mode == "LA":
        return Image.fromarray(smooth(*size, seed, 2), "LA")
    if mode == "RGBA":
        return Image.fromarray(smooth(*size, seed, 4))
    return Image.fromarray(smooth(*size, seed)).convert(mode)


def png16(seed: int = 0, size: tuple[int, int] = (61, 47)) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    width, height = size
    values = smooth(width, height, seed).astype(">u2") * 257
    return _png(width, height, 16, b"".join(b"\0" + row.tobytes() for row in values))


def bomb(width: int = 13_300, height: int = 13_300) -> bytes:
    """A small PNG whose header asks for very many pixels."""
    return _png(width, height, 8, bytes(10_000))


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zoo(size: tuple[int, int] = (61, 47)) -> dict[str, bytes]:
    """A file of every format and kind that the rule to RGB knows, by a name that says which."""
    frames = [picture(seed, size) for seed in (7, 8)]
    exif = Image.Exif()
    exif[0x0112] = 6

    def jpeg(seed: int, mode: str = "RGB", **options: Any) -> bytes:
        return saved(picture(seed, size, mode), "JPEG", **options)

    return {
        "baseline.jpg": jpeg(1),
        "444.jpg": jpeg(2, quality=95, subsampling=0),
        "422.jpg": jpeg(3, subsampling=1),
        "progressive.jpg": jpeg(4, progressive=True),
        "optimized.jpg": jpeg(5, optimize=True, quality=30),
        "restarts.jpg": jpeg(6, restart_marker_blocks=2),
        "exif.jpg": jpeg(7, exif=exif),
        "grey.jpg": jpeg(8, "L"),
        "cmyk.jpg": jpeg(9, "CMYK"),
        "rgb.jpg": jpeg(10, keep_rgb=True),
        "rgb.png": saved(picture(11, size), "PNG"),
        "rgba.png": saved(picture(12, size, "RGBA"), "PNG"),
        "grey.png": saved(picture(13, size, "L"), "PNG"),
        "grey-alpha.png": saved(picture(14, size, "LA"), "PNG"),
        "palette.png": saved(picture(15, size, "P"), "PNG", transparency=3),
        "bilevel.png": saved(picture(16, size, "1"), "PNG"),
        "grey16.png": saved(picture(17, size, "I;16"), "PNG"),
        "rgb16.png": png16(18, size),
        "animated.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "lossy.webp": saved(picture(19, size), "WEBP"),
        "lossless.webp": saved(picture(20, size, "RGBA"), "WEBP", lossless=True),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "palette.gif": saved(picture(21, size, "P"), "GIF"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rgb.bmp": saved(picture(22, size), "BMP"),
        "palette.bmp": saved(picture(23, size, "P"), "BMP"),
        "rgb.tif": saved(picture(24, size), "TIFF"),
        "lzw.tif": saved(picture(25, size), "TIFF", compression="tiff_lzw"),
        "deflate.tif": saved(picture(26, size), "TIFF", compression="tiff_adobe_deflate"),
        "cmyk.tif": saved(picture(27, size, "CMYK"), "TIFF"),
        "grey16.tif": saved(picture(28, size, "I;16"), "TIFF"),
        "rgb.ppm": saved(picture(29, size), "PPM"),
        "grey16.pgm": saved(picture(30, size, "I;16"), "PPM"),
        "rgb.jp2": saved(picture(31, size), "JPEG2000"),
    }


def tree(
    root: Path,
    *,
    train: int = 8,
    val: int = 2,
    classes: tuple[str, ...] = CLASSES,
    make: Callable[[int], bytes] | None = None,
) -> Path:
    """ROOT/train/CLASS/* and ROOT/val/CLASS/*, every file another picture.

    Args:
        train, val: files of each class.
        make: the bytes of file number i; None is a small JPEG.
    """
    make = make or (lambda number: saved(picture(number, (24 + number % 9, 20)), "JPEG"))
    number = 0
    for side, count in (("train", train), ("val", val)):
        for name in classes:
            (root / side / name).mkdir(parents=True)
            for file in range(count):
                (root / side / name / f"{file:04d}.JPEG").write_bytes(make(number))
                number += 1
    return root


def flipped(data: bytes, at: float = 0.7) -> bytes:
    """With one bit another, somewhere in the compressed pixels: most decoders notice nothing."""
    place = int(at * len(data))
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def noisy(image: np.ndarray) -> np.ndarray:
    """A transform: 8 by 8 pixels from anywhere, with numbers of Python, numpy and torch in them."""
    top, left = random.randrange(image.shape[0] - 7), np.random.randint(image.shape[1] - 7)
    image[top : top + 8, left : left + 8] //= 2
    return image[top : top + 8, left : left + 8] + torch.randint(99, (8, 8, 3), dtype=torch.uint8).numpy()


OWN = np.random.default_rng(0)


def net() -> nn.Module:
    """Sees as many pixels as there are, and costs next to nothing."""
    small = nn.Conv2d(3, 4, 3)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(7), small, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, len(CLASSES))
    )
