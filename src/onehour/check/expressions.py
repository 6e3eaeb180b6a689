"""Values of the user's own expressions before they run: divisions and means, computed without calling their code."""

from __future__ import annotations

import ast
import linecache
import math
import statistics
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["quotients"]

_MEANS = {id(function) for function in (statistics.mean, statistics.fmean)}


def quotients(frame: FrameType) -> Iterator[float]:
    """The values of the divisions and means in the statement that a function comes to.

    >>> list(quotients(sys._getframe()))
    []
    """
    for node in _parts(frame.f_code.co_filename, frame.f_lineno):
        try:
            value = _value(node, frame)
        except Exception:  # whatever it is, it is none of ours
            continue
        if isinstance(value, float):
            yield value


@lru_cache(maxsize=512)
def _parts(filename: str, line: int) -> list[ast.expr]:
    """Divisions and calls of a mean in the simple statement that starts at a line."""
    statement = _statements(filename).get(line)
    if statement is None:
        return []
    nodes = [node for node in ast.walk(statement) if isinstance(node, ast.BinOp | ast.Call)]
    return [n for n in nodes if isinstance(n, ast.Call) or isinstance(n.op, ast.Div | ast.Mult)]


@lru_cache(maxsize=64)
def _statements(filename: str) -> dict[int, ast.stmt]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return {}
    simple = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)
    return {node.lineno: node for node in ast.walk(tree) if isinstance(node, simple)}


def _value(node: ast.expr, frame: FrameType) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        return _attribute(_value(node.value, frame), node.attr)
    if isinstance(node, ast.Subscript):
        owner, key = _value(node.value, frame), _value(node.slice, frame)
        return owner[key] if isinstance(owner, dict | list | tuple | torch.Tensor) else None
    if isinstance(node, ast.BinOp):
        left, right = _number(_value(node.left, frame)), _number(_value(node.right, frame))
        operations = {ast.Add: left.__add__, ast.Sub: left.__sub__, ast.Mult: left.__mul__, ast.Div: left.__truediv__}
        return operations[type(node.op)](right)
    if isinstance(node, ast.Call):
        return _called(node, frame)
    raise ValueError("another expression")


def _called(node: ast.Call, frame: FrameType) -> Any:
    """sum, len, float and means of plain lists, and .item(), .mean(), .sum() of tensors and of stacked lists."""
    method = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if isinstance(node.func, ast.Attribute) and method in ("item", "mean", "sum") and not node.args:
        owner = _value(node.func.value, frame)
        values = owner.reshape(-1).tolist() if torch.is_tensor(owner) and owner.ndim < 2 else owner
        if not isinstance(values, list):
            raise ValueError("another object")
        return math.fsum(_number(value) for value in values) / (len(values) if method == "mean" else 1)
    if len(node.args) != 1 or node.keywords:
        raise ValueError("another call")
    argument = _value(node.args[0], frame)
    name = node.func.id if isinstance(node.func, ast.Name) else None
    if name == "len" and isinstance(argument, list | tuple | dict | torch.Tensor | DataLoader | Dataset):
        return len(argument)  # type: ignore[arg-type]
    if name in ("float", "int"):
        return _number(argument)
    values = [_number(value) for value in argument] if isinstance(argument, list | tuple) else None
    if values is None:
        raise ValueError("no list")
    if method in ("stack", "tensor", "array", "asarray"):
        return values
    if name == "sum":
        return math.fsum(values)
    numpy = sys.modules.get("numpy")
    if id(_value(node.func, frame)) in _MEANS | ({id(numpy.mean)} if numpy else set()):
        return math.fsum(values) / len(values)
    raise ValueError("another function")


def _attribute(owner: Any, name: str) -> Any:
    """Of an object's own dictionary, or a module's; properties would run code."""
    return vars(owner)[name] if name in vars(owner) else vars(type(owner))[name]


def _number(value: Any) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    if torch.is_tensor(value) and value.numel() == 1:
        return float(value)
    raise ValueError("no number")
