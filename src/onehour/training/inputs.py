"""Which sample is not finite, where a loss is not: looked for once it has happened, by reading the samples again.

A sample is a function of its key, so it is the same again. No iteration pays for the look, and none waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onehour.data.loader import Feed
from onehour.dist.group import Group

__all__ = ["InputError", "refuse_batch", "refuse_iterations"]


class InputError(ValueError):
    """A sample that is not finite. All processes raise it together.

    >>> issubclass(InputError, ValueError)
    True
    """


def refuse_batch(images: Tensor, name: Callable[[int], str]) -> None:
    """Refuse a batch for its first sample that is not finite.

    Args:
        images: of N samples, as the model takes them.
        name: what a message calls row i.

    Raises:
        InputError: naming it.

    >>> refuse_batch(torch.tensor([[0.0], [torch.nan]]), "sample {}".format)
    Traceback (most recent call last):
    onehour.training.inputs.InputError: sample 1 is not finite: 1 of its 1 values is NaN; mend it, or leave it out
    """
    found = _first(images)
    if found is not None:
        row, *counts = found
        raise _refusal(name(row), *counts)


def refuse_iterations(iterations: range, feed: Feed, passes: list[range], group: Group) -> None:
    """Refuse training data for the first sample of some iterations that is not finite; all processes call it together.

    Args:
        feed: of this process, whose stream says which samples they are.
        passes: the workers of each of this process's passes.

    Raises:
        InputError: in all processes, naming the sample.

    >>> from torch.utils.data import TensorDataset
    >>> from onehour import SampleStream
    >>> stream = SampleStream(samples=4, minibatch=2, seed=0)
    >>> data = TensorDataset(torch.zeros(4, 1), torch.zeros(4))
    >>> feed = Feed(data, seed=0, loaders=0, device=torch.device("cpu"), stream=stream)
    >>> refuse_iterations(range(2), feed, [range(1)], Group())
    """
    assert feed.stream is not None
    found = torch.zeros(group.size, 5, dtype=torch.float64, device=group.device)
    batches = feed.passes(passes, start=iterations.start, stop=iterations.stop)
    for iteration, workers in ((iteration, workers) for iteration in iterations for workers in passes):
        images, _ = next(batches)
        first = _first(images)
        if first is not None:
            row, *counts = first
            index = int(feed.stream.indices(iteration, workers)[row])
            replaced = index in feed.skipped.indices
            found[group.rank] = torch.tensor([index + 1, *counts, replaced], dtype=torch.float64)
            break
    for index, *counts, replaced in group.sum(found).long().tolist():
        if index:
            name = feed.called(index - 1)
            raise _refusal(f"what was taken in the place of {name}" if replaced else name, *counts)


def _first(images: Tensor) -> tuple[int, int, int, int] | None:
    """The first row that is not finite: its number, how many NaN and infinities it has, and how many values."""
    values = images.reshape(len(images), -1)
    rows = (~values.isfinite().all(1)).nonzero()
    if not len(rows):
        return None
    row = values[int(rows[0])]
    return int(rows[0]), int(row.isnan().sum()), int(row.isinf().sum()), row.numel()


def _refusal(name: str, nans: int, infinities: int, count: int) -> InputError:
    bad = nans + infinities
    kind = "NaN or infinite" if nans and infinities else "NaN" if nans else "infinite"
    values = f"{bad} of its {count} values {'is' if bad == 1 else 'are'} {kind}"
    return InputError(f"{name} is not finite: {values}; mend it, or leave it out")
