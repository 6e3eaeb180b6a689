"""The user's own code: which of its lines is at work, what its loops plan, and what its expressions come to.

Expressions are evaluated in their own frame and without running anyone's code: constants, names, entries of an
object's own dictionary, arithmetic, and a few functions of plain lists and tensors.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import math
import operator
import os
import re
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, dataloader, sampler

SCRIPT_FOLDERS: set[str] = set()
"""Whose files are the user's although they lie among the libraries: the folder of a package's script, say."""

_LIBRARIES = tuple(
    {
        os.path.join(os.path.realpath(path), "")
        for name, path in sysconfig.get_paths().items()
        if name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    }
    | {os.path.join(os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..")), "")}
)
_NEAR = tuple(
    os.path.join(os.path.dirname(see(path)), "")
    for path in (os.path.dirname(os.path.dirname(__file__)), torch.__file__)
    for see in (os.path.abspath, os.path.realpath)
)
"""Ours and torch's."""
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_NEXT = re.compile(r"\bnext\b|__next__")

_absolute = lru_cache(maxsize=4096)(os.path.abspath)  # as it was before a script changed the folder


@cache
def _real(filename: str) -> str:
    return os.path.realpath(filename)


def resolve_loaded_modules() -> None:
    """Look where all modules lie that are loaded: in a script that is kept apart from its files it takes long."""
    for module in list(sys.modules.values()):
        if isinstance(path := getattr(module, "__file__", None), str):
            _real(path)


@lru_cache(maxsize=4096)
def is_users(filename: str) -> bool:
    """Whether a file is the user's: neither of the standard library, nor of an installed package, nor ours."""
    if filename.startswith("<"):
        return False
    real = _real(filename)
    if os.path.dirname(real) in SCRIPT_FOLDERS:
        return True
    return not real.startswith(_LIBRARIES) and not any(part in real for part in _PACKAGES)


def user_frames() -> list[FrameType]:
    """The user's frames on the stack, the innermost first."""
    return [frame for frame, _ in walk_stack(sys._getframe(1)) if is_users(frame.f_code.co_filename)]


def user_line() -> str | None:
    """file:line of the innermost frame that is the user's, of no optimizer's if there is one; None without any."""
    frames = user_frames()
    own = next((frame for frame in frames if not _of_an_optimizer(frame)), None)
    return _place(own or frames[0]) if frames else None


def _of_an_optimizer(frame: FrameType) -> bool:
    """Whether it is a method of an optimizer: what wraps another one makes and steps it for its user."""
    return frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer)


def maker_line(made: object) -> str | None:
    """file:line of the innermost frame of the user's that makes an object, and is no method of the object itself."""
    for frame in user_frames():
        own = frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is made
        if not own and not _of_an_optimizer(frame):
            return _place(frame)
    return None


def called_directly() -> bool:
    """Whether it is the user's own code that called one of torch's functions: nobody's stands between."""
    files = (frame.f_code.co_filename for frame, _ in walk_stack(sys._getframe(1)))
    return is_users(next((file for file in files if not file.startswith(_NEAR)), "<"))


def _place(frame: FrameType) -> str:
    return f"{_absolute(frame.f_code.co_filename)}:{frame.f_lineno}"


def asks_next(frame: FrameType) -> bool:
    """Whether the line that a function comes to asks for a next value itself."""
    return bool(_NEXT.search(linecache.getline(frame.f_code.co_filename, frame.f_lineno)))


def by_hand(frame: FrameType) -> bool:
    """Whether the user's own code asks for a batch with `next`: it may count on as many as `len()` says."""
    for asking, _ in walk_stack(frame):
        code = asking.f_code
        if code.co_name == "__next__":  # it asks for someone else, as generators do
            continue
        if is_users(code.co_filename) and asks_next(asking):
            return True
        if not code.co_flags & inspect.CO_GENERATOR:
            return False
    return False


def walked_by_hand(frame: FrameType) -> bool:
    """Whether it is the user's own code that goes over a sampler, perhaps by torch's batches of it: no loader does."""
    files = [above.f_code.co_filename for above, _ in walk_stack(frame)]
    walks = next((file for file in files if file != sampler.__file__), "<")
    return is_users(walks) and dataloader.__file__ not in files


def planned_epochs(frames: list[FrameType]) -> int | None:
    """The length of the innermost `for … in range(…)` around a loop over data, which the first of the frames begins.

    None where no such loop is found, its range cannot be evaluated, or it may count batches: where a `while` or an
    endless generator lies between, where someone asks with `next`, or makes the iterator only now and then.
    """
    iterated_by_hand = True
    for frame in frames:
        filename, line = frame.f_code.co_filename, frame.f_lineno
        if asks_next(frame):
            return None
        iterated_by_hand = iterated_by_hand and not _heads_a_loop(filename, line)
        for node in _around(filename, line):
            length = _length(node.iter, frame) if isinstance(node, ast.For) else None
            if length is not None:
                return length
            conditional = isinstance(node, ast.If | ast.ExceptHandler)
            repeats = isinstance(node, ast.While) or frame.f_code.co_flags & inspect.CO_GENERATOR
            if iterated_by_hand if conditional else repeats:
                return None
    return None


