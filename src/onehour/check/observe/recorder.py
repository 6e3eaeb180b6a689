"""Putting observers in place of torch's own functions, and taking them away again."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from onehour.check.tape import Tape, Trouble


def nothing(*arguments: Any, **options: Any) -> None:
    """Where nobody is to be told."""


class TapeRecorder:
    """The state of one observed run: the first `deep_updates` of each optimizer are looked at in full.

    With `cut` long passes may be cut short: a script is run for its evidence alone, a watched loop for itself.
    """

    def __init__(self, *, deep_updates: int, cut: bool) -> None:
        self.tape, self.patches = Tape(), Patches()
        self.deep_updates, self.cut = deep_updates, cut
        self.finished = self.near_an_end = False
        self.updates = self.backwards = 0
        self.world = 1
        self.on_made: Callable[..., object] = nothing  # called when an optimizer or a loader was made,
        self.on_pass: Callable[..., object] = nothing  # with its number before a pass over a loader,
        self.on_step: Callable[..., object] = nothing  # and after a step; the last two may end the run

    @property
    def attentive(self) -> bool:
        """Whether losses and places are recorded: in a script always, in a watched loop at the ends of epochs too."""
        return self.cut or self.near_an_end or self.updates < self.deep_updates

    def trouble(self, observer: str, error: BaseException) -> None:
        """An observer failed: its evidence is missing, the user's code goes on."""
        self.tape.add(Trouble(observer=observer, error=f"{type(error).__name__}: {error}"[:300]))


class Numbering:
    """Numbering objects in the order in which they are met; holds none of them alive."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers = itertools.count()

    def of(self, thing: Any) -> int:
        if thing not in self._known:
            self._known[thing] = next(self._numbers)
        return self._known[thing]


def quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    """For methods of observers, which have a `recorder`: what fails in them never reaches the user's code."""

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


class Hook(functools.partial[Any]):
    """A hook on someone's module that copies and files of the module do not take with them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (nothing,)


class Patches(ExitStack):
    """Attributes that were replaced, and hooks: `close` takes all away, the newest first."""

    def around(self, owner: Any, name: str, observer: Callable[..., Any]) -> None:
        """Call `observer(original, *arguments)` in place of `owner.name(*arguments)`."""
        original = vars(owner).get(name, getattr(owner, name))

        @functools.wraps(original)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            return observer(original, *arguments, **options)

        self.put(owner, name, wrapper)

    def beside(
        self, owner: Any, name: str, *, before: Callable[..., Any] = nothing, after: Callable[..., Any] = nothing
    ) -> None:
        """Call `before(*arguments)` and `after(*arguments)` around `owner.name(*arguments)`."""

        def all_three(original: Any, *arguments: Any, **options: Any) -> Any:
            before(*arguments, **options)
            result = original(*arguments, **options)
            after(*arguments, **options)
            return result

        self.around(owner, name, all_three)

    def put(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, value)
