"""The user's own code: its lines, the values of its expressions, and the epochs that its loops plan."""

import linecache
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import pytest
import torch

from onehour.check.observe import source
from onehour.check.observe.source import (
    called_directly,
    is_users,
    maker_line,
    planned_epochs,
    quotients,
    trainer_epochs,
    user_line,
)

SOURCE = """
class Made:
    def __init__(self, ask):
        self.place = ask(self)


def make(ask):
    return Made(ask)


def call(function):
    return function()
"""


@pytest.fixture
def user(tmp_path: Path) -> dict[str, Any]:
    """A module of the user's."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    names: dict[str, Any] = {"path": path}
    exec(compile(SOURCE, str(path), "exec"), names)
    return names


def test_the_innermost_line_of_the_user_s(user: dict[str, Any]):
    assert user["call"](user_line) == f"{user['path']}:12"


def test_what_is_made_is_made_by_another(user: dict[str, Any]):
    """Not in its own constructor, which only calls that of its base class."""
    assert user["make"](lambda made: user_line()).place != f"{user['path']}:8"
    assert user["make"](maker_line).place == f"{user['path']}:8"


WRAPPER = """
import torch


class Wrapper(torch.optim.Optimizer):
    def __init__(self, parameters, make):
        self.inner = make(parameters)

    def step(self, ask):
        return ask()


def train(parameters, make, ask):
    wrapper = Wrapper(parameters, make)
    return wrapper.inner, wrapper.step(ask)
"""


def test_an_optimizer_that_wraps_another_is_not_the_one_that_makes_and_steps_it(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(WRAPPER)
    names: dict[str, Any] = {}
    exec(compile(WRAPPER, str(path), "exec"), names)
    made, stepped = names["train"]([], maker_line, user_line)
    assert (made, stepped) == (f"{path}:14", f"{path}:15")


def test_whether_a_library_stands_between(user: dict[str, Any], tmp_path: Path):
    assert user["call"](called_directly)
    library = tmp_path / "site-packages" / "library.py"
    names: dict[str, Any] = {}
    exec(compile("def through(function):\n    return function()\n", str(library), "exec"), names)
    assert user["call"](lambda: names["through"](called_directly)) is False


def test_libraries_are_not_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not any(is_users(file) for file in (os.__file__, torch.__file__, "<stdin>"))
    script = tmp_path / "site-packages" / "package" / "train.py"
    assert not is_users(str(script))
    monkeypatch.setattr(source, "SCRIPT_FOLDERS", {str(script.parent)})
    is_users.cache_clear()
    assert is_users(str(script))  # unless it is what is checked
    is_users.cache_clear()


def run(folder: Path, text: str, ask: Any, **names: Any) -> None:
    """Run a function of the user's whose body is a text that calls `ask`."""
    path = folder / "mine.py"
    body = "\n".join(f"    {line}" for line in text.splitlines())
    path.write_text(f"def mine():\n{body}\n")
    names |= {"ask": ask}
    exec(compile(path.read_text(), str(path), "exec"), names)
    names["mine"]()


def caller() -> Any:
    return sys._getframe(2)


class Meter:
    def __init__(self) -> None:
        self.sum, self.count = 9.0, 12

    @property
    def average(self) -> float:
        raise RuntimeError("the user's code was run")


VALUES = [
    ("3 / 4", []),
    ("100 * correct / total", [75.0, 300.0]),
    ("correct.item() / total", [3.0, 0.75]),
    ("correct * (100 / total)", [75.0]),
    ("sum(rates) / len(rates)", [0.625, 1.25]),
    ("float(correct) / counts['all']", [0.75, 3.0]),
    ("torch.stack(rates).mean()", [0.625]),
    ("torch.tensor(rates).mean().item()", [0.625]),
    ("numpy.mean(rates)", [0.625]),
    ("statistics.mean(rates)", [0.625]),
    ("meter.sum / meter.count", [0.75]),
    ("meter.average / 2", []),
    ("unknown(correct) / total", []),
    ("rates / 2", []),
]


@pytest.mark.parametrize(("expression", "expected"), VALUES)
def test_a_value_before_it_is_computed(expression: str, expected: list[float], tmp_path: Path):
    import statistics

    seen: list[float] = []
    names = {"correct": torch.tensor(3), "total": 4, "rates": [0.5, 0.75], "counts": {"all": 4}, "meter": Meter()}
    modules = {"torch": torch, "numpy": numpy, "statistics": statistics}

    def unknown(value: Any) -> float:
        raise RuntimeError("the user's code was run")

    def ask() -> bool:
        seen.extend(quotients(caller()))
        return True

    run(tmp_path, f"return ask() or ({expression})", ask, **names, **modules, unknown=unknown)
    assert sorted(round(value, 9) for value in seen) == pytest.approx(sorted(expected))


