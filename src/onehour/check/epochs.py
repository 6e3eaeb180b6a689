"""How many epochs a loop plans: read from its own `for … in range(…)`, evaluated in its own frame."""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache
from types import FrameType
from typing import Any

__all__ = ["planned_epochs", "trainer_epochs"]

_RANGES = ("range", "trange", "xrange")
_WRAPPERS = ("tqdm", "iter", "enumerate", "list", "track", "reversed")


def planned_epochs(frames: list[FrameType]) -> int | None:
    """The length of the innermost `for … in range(…)` around a loop over data.

    Args:
        frames: the user's, the innermost first; its current line is where the data's iterator was asked for.

    Returns:
        None where no such loop is found, or its range cannot be evaluated.

    >>> planned_epochs([])
    """
    for frame in frames:
        for loop in _loops_around(frame.f_code.co_filename, frame.f_lineno):
            length = _length(loop.iter, frame)
            if length is not None:
                return length
    return None


def trainer_epochs(frame: FrameType | None) -> int | None:
    """What Lightning's or the Hugging Face Trainer's own loop plans, where it is on the stack.

    >>> trainer_epochs(None)
    """
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("lightning.", "pytorch_lightning.")):
            planned = getattr(frame.f_locals.get("self"), "__dict__", {}).get("max_epochs")
            if isinstance(planned, int) and planned > 0:
                return planned
        elif module.startswith("transformers."):
            planned = frame.f_locals.get("num_train_epochs")
            if isinstance(planned, int) and 0 < planned < 10**6:
                return planned
        frame = frame.f_back
    return None


@lru_cache(maxsize=64)
def _parsed(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None


def _loops_around(filename: str, line: int) -> list[ast.For]:
    """The for statements whose body holds a line, the innermost first."""
    tree = _parsed(filename)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)] if tree else []
    around = [loop for loop in loops if loop.body[0].lineno <= line <= (loop.body[-1].end_lineno or 0)]
    return sorted(around, key=lambda loop: -loop.lineno)


def _length(node: ast.expr, frame: FrameType) -> int | None:
    if not isinstance(node, ast.Call):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if name in _WRAPPERS and node.args:
        return _length(node.args[0], frame)
    if name not in _RANGES:
        return None
    bounds = [_value(argument, frame) for argument in node.args]
    if not bounds or not all(isinstance(bound, int) for bound in bounds):
        return None
    return len(range(*bounds))


def _value(node: ast.expr, frame: FrameType) -> Any:
    """A constant, a name, an attribute or a sum of them; nothing that could run the user's code."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        known = getattr(owner, "__dict__", {})
        return known.get(node.attr, getattr(type(owner), "__dict__", {}).get(node.attr))
    if isinstance(node, ast.Subscript):
        owner, key = _value(node.value, frame), _value(node.slice, frame)
        return owner.get(key) if isinstance(owner, dict) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
        left, right = _value(node.left, frame), _value(node.right, frame)
        if isinstance(left, int) and isinstance(right, int):
            return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
    return None
