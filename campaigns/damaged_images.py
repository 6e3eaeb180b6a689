"""Damaged image files by number, and what reading one does."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from onehour.data.augment import training_crop, validation_crop
from onehour.data.dataset import FaultError
from onehour.data.decode import PIXELS, decode, shrunk
from onehour.data.doctor import inspect_image
from tests.helpers.images import zoo

ZOO = zoo()
NAMES = sorted(ZOO)
ODD = (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF)


def damaged(number: int) -> tuple[str, bytes]:
    """The name and the bytes of image `number`: a file of the zoo with one to six damages."""
    draw = random.Random(number)
    name = NAMES[number % len(NAMES)]
    data = bytearray(ZOO[name])
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        draw.choice(DAMAGES)(data, draw)
    return name, bytes(data)


def attempt(number: int) -> tuple[str, float]:
    """Read image `number` as training, validation, the doctor and packing do, and the CPU seconds that it took.

    Returns:
        "decoded", "refused", or what went wrong.
    """
    name, data = damaged(number)
    started = time.process_time()
    said = _read(data, name, number)
    return said, time.process_time() - started


def _read(data: bytes, name: str, number: int) -> str:
    try:
        pixels = decode(data, name, exif=number % 3 == 0)
        for image in (training_crop(pixels, number), validation_crop(pixels)):
            if image.shape != (3, 224, 224):
                return f"a crop of shape {tuple(image.shape)}"
        shrunk(data, name, 16)
        return _examined(data, name) or "decoded"
    except FaultError as fault:
        return _wrong(str(fault), name) or _examined(data, name) or "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _examined(data: bytes, name: str) -> str:
    """What went wrong with the doctor; nothing for nothing."""
    try:
        return "".join(_wrong(str(fault), name) for fault in inspect_image(data, name, pixels=PIXELS))
    except BaseException as error:
        return f"the doctor: {type(error).__name__}: {error}"


def _wrong(message: str, name: str) -> str:
    return "" if message.isprintable() and message.startswith(name) else f"a message of several lines: {message!r}"


def _place(data: bytearray, draw: random.Random) -> int:
    """Anywhere, but half of the time in the first bytes, where headers are."""
    return draw.randrange(min(len(data), 64) if draw.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] = draw.choice((*ODD, draw.randrange(256)))


def _number(data: bytearray, draw: random.Random) -> None:
    """Two or four bytes as a size or an offset may have them."""
    at, size = _place(data, draw), draw.choice((2, 4))
    value = draw.choice((0, 1, 5000, 65_535, 13_300, 2**31 - 1, 2**32 - 1)) % 256**size
    data[at : at + size] = value.to_bytes(size, draw.choice(("big", "little")))


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


def _remove(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    del data[at : at + draw.randint(1, 64)]


def _insert(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at:at] = draw.randbytes(draw.randint(1, 64))


def _repeat(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at:at] = data[at : at + draw.randint(1, 256)] * draw.randint(1, 20)


def _zeros(data: bytearray, draw: random.Random) -> None:
    at, size = _place(data, draw), draw.randint(1, 256)
    data[at : at + size] = bytes(len(data[at : at + size]))


def _splice(data: bytearray, draw: random.Random) -> None:
    other = ZOO[draw.choice(NAMES)]
    data[_place(data, draw) :] = other[draw.randrange(len(other)) :]


DAMAGES: tuple[Callable[[bytearray, random.Random], Any], ...] = (
    *(_flip, _byte, _byte, _number, _number, _cut, _remove, _insert, _repeat, _zeros, _splice),
)
