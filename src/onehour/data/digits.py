"""The embedded task: composites of real handwritten digits, hard enough to show what a minibatch costs.

The 1,797 digits of UCI (8×8) are too easy: seed noise hides everything. So each sample here is one of them rotated,
scaled, shifted and made noisy, once, under a fixed key. The originals are divided 80/20 before, so that no original
serves both sides; the 4,096 validation samples thus come from 360 originals, and its error is that of those 360.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from onehour.data.augment import uniform
from onehour.data.dataset import KeyedDataset
from onehour.rules.keys import random_bits, seed_for

TRAIN, VALIDATION, SIDE = 8192, 4096, 8
SAMPLES = {"digits": TRAIN, "digits-wide": 4 * TRAIN}
"""For training, by the data's name: with four times as many an epoch has iterations enough for larger minibatches."""
Labelled = tuple[Tensor, Tensor]
ROTATION, SCALE, SHIFT, NOISE = 20.0, 0.2, 0.5, 0.1
"""± degrees, ± share, ± pixels, standard deviation in units of the brightest value."""


def originals() -> tuple[Tensor, Tensor]:
    """The 1,797 images, float32 in [0, 1] of shape (1797, 1, 8, 8), and labels."""
    with resources.as_file(resources.files("onehour.data") / "digits.npz") as path, np.load(path) as file:
        return torch.from_numpy(file["images"])[:, None] / 16.0, torch.from_numpy(file["labels"]).long()


def digits(split: int = 0, *, samples: int = TRAIN) -> tuple[TensorDataset, TensorDataset]:
    """8,192 training (or `samples`) and 4,096 validation samples, the same on every machine: standardised (N, 1, 8, 8).

    Args:
        split: which division of the originals, and which composites; any whole number. Errors differ between splits
            by more than between seeds, since 360 originals are few: compare within one.
    """
    train, validation, mean, std = _drawn(split, samples)
    return (
        TensorDataset((train[0] - mean) / std, train[1]),
        TensorDataset((validation[0] - mean) / std, validation[1]),
    )


class DigitFiles(KeyedDataset):
    """No samples of its own: reads files of 8×8 pixels, bright on dark, as `digits` of that split are."""

    def __init__(self, split: int = 0, *, samples: int = TRAIN) -> None:
        _, _, self.mean, self.std = _drawn(split, samples)

    def from_file(self, data: bytes, name: str) -> Tensor:
        """The mean of an image's colours, standardised: float32 (1, 8, 8); FaultError for another size."""
        from onehour.data.decode import decode, of_size  # here: training digits decodes no images

        grey = torch.from_numpy(of_size(decode(data, name), SIDE, name)).float().mean(2) / 255
        return ((grey - self.mean) / self.std)[None]


def _drawn(split: int, samples: int) -> tuple[Labelled, Labelled, Tensor, Tensor]:
    """Both sides, images and labels, and the mean and the deviation by which they are standardised."""
    images, labels = originals()
    order = torch.from_numpy(np.argsort(random_bits(seed_for(split, "digits split"), len(images)), kind="stable"))
    cut = len(images) * 4 // 5
    train = _composites(images[order[:cut]], labels[order[:cut]], samples, seed_for(split, "digits train"))
    validation = _composites(images[order[cut:]], labels[order[cut:]], VALIDATION, seed_for(split, "digits val"))
    return train, validation, train[0].mean(), train[0].std()


def _composites(images: Tensor, labels: Tensor, count: int, key: int) -> tuple[Tensor, Tensor]:
    """`count` distorted images: original i % len, each under its own numbers."""
    source = torch.arange(count) % len(images)
    drawn = torch.from_numpy(uniform(key, 4 * count)).view(count, 4) * 2 - 1
    angle = drawn[:, 0] * np.deg2rad(ROTATION)
    scale = 1 + drawn[:, 1] * SCALE
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    half = images.shape[-1] / 2
    shift_x, shift_y = drawn[:, 2] * SHIFT / half, drawn[:, 3] * SHIFT / half
    affine = torch.stack((cos, -sin, shift_x, sin, cos, shift_y), 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [count, 1, *images.shape[2:]], align_corners=False)
    warped = F.grid_sample(images[source].double(), grid, align_corners=False)
    # Box and Muller's normal numbers, from uniform ones whose bits never change with a library's version.
    u, v = torch.from_numpy(uniform(seed_for(key, "noise"), 2 * warped.numel())).view(2, *warped.shape)
    noise = torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * torch.pi * v)
    return (warped + NOISE * noise).float(), labels[source]
