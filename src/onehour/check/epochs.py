"""How many epochs a loop plans: read from its own `for … in range(…)`, evaluated in its own frame."""

from __future__ import annotations

import ast
import inspect
import linecache
from functools import lru_cache
from types import FrameType
from typing import Any

from onehour.check.passes import asks_next

__all__ = ["planned_epochs", "trainer_epochs"]

_RANGES = ("range", "trange", "xrange")
_WRAPPERS = ("tqdm", "iter", "enumerate", "list", "track", "reversed")


def planned_epochs(frames: list[FrameType]) -> int | None:
    """The length of the innermost `for … in range(…)` around a loop over data.

    Args:
        frames: the user's, the innermost first; its current line is where the data's iterator was asked for.

    Returns:
        None where no such loop is found, its range cannot be evaluated, or it may count batches: where a `while` or
        an endless generator lies between, where someone asks with `next`, or makes the iterator only now and then.

    >>> planned_epochs([])
    """
    by_hand = True
    for frame in frames:
        filename, line = frame.f_code.co_filename, frame.f_lineno
        if asks_next(frame):
            return None
        by_hand = by_hand and not _heads_a_loop(filename, line)
        for node in _around(filename, line):
            length = _length(node.iter, frame) if isinstance(node, ast.For) else None
            if length is not None:
                return length
            conditional = isinstance(node, ast.If | ast.ExceptHandler)
            repeats = isinstance(node, ast.While) or frame.f_code.co_flags & inspect.CO_GENERATOR
            if by_hand if conditional else repeats:
                return None
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


def _around(filename: str, line: int) -> list[ast.For | ast.While | ast.If | ast.ExceptHandler]:
    """The loops and conditions whose body holds a line, the innermost first."""
    tree = _parsed(filename)
    kinds = (ast.For, ast.While, ast.If, ast.ExceptHandler)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)] if tree else []
    around = [node for node in nodes if node.body[0].lineno <= line <= (node.end_lineno or 0)]
    return sorted(around, key=lambda node: -node.lineno)


def _heads_a_loop(filename: str, line: int) -> bool:
    """Whether a line is what a `for` or a comprehension goes over."""
    tree = _parsed(filename)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For | ast.comprehension)] if tree else []
    return any(loop.iter.lineno <= line <= (loop.iter.end_lineno or 0) for loop in loops)


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
