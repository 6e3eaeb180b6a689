"""A run from its recipe: one iteration, the loop around it, evaluation, checkpoints and the record."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """`onehour.train(…)` is a function, and this package has its name: importing it must not take the function away."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # By name: this package does not depend on what is above it.
        return importlib.import_module("onehour.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
