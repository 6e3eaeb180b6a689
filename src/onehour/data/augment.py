"""What the paper does to an image before the network sees it (§5.1): crops to 224, the flip, the normalisation."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onehour.rules.keys import random_bits

__all__ = ["SIZE", "Crop", "draw_crop", "normalise", "resized", "training_crop", "uniform", "validation_crop"]

SIZE, SHORTER = 224, 256
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
LONGEST = 16


class Crop(NamedTuple):
    """A rectangle of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def uniform(key: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, a pure function of the key: the upper 53 of each 64 random bits."""
    return (random_bits(key, count) >> np.uint64(11)) * 2.0**-53


def draw_crop(height: int, width: int, key: int) -> Crop:
    """The paper's training crop (§5.1): 8–100 % of the area, aspect 3/4–4/3, anywhere, flipped half of the time.

    With A ~ U(0.08, 1) and log r ~ U(log 3/4, log 4/3): w = round(√(A·H·W·r)), h = round(√(A·H·W/r)). The first of 10
    tries that fits is taken; if none does, the largest centred rectangle whose aspect is within the range. (As in
    torchvision. fb.resnet.torch draws r uniformly and swaps w and h half of the time.)

    Args:
        height, width: H and W of the image, at least 1.
        key: any seed of `seed_for`; nothing else is random.

    >>> draw_crop(375, 500, key=7) == draw_crop(375, 500, key=7)
    True
    >>> draw_crop(1, 500, key=7)._replace(flip=False)
    Crop(top=0, left=249, height=1, width=1, flip=False)
    """
    flip, *draws = uniform(key, 1 + 4 * TRIES).tolist()
    lowest, highest = math.log(ASPECT[0]), math.log(ASPECT[1])
    for i in range(0, 4 * TRIES, 4):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draws[i])
        aspect = math.exp(lowest + (highest - lowest) * draws[i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1))
            return Crop(top, left, h, w, flip < 0.5)
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip < 0.5)


def training_crop(image: np.ndarray, key: int) -> Tensor:
    """The crop that `draw_crop` draws, resized to 224×224.

    Args:
        image: uint8 (H, W, 3).
        key: as of `draw_crop`.

    Returns:
        uint8 (3, 224, 224); in memory the channels lie together.
    """
    top, left, height, width, flip = draw_crop(image.shape[0], image.shape[1], key)
    resized = _resize(_view(image)[:, :, top : top + height, left : left + width], SIZE, SIZE)[0]
    return resized.flip(-1) if flip else resized


def validation_crop(image: np.ndarray) -> Tensor:
    """The test crop (§5.1): the shorter side resized to 256, the aspect kept, and of that the centre 224×224.

    Of an image longer than 16:1 only the centre 16:1 is resized: 1×10,000 would otherwise become 2 GB.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (3, 224, 224); in memory the channels lie together.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    h, w = min(height, LONGEST * shorter), min(width, LONGEST * shorter)
    top, left = (height - h) // 2, (width - w) // 2
    resized = _resize(
        _view(image)[:, :, top : top + h, left : left + w], SHORTER * h // shorter, SHORTER * w // shorter
    )
    top, left = round((resized.shape[2] - SIZE) / 2), round((resized.shape[3] - SIZE) / 2)
    centre = resized[:, :, top : top + SIZE, left : left + SIZE]
    return centre.contiguous(memory_format=torch.channels_last)[0]


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image at another size, by the resize of the crops.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (height, width, 3), contiguous.
    """
    return np.ascontiguousarray(_resize(_view(image), height, width)[0].permute(1, 2, 0).numpy())


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x/255 − mean)/std for each channel, on the device that holds the images.

    Args:
        images: uint8 (N, C, H, W).
        mean, std: C numbers each, of values in [0, 1].

    Returns:
        float32 (N, C, H, W), in memory laid out as the images are.

    >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), (0.5,), (0.25,)).item()
    2.0
    """
    shift, scale = _constants(mean, std, images.device)
    return images.float().sub_(shift).div_(scale)


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept, because copying them to a GPU anew would make the host wait there at every batch.
    shift, scale = (torch.tensor(values, dtype=torch.float64).mul(255).float() for values in (mean, std))
    return shift.to(device).view(1, -1, 1, 1), scale.to(device).view(1, -1, 1, 1)


def _view(image: np.ndarray) -> Tensor:
    """(1, 3, H, W) over the same memory."""
    # In this order of steps the strides are those that torch knows as channels_last, for which its resize is fast.
    return torch.from_numpy(image)[None].permute(0, 3, 1, 2)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow's antialiased bilinear resize to 1 of 255, several times faster where the channels lie together."""
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def drawn_key() -> int:
    """A key from torch's own generator, for images asked for without one: in a loop that is not ours."""
    return int(torch.empty((), dtype=torch.int64).random_())
