"""Python imports this in the processes that tests start: no optimizer of theirs imports torch's compiler for itself.

torch keeps its compiler away from a few of its functions, and imports all of it at the first call of one of them: 1.7 s
of CPU time, in more than a hundred processes. Where nothing is compiled, they do the same without.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _plain(function: Any = None, recursive: bool = True) -> Any:
    return function if function is not None else _plain


class _WithoutCompiler:
    """Finds torch._compile, whose one decorator then does nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torch._compile":
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            module._disable_dynamo = _plain  # type: ignore[attr-defined]

        spec.loader.exec_module = loaded
        return spec


if "pytest" not in sys.modules:  # which imports this file to look for examples
    sys.meta_path.insert(0, _WithoutCompiler())  # pyright: ignore[reportArgumentType]
