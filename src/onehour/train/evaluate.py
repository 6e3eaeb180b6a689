"""The error of a model on a data set: integer counts, the same bits for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from onehour.config import Recipe
from onehour.data.loader import CHUNK, Feed, chunk_batches
from onehour.dist.group import Group
from onehour.train.precision import forward

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What a model gets wrong.

    >>> Evaluation(errors=3, samples=100, loss=0.5).top1_error
    3.0
    """

    errors: int
    samples: int
    loss: float
    """Mean cross-entropy."""

    @property
    def top1_error(self) -> float:
        """Errors in percent of the samples.

        >>> Evaluation(errors=1, samples=4, loss=0.0).top1_error
        25.0
        """
        return 100 * self.errors / self.samples


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Any, recipe: Recipe, *, group: Group, feed: Feed | None = None) -> Evaluation:
    """Evaluate on every sample once.

    Chunks of 256 consecutive samples are dealt to the processes in turn. Each chunk's loss has a place of its own in
    the vector that is summed, so that no order of adding depends on p.

    Args:
        feed: the data set's, whose processes stay for the next one; without, this one loads.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
    >>> evaluate(nn.Identity(), data, Recipe(), group=Group()).errors
    1
    """
    samples = len(dataset) if feed is None else feed.samples
    chunks = range(group.rank, -(-samples // CHUNK), group.size)
    losses = torch.zeros(-(-samples // CHUNK) + 1, dtype=torch.float64, device=group.device)
    was_training = model.training
    model.eval()
    batches = (
        chunk_batches(dataset, chunks, seed=recipe.seed, loaders=0, device=group.device)
        if feed is None
        else feed.chunks(chunks)
    )
    for chunk, (images, labels) in zip(chunks, batches, strict=True):
        logits = forward(model, images, recipe)
        losses[chunk] = F.cross_entropy(logits.double(), labels, reduction="sum")
        losses[-1] += (logits.argmax(1) != labels).sum()  # counts are exact in float64
    model.train(was_training)
    *by_chunk, errors = group.sum(losses).tolist()
    return Evaluation(errors=int(errors), samples=samples, loss=sum(by_chunk) / samples)
