"""Metric learning: every pair within a worker's n samples is one loss, as BatchNorm's n is one group.

    onehour train pairs.toml --trust

How many pairs there are depends on which classes meet, so it is known only when the batch is there. n (--per-worker)
is part of the loss; the minibatch is not, so the linear rule holds as ever.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import onehour
from onehour.data.digits import digits

MARGIN = 1.0


def data() -> tuple[TensorDataset, TensorDataset]:
    train, validation = digits()
    return TensorDataset(*train[:600]), TensorDataset(*validation[:200])


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def task(model: nn.Module, batch: tuple[Tensor, Tensor]) -> onehour.Sums:
    """Pairs of one class are drawn together, hard pairs of two classes apart; easy ones do not count."""
    images, labels = batch
    points = model(images)
    distance = F.pdist(points)
    one, other = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    alike = labels[one] == labels[other]
    counts = alike | (distance < MARGIN)
    losses = torch.where(alike, distance.square(), (MARGIN - distance).clamp(min=0).square())
    misplaced = (distance > MARGIN / 2) == alike
    return onehour.Sums(
        loss=losses[counts].sum(),
        count=counts.sum(),
        metrics={"pairs in place %": (100 * (~misplaced).sum(), alike.numel())},
        higher_is_better=["pairs in place %"],
    )
