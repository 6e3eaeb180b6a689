"""Whether a label names a class: a whole number from 0 to C − 1, checked on the host as samples are read.

torch's cross-entropy leaves out the label −100 without a word, and a label outside the classes ends a GPU's context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from onehour.data.labels import as_label

__all__ = ["Classes", "refuse_labels"]


@dataclass(frozen=True)
class Classes:
    """C, and where it comes from.

    >>> Classes(10, "the model's outputs").expected
    "a whole number from 0 to 9, since C = 10 (the model's outputs)"
    """

    count: int
    source: str

    @property
    def expected(self) -> str:
        """What a label must be, for messages."""
        return f"a whole number from 0 to {self.count - 1}, since C = {self.count} ({self.source})"

    def checked(self, label: object, index: int, name: Callable[[int], str]) -> int:
        """The label of sample `index` as the whole number that it is.

        Args:
            name: what a message calls a sample: its side, index and file.

        Raises:
            ValueError: if it is none, or no class has it.

        >>> Classes(3, "the model's outputs").checked(-100, 5, "training sample {}".format)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: training sample 5: the label is -100; expected a whole number from 0 to 2, since C = 3 (the ...)
        """
        try:
            number = as_label(label)
        except ValueError as error:
            raise ValueError(f"{name(index)}: {error}; expected {self.expected}") from error
        if not 0 <= number < self.count:
            raise ValueError(f"{name(index)}: the label is {number}; expected {self.expected}")
        return number


def refuse_labels(labels: Tensor, classes: Classes, name: Callable[[int], str]) -> None:
    """Check the labels of samples in memory, once.

    Args:
        labels: N of them.
        name: what a message calls sample i.

    Raises:
        ValueError: for the first that no class has, as `Classes.checked`.

    >>> import torch
    >>> refuse_labels(torch.tensor([0, 2, 1]), Classes(3, "the data's labels"), str)
    """
    whole = not labels.is_floating_point() and not labels.is_complex()
    if whole and labels.ndim == 1 and int(labels.min()) >= 0 and int(labels.max()) < classes.count:
        return
    for index, label in enumerate(labels.cpu()):
        classes.checked(label, index, name)
