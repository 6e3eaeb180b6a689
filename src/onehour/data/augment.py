"""What is done to an image before the network sees it: the paper's crops, flip and normalisation (§5.1), and more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from onehour.data.dataset import seed_generators
from onehour.entry import is_entry, resolve
from onehour.messages import blame
from onehour.rules.keys import random_bits

SIZE, SHORTER = 224, 256
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (1 / 3.3, 1 / 0.3)
TRIES = 10
LONGEST = 16
TRIALS = 8
"""Images of a process that a transform is tried on, whether it draws from a generator that nobody has seeded."""


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
    """
    flip, *draws = uniform(key, 1 + 4 * TRIES).tolist()
    for rectangle in _rectangles(height, width, draws, AREA, ASPECT):
        return Crop(*rectangle, flip < 0.5)
    h, w = min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flip < 0.5)


def draw_erasure(height: int, width: int, key: int, probability: float) -> tuple[int, int, int, int]:
    """The rectangle that random erasing sets to zero (Zhong et al. 2017, as in torchvision): 2–33 % of the area.

    Its aspect h/w is log-uniform in 0.3–3.3; the first of 10 tries with h < H and w < W is taken.

    Returns:
        (top, bottom, left, right), of rows and columns; all zero for none.
    """
    if key * 2.0**-63 < probability:
        draws = uniform(key, 4 * TRIES).tolist()
        for top, left, h, w in _rectangles(height, width, draws, ERASED_AREA, ERASED_ASPECT):
            if h < height and w < width:
                return top, top + h, left, left + w
    return 0, 0, 0, 0


def _rectangles(
    height: int, width: int, draws: list[float], area: tuple[float, float], aspect: tuple[float, float]
) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, h, w) of each try that fits, four draws a try: with A and r = w/h as in `draw_crop`."""
    lowest, highest = math.log(aspect[0]), math.log(aspect[1])
    for i in range(0, len(draws), 4):
        pixels = height * width * (area[0] + (area[1] - area[0]) * draws[i])
        ratio = math.exp(lowest + (highest - lowest) * draws[i + 1])
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            yield int(draws[i + 2] * (height - h + 1)), int(draws[i + 3] * (width - w + 1)), h, w


def training_crop(image: np.ndarray, key: int, size: int = SIZE) -> Tensor:
    """The crop that `draw_crop` draws of an image, uint8 (H, W, 3), resized: uint8 (3, size, size).

    In memory its channels lie together, as those of the test crop do.
    """
    top, left, height, width, flip = draw_crop(image.shape[0], image.shape[1], key)
    resized = _resize(_view(image)[:, :, top : top + height, left : left + width], size, size)[0]
    return resized.flip(-1) if flip else resized


def validation_crop(image: np.ndarray, size: int = SIZE, resize: int = SHORTER) -> Tensor:
    """The test crop (§5.1): the shorter side resized to `resize`, the aspect kept, and of that the centre.

    Of an image longer than 16:1 only the centre 16:1 is resized: 1×10,000 would otherwise become 2 GB.

    Args:
        image: uint8 (H, W, 3); what is returned is uint8 (3, size, size).
        resize: pixels of the shorter side, at least `size`.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    h, w = min(height, LONGEST * shorter), min(width, LONGEST * shorter)
    top, left = (height - h) // 2, (width - w) // 2
    resized = _resize(_view(image)[:, :, top : top + h, left : left + w], resize * h // shorter, resize * w // shorter)
    top, left = round((resized.shape[2] - size) / 2), round((resized.shape[3] - size) / 2)
    centre = resized[:, :, top : top + size, left : left + size]
    return centre.contiguous(memory_format=torch.channels_last)[0]


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image, uint8 (H, W, 3), at another size by the resize of the crops; contiguous."""
    return np.ascontiguousarray(_resize(_view(image), height, width)[0].permute(1, 2, 0).numpy())


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x/255 − mean)/std for each channel, on the device that holds the images.

    Args:
        images: uint8 (N, C, H, W).
        mean, std: C numbers each, of values in [0, 1].

    Returns:
        float32 (N, C, H, W), in memory laid out as the images are.
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


class TrainTransform:
    """Someone's function of a decoded training image, called with every global generator seeded by the sample's key.

    What draws from Python's, numpy's or torch's generator is then the same in any process and after any restart. What
    draws from elsewhere is refused: the first images of a process are transformed twice.

    Args:
        spec: package.module:name of a function of a uint8 array (H, W, 3); it returns an image of bytes: an array
            (H', W', 3), a PIL image or a tensor (3, H', W').
    """

    def __init__(self, spec: str) -> None:
        if not is_entry(spec):
            raise ValueError(f"train_transform is {spec!r}; expected package.module:function")
        self.spec, self._function, self._trials = spec, resolve("train_transform", spec), TRIALS

    def __call__(self, image: np.ndarray, key: int) -> Tensor:
        """The image that is trained on, uint8 (3, H', W')."""
        if not self._trials:
            return self._transformed(image, key)
        self._trials -= 1
        made = self._transformed(image.copy(), key)
        if not torch.equal(made, self._transformed(image, key)):
            raise ValueError(
                f"train_transform {self.spec} makes different images from one image under the same seeds, so it"
                " draws from a generator of its own; seed that in the function from Python's, numpy's or torch's"
            )
        return made

    def _transformed(self, image: np.ndarray, key: int) -> Tensor:
        seed_generators(key)
        try:
            made: Any = self._function(image)
        except Exception as error:
            raise ValueError(f"train_transform {self.spec} failed: {blame(error)}") from error
        found = made.detach().as_subclass(Tensor) if isinstance(made, Tensor) else None
        if hasattr(made, "__array_interface__"):  # numpy's or PIL's, whose memory may not be written to
            found = torch.from_numpy(np.array(made, order="C"))
            found = found.permute(2, 0, 1) if found.ndim == 3 else found
        if found is None or found.dtype != torch.uint8 or found.ndim != 3 or len(found) != 3:
            kind = type(made).__name__ if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(
                f"train_transform {self.spec} returned {kind}; expected uint8: an array (H, W, 3), a tensor (3, H, W)"
                " or a PIL image in RGB. It is normalised later, on the device"
            )
        return found


def drawn_key() -> int:
    """A key from torch's own generator, for images asked for without one: in a loop that is not ours."""
    return int(torch.empty((), dtype=torch.int64).random_())
