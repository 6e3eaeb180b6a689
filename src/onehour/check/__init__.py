"""Find the paper's pitfalls in anyone's training loop: wrap and observe, never edit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onehour.check.case import Base as Base
    from onehour.check.finding import Finding as Finding
    from onehour.check.formats import Report as Report
    from onehour.check.run.checking import assert_clean as assert_clean
    from onehour.check.run.checking import check_script as check_script
    from onehour.check.run.forkserver import CheckError as CheckError
    from onehour.check.watching import Watch as Watch
    from onehour.check.watching import hf_callback as hf_callback
    from onehour.check.watching import lightning_callback as lightning_callback
    from onehour.check.watching import watch as watch

_HOMES = {
    "case": ["Base"],
    "finding": ["Finding"],
    "formats": ["Report"],
    "run.checking": ["assert_clean", "check_script"],
    "run.forkserver": ["CheckError"],
    "watching": ["Watch", "hf_callback", "lightning_callback", "watch"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onehour.check' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"onehour.check.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