def trainer_epochs(frame: FrameType) -> int | None:
    """What Lightning's or the Hugging Face Trainer's own loop plans, where it is on the stack."""
    for above, _ in walk_stack(frame):
        module, planned = above.f_globals.get("__name__", ""), None
        if module.startswith(("lightning.", "pytorch_lightning.")):
            planned = getattr(above.f_locals.get("self"), "__dict__", {}).get("max_epochs")
        elif module.startswith("transformers."):
            planned = above.f_locals.get("num_train_epochs")
        if isinstance(planned, int) and 0 < planned < 10**6:
            return planned
    return None


def quotients(frame: FrameType) -> Iterator[float]:
    """The values of the divisions, products and means in the statement that a function comes to, before it runs."""
    for node in _parts(frame.f_code.co_filename, frame.f_lineno):
        try:
            value = _value(node, frame)
        except Exception:  # whatever it is, it is none of ours
            continue
        if isinstance(value, float) or isinstance(node, ast.BinOp):
            yield float(value)


@lru_cache(maxsize=64)
def _nodes(filename: str) -> list[ast.AST]:
    try:
        return list(ast.walk(ast.parse("".join(linecache.getlines(filename)))))
    except (SyntaxError, ValueError):
        return []


@lru_cache(maxsize=512)
def _parts(filename: str, line: int) -> list[ast.expr]:
    """Divisions, products and calls in the simple statement that starts at a line; 100 / n is no rate of anything."""
    simple = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)
    statements = [node for node in _nodes(filename) if isinstance(node, simple) and node.lineno == line]
    nodes = [node for node in ast.walk(statements[-1]) if isinstance(node, ast.BinOp | ast.Call)] if statements else []
    return [
        n
        for n in nodes
        if isinstance(n, ast.Call)
        or isinstance(n.op, ast.Mult)
        or (isinstance(n.op, ast.Div) and type(n.left) is not ast.Constant)
    ]


def _around(filename: str, line: int) -> list[ast.For | ast.While | ast.If | ast.ExceptHandler]:
    """The loops and conditions whose body holds a line, the innermost first."""
    kinds = (ast.For, ast.While, ast.If, ast.ExceptHandler)
    nodes = [node for node in _nodes(filename) if isinstance(node, kinds)]
    around = [node for node in nodes if node.body[0].lineno <= line <= (node.end_lineno or 0)]
    return sorted(around, key=lambda node: -node.lineno)


def _heads_a_loop(filename: str, line: int) -> bool:
    """Whether a line is what a `for` or a comprehension goes over."""
    loops = [node for node in _nodes(filename) if isinstance(node, ast.For | ast.comprehension)]
    return any(loop.iter.lineno <= line <= (loop.iter.end_lineno or 0) for loop in loops)


def _length(node: ast.expr, frame: FrameType) -> int | None:
    """Of a `range`, also within a `tqdm` or an `enumerate`; what needs a call may count anything."""
    if not isinstance(node, ast.Call):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if name in ("tqdm", "iter", "enumerate", "list", "track", "reversed") and node.args:
        return _length(node.args[0], frame)
    if name not in ("range", "trange", "xrange"):
        return None
    if any(isinstance(inner, ast.Call) for argument in node.args for inner in ast.walk(argument)):
        return None
    try:
        return len(range(*[_value(argument, frame) for argument in node.args]))
    except Exception:  # not a number, or not one of ours
        return None


OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
MEANS = {id(function) for function in (statistics.mean, statistics.fmean)}


def _value(node: ast.expr, frame: FrameType) -> Any:
    """What an expression comes to; raises for one that could run the user's code."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)  # its own dictionary, or a module's; properties would run code
        return vars(owner)[node.attr] if node.attr in vars(owner) else vars(type(owner))[node.attr]
    if isinstance(node, ast.Subscript):
        owner, key = _value(node.value, frame), _value(node.slice, frame)
        return owner[key] if isinstance(owner, dict | list | tuple | torch.Tensor) else None
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_number(_value(node.left, frame)), _number(_value(node.right, frame)))
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
        return float(_number(argument))
    values = [_number(value) for value in argument] if isinstance(argument, list | tuple) else None
    if values is None:
        raise ValueError("no list")
    if method in ("stack", "tensor", "array", "asarray"):
        return values
    if name == "sum":
        return math.fsum(values)
    numpy = sys.modules.get("numpy")
    if id(_value(node.func, frame)) in MEANS | ({id(numpy.mean)} if numpy else set()):
        return math.fsum(values) / len(values)
    raise ValueError("another function")


def _number(value: Any) -> int | float:
    if isinstance(value, int | float):
        return value
    if torch.is_tensor(value) and value.numel() == 1:
        return float(value)
    raise ValueError("no number")
