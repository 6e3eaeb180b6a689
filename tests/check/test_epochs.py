"""Whether a loop around the data counts its epochs or its updates."""

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from onehour.check.observe.source import planned_epochs

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
LOOPS = {
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


@pytest.mark.parametrize("name", LOOPS)
def test_a_range_counts_epochs_only_where_each_is_a_pass(name: str, tmp_path: Path):
    text, expected = LOOPS[name]
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
