"""Ends of a run that are not bad input, and that a launcher's restart must not undo."""

from __future__ import annotations

__all__ = ["DELIBERATE", "NonFiniteError", "StoppedError"]


class NonFiniteError(ArithmeticError):
    """The loss or a gradient was not finite, though every sample was; the weights before it are kept.

    >>> issubclass(NonFiniteError, ArithmeticError)
    True
    """


class StoppedError(Exception):
    """A process was asked to stop; the run is saved and the same command goes on with it.

    >>> issubclass(StoppedError, Exception)
    True
    """


DELIBERATE: dict[str, type[Exception]] = {"stopped": StoppedError, "non-finite": NonFiniteError}
"""By the name that outcome.json has for them."""
