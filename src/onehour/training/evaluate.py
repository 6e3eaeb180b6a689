"""The error of a model on a data set: integer counts, the same bits for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from onehour.config import Recipe
from onehour.data.loader import CHUNK, Batch, Feed, chunk_batches
from onehour.data.samples import Keyed
from onehour.dist.group import Group
from onehour.training.inputs import refuse_batch
from onehour.training.precision import forward

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
    """Mean cross-entropy; not finite where the model's outputs are not, though every sample is."""

    @property
    def top1_error(self) -> float:
        """Errors in percent of the samples.

        >>> Evaluation(errors=1, samples=4, loss=0.0).top1_error
        25.0
        """
        return 100 * self.errors / self.samples


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    recipe: Recipe,
    *,
    group: Group,
    feed: Feed | None = None,
) -> Evaluation:
    """Evaluate on every sample once.

    Chunks of 256 consecutive samples are dealt to the processes in turn. Each chunk's loss has a place of its own in
    the vector that is summed, so that no order of adding depends on p. A sample for which the model gives NaN is an
    error.

    Args:
        feed: the data set's, whose processes stay for the next one; without, this one loads, and checks no label.

    Raises:
        InputError: where the loss is not finite because a sample is not; in all processes, naming it.

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

    def read(chunks: range) -> Iterator[Batch]:
        if feed is not None:
            return feed.chunks(chunks)
        return chunk_batches(dataset, chunks, seed=recipe.seed, loaders=0, device=group.device)

    for chunk, (images, labels) in zip(chunks, read(chunks), strict=True):
        logits = forward(model, images, recipe)
        losses[chunk] = F.cross_entropy(logits.double(), labels, reduction="sum")
        wrong = (logits.argmax(1) != labels) | logits.isnan().any(1)
        losses[-1] += wrong.sum()  # counts are exact in float64
    model.train(was_training)
    *by_chunk, errors = group.sum(losses).tolist()
    broken = next((chunk for chunk, loss in enumerate(by_chunk) if not math.isfinite(loss)), None)
    if broken is not None:
        images, _ = next(read(range(broken, broken + 1)))
        called = Keyed(dataset, recipe.seed, side="validation").called
        refuse_batch(images, lambda row: called(broken * CHUNK + row))
    return Evaluation(errors=int(errors), samples=samples, loss=sum(by_chunk) / samples)
