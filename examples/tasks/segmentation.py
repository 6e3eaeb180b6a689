"""Segmentation with ignored pixels: the loss is divided once by the pixels that count, over all workers.

    onehour train segmentation.toml --trust

Workers have unequal numbers of such pixels, so a mean of their means would weigh pixels differently.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import onehour

IGNORED = 255


def data() -> tuple[TensorDataset, TensorDataset]:
    """Noisy images of a bright disc, whose pixels are to be found; a random part of each mask is not labelled."""
    return images(400, seed=0), images(100, seed=1)


def images(count: int, *, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centre = 4 + 8 * torch.rand(count, 2, 1, 1, generator=draw)
    masks = ((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < 16).long()
    noisy = masks[:, None] + torch.randn(count, 1, 16, 16, generator=draw)
    unlabelled = torch.rand(count, 16, 16, generator=draw) < torch.rand(count, 1, 1, generator=draw)
    return TensorDataset(noisy, masks.masked_fill(unlabelled, IGNORED))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


def task(model: nn.Module, batch: tuple[Tensor, Tensor]) -> onehour.Sums:
    inputs, masks = batch
    logits, labelled = model(inputs), masks != IGNORED
    wrong = ((logits.argmax(1) != masks) & labelled).sum()
    return onehour.Sums(
        loss=F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum"),
        count=labelled.sum(),
        metrics={"pixel error %": (100 * wrong, labelled.sum())},
    )