LOOPS = [
    ("for epoch in range(90):", 90),
    ("for epoch in range(start, epochs):", 88),
    ("for epoch in range(epochs + 1):", 91),
    ("for epoch in tqdm(range(args.epochs)):", 7),
    ("for epoch in range(config['epochs']):", 5),
    ("for epoch in trange(epochs):", 90),
    ("for epoch in range(len(names)):", None),
    ("for epoch in names:", None),
    ("while epochs:", None),
]


@pytest.mark.parametrize(("head", "expected"), LOOPS)
def test_the_epochs_that_a_loop_plans(head: str, expected: int | None, tmp_path: Path):
    class Arguments:
        epochs = 7

    seen: list[int | None] = []

    def ask() -> list[int]:
        seen.append(planned_epochs([caller()]))
        return []

    names = {"start": 2, "epochs": 90, "config": {"epochs": 5}, "names": ["a"], "args": Arguments()}
    run(tmp_path, f"{head}\n    for batch in ask():\n        pass\n    break", ask, **names, tqdm=list, trange=range)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("module", "names", "expected"),
    [
        ("lightning.pytorch.loops.fit_loop", "self", 12),
        ("pytorch_lightning.loops.fit_loop", "self", 12),
        ("transformers.trainer", "num_train_epochs", 12),
        ("mine", "self", None),
    ],
)
def test_the_epochs_that_a_trainer_plans(module: str, names: str, expected: int | None, tmp_path: Path):
    class Loop:
        def __init__(self) -> None:
            self.max_epochs = 12

    seen: list[int | None] = []
    value = Loop() if names == "self" else 12
    text = f"{names} = value\nreturn ask()"
    run(tmp_path, text, lambda: seen.append(trainer_epochs(caller())), value=value, __name__=module)
    assert seen == [expected]


CYCLE = "def cycle(data):\n    while True:\n        for batch in data:\n            yield batch\n"
COUNTED = "def cycle(data):\n    for epoch in count():\n        for batch in data:\n            yield batch\n"
LOGGED = "def logged(data):\n    for batch in data:\n        yield batch\n"
WRAPPED = "class Wrapped:\n    def __iter__(self):\n        return iter(data)\n"
AGAIN = """
class Again:
    def __init__(self):
        self.batches = iter([])
    def __next__(self):
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(data)
            return next(self.batches)
"""
COUNTED_LOOPS = {
    "a loop over the loader": ("for epoch in range(90):\n    for batch in data: pass", 90),
    "in a function": ("def learn():\n    for batch in data: pass\nfor epoch in range(90): learn()", 90),
    "in a condition": ("for epoch in range(90):\n    if epoch >= 0:\n        for batch in data: pass", 90),
    "of several phases": ("for epoch in range(90):\n    for phase in 'ab':\n        for batch in data: pass", 90),
    "a comprehension": ("for epoch in range(90):\n    losses = [\n        batch for batch in data\n    ]", 90),
    "through a generator": (LOGGED + "for epoch in range(90):\n    for batch in logged(data): pass", 90),
    "through an object": (WRAPPED + "for epoch in range(90):\n    for batch in Wrapped(): pass", 90),
    "an iterator of its own": ("for epoch in range(90):\n    batches = iter(data)\n    next(batches)", 90),
    "within a while": ("while True:\n    for epoch in range(90):\n        for batch in data: pass\n    break", 90),
    "an endless generator": (CYCLE + "batches = cycle(data)\nfor step in range(2000): next(batches)", None),
    "one that counts": (COUNTED + "batches = cycle(data)\nfor step in range(2000): next(batches)", None),
    "a generator by hand": ("batches = (b for b in data)\nfor step in range(2): next(batches)", None),
    "made anew": (
        "for step in range(9):\n    if step % 3 == 0:\n        batches = iter(data)\n    next(batches)",
        None,
    ),
    "made anew at an end": (AGAIN + "batches = Again()\nfor step in range(2000): next(batches)", None),
    "made for one batch": ("for step in range(2000): next(iter(data))", None),
    "a while of epochs": (
        "for run in range(3):\n    left = 9\n    while left:\n        left -= 1\n        for batch in data: pass",
        None,
    ),
}


@pytest.mark.parametrize("name", COUNTED_LOOPS)
def test_a_range_counts_epochs_only_where_each_is_a_pass(name: str, tmp_path: Path):
    text, expected = COUNTED_LOOPS[name]
    path = str(tmp_path / "loop.py")
    Path(path).write_text(text, encoding="utf-8")
    linecache.checkcache(path)
    seen: set[int | None] = set()

    class Data:
        def __iter__(self) -> Any:
            seen.add(planned_epochs(frames_of(path)))
            return iter([1, 2, 3])

    from itertools import count

    exec(compile(text, path, "exec"), {"data": Data(), "count": count, "__name__": "__main__"})
    assert seen == {expected}


def frames_of(path: str) -> list[FrameType]:
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == path:
            frames.append(frame)
        frame = frame.f_back
    return frames
