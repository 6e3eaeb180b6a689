"""Putting observers in place of torch's own functions, and taking them away again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Hook", "Patches"]


class Hook:
    """A hook on someone's module that copies and files of the module do not take with them.

    >>> import copy
    >>> hook = Hook(lambda module, inputs: print("seen"))
    >>> hook(None, ())
    seen
    >>> copy.deepcopy(hook)(None, ())
    """

    def __init__(self, action: Callable[..., Any]) -> None:
        self._action = action

    def __call__(self, *arguments: Any) -> Any:
        return self._action(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _nothing(*arguments: Any) -> None:
    """What a copied hook does."""


def _no_hook() -> Callable[..., None]:
    return _nothing


class Patches:
    """Attributes that were replaced, and what stood there.

    >>> class Thing:
    ...     def name(self): return "thing"
    >>> patches = Patches()
    >>> patches.around(Thing, "name", lambda original, self: original(self).upper())
    >>> Thing().name()
    'THING'
    >>> patches.undo()
    >>> Thing().name()
    'thing'
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def around(self, owner: Any, name: str, observer: Callable[..., Any]) -> None:
        """Call `observer(original, *arguments)` in place of `owner.name(*arguments)`."""
        original = vars(owner).get(name, getattr(owner, name))

        @functools.wraps(original)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            return observer(original, *arguments, **options)

        self.put(owner, name, wrapper)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace `owner.name` by a value."""
        known = name in vars(owner)
        original = vars(owner).get(name)
        setattr(owner, name, value)

        def undo() -> None:
            if known:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._undo.append(undo)

    def on_undo(self, action: Callable[[], Any]) -> None:
        """Something else to take away: a hook's handle's `remove`."""
        self._undo.append(action)

    def undo(self) -> None:
        """Take all away, the newest first.

        >>> Patches().undo()
        """
        while self._undo:
            self._undo.pop()()
