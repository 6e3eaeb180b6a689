"""What the observers share: the tape, how deep to look, and what each of them has numbered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from onehour.check.tape import Tape

__all__ = ["Numbers", "Recorder", "quiet"]


class Recorder:
    """The state of one observed run.

    Args:
        deep_updates: updates of each optimizer whose gradients, weights and state are looked at.
        epochs: passes over the training data to record.
        cut: whether long passes may be cut short; a script is run for its evidence alone, a watched loop for itself.

    >>> Recorder(deep_updates=4, epochs=2, cut=False).tape.events
    []
    """

    def __init__(self, *, deep_updates: int, epochs: int, cut: bool) -> None:
        self.tape = Tape()
        self.deep_updates, self.epochs, self.cut = deep_updates, epochs, cut
        self.finished = False
        self.near_an_end = False
        self.updates = 0
        self.backwards = 0
        self.rank, self.world = 0, 1

    @property
    def attentive(self) -> bool:
        """Whether losses and places are recorded: in a script always, in a watched loop at the ends of epochs too.

        >>> Recorder(deep_updates=4, epochs=2, cut=False).attentive
        True
        """
        return self.cut or self.near_an_end or self.updates < self.deep_updates

    def trouble(self, observer: str, error: BaseException) -> None:
        """An observer failed: its evidence is missing, the user's code goes on.

        >>> recorder = Recorder(deep_updates=4, epochs=2, cut=False)
        >>> recorder.trouble("step", ValueError("no"))
        >>> recorder.tape.events[0].facts["error"]
        'ValueError: no'
        """
        self.tape.add("trouble", None, observer=observer, error=f"{type(error).__name__}: {error}"[:300])


class Numbers:
    """Numbers objects in the order in which they are met; holds none of them alive.

    >>> class Thing: ...
    >>> numbers, thing = Numbers(), Thing()
    >>> numbers.of(thing), numbers.of(Thing()), numbers.of(thing)
    (0, 1, 0)
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._next = 0

    def __contains__(self, thing: Any) -> bool:
        return thing in self._known

    def of(self, thing: Any) -> int:
        """The number of an object.

        >>> Numbers().of(Numbers())
        0
        """
        if thing not in self._known:
            self._known[thing] = self._next
            self._next += 1
        return self._known[thing]


def quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    """For methods of observers, which have a `recorder`: what fails in them never reaches the user's code.

    >>> class Broken:
    ...     recorder = Recorder(deep_updates=4, epochs=2, cut=False)
    ...     @quiet
    ...     def look(self): return 1 / 0
    >>> Broken().look() is None
    True
    """

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.recorder.finished:
            return None
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            self.recorder.trouble(f"{type(self).__name__}.{method.__name__}", error)
            return None

    return wrapper
