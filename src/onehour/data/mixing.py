"""Random erasing, mixup and cutmix: training batches that are changed on their device, before the model sees them.

What is drawn for a worker follows from the seed, the iteration and the worker, what is drawn for a sample from the
seed, the epoch and its index: nothing depends on processes, passes, loaders or restarts. A worker's images are mixed
with each other alone, so BatchNorm sees n of them as ever, and the loss of a minibatch stays a sum over its workers'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.data.augment import draw_erasure, uniform
from onehour.data.loader import Batch, moved
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream


class Mix(NamedTuple):
    """How the images of a worker are mixed: each is w·x + (1 − w)·x' with the one before it, x', pixel by pixel."""

    weight: float  # w outside of the rectangle; inside it is 0
    top: int  # the rectangle's rows and columns; all zero for none
    bottom: int
    left: int
    right: int
    share: float  # of x's own label in the loss


def symmetric_beta(alpha: float, u: float, v: float) -> float:
    """λ ~ Beta(α, α) from two uniform numbers, for any α > 0.

    λ = ½ + ½·T/√(2α + T²), where T = √(2α(U^(−1/α) − 1))·cos(2πV) has Student's distribution of 2α degrees of freedom
    (Devroye 1996). numpy's own draws may change with its version.
    """
    r, cosine = u ** (1 / alpha), math.cos(2 * math.pi * v)
    square = (1 - r) * cosine**2  # T²/(2α) · r, which overflows for no α
    return (1 + math.copysign(math.sqrt(square / (square + r)), cosine)) / 2


def draw_mix(key: int, *, mixup: float, cutmix: float, height: int = 1, width: int = 1) -> Mix:
    """Mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019), as timm draws them for a batch; one of two with p = ½.

    Mixup: λ ~ Beta(α, α), w = λ everywhere. Cutmix: a rectangle of ⌊H·√(1 − λ)⌋ × ⌊W·√(1 − λ)⌋ around any pixel, cut
    off at the edges; the label's share is that of the pixels that stay.

    Args:
        mixup, cutmix: α of each; 0 for none.

    >>> draw_mix(7, mixup=0.0, cutmix=1.0, height=8, width=8)
    Mix(weight=1.0, top=0, bottom=6, left=0, right=3, share=0.71875)
    """
    choice, u, v, vertical, horizontal = uniform(key, 5).tolist()
    if not cutmix or (mixup and choice < 0.5):
        kept = symmetric_beta(mixup, u, v)
        return Mix(kept, 0, 0, 0, 0, kept)
    side = math.sqrt(1 - symmetric_beta(cutmix, u, v))
    top, bottom = _cut(int(vertical * height), int(height * side), height)
    left, right = _cut(int(horizontal * width), int(width * side), width)
    return Mix(1.0, top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width))


def _cut(centre: int, length: int, size: int) -> tuple[int, int]:
    """First pixel and end of what lies around a pixel, within a side."""
    return max(centre - length // 2, 0), min(centre + length // 2, size)


class Mixing:
    """Changes the batches of a run's passes as its recipe says: first erases, then mixes."""

    def __init__(self, recipe: Recipe, stream: SampleStream) -> None:
        self.recipe, self.stream = recipe, stream

    def __call__(self, batch: Batch, iteration: int, workers: range) -> Batch:
        """The batch of a pass, changed.

        Args:
            batch: images (g·n, …), floats, and labels (g·n,); row i·g + j is sample i of the j-th worker.

        Returns:
            Images and labels; of mixed images also the other label y₂ (g·n,) and the share (g·n,), float64, of y₁ in
            the loss. y₁ is the one with the larger share.
        """
        recipe = self.recipe
        if not (recipe.random_erasing or recipe.mixup or recipe.cutmix):
            return batch
        images, labels = batch
        if recipe.random_erasing:
            images = self._erased(images, iteration, workers)
        if recipe.mixup or recipe.cutmix:
            return self._mixed(images, labels, iteration, workers)
        return images, labels

    def _erased(self, images: Tensor, iteration: int, workers: range) -> Tensor:
        epochs, indices = (array.tolist() for array in self.stream.epochs_and_indices(iteration, workers))
        keys = [seed_for(self.recipe.seed, "erase", *sample) for sample in zip(epochs, indices, strict=True)]
        height, width = images.shape[2:]
        drawn = [draw_erasure(height, width, key, self.recipe.random_erasing) for key in keys]
        if not any(map(any, drawn)):
            return images
        return images.masked_fill(_inside(moved(torch.tensor(drawn), images.device), images), 0)

    def _mixed(self, images: Tensor, labels: Tensor, iteration: int, workers: range) -> Batch:
        mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
        height, width = images.shape[2:] if cutmix else (1, 1)
        keys = [seed_for(self.recipe.seed, "mix", iteration, worker) for worker in workers]
        drawn = [draw_mix(key, mixup=mixup, cutmix=cutmix, height=height, width=width) for key in keys]
        mixes = moved(torch.tensor(drawn, dtype=torch.float64), images.device).repeat(self.recipe.per_worker, 1)
        weights = mixes[:, 0].to(images.dtype).view(-1, *[1] * (images.ndim - 1))
        if cutmix:
            weights = weights.masked_fill(_inside(mixes[:, 1:5], images), 0)
        # Rows of a worker lie g apart, so the row before it is its own too.
        before, others, shares = images.roll(len(workers), 0), labels.roll(len(workers), 0), mixes[:, 5]
        mixed, own = before.mul_(1 - weights).add_(images * weights), shares >= 0.5
        return mixed, torch.where(own, labels, others), torch.where(own, others, labels), shares.where(own, 1 - shares)


def _inside(rectangles: Tensor, images: Tensor) -> Tensor:
    """bool (N, 1, H, W): which pixels of (N, C, H, W) lie in their image's rectangle, (N, 4)."""
    top, bottom, left, right = rectangles[:, :, None, None].unbind(1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    vertical = (rows[:, None] >= top) & (rows[:, None] < bottom)
    return (vertical & (columns >= left) & (columns < right))[:, None]
