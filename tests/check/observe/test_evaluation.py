"""Numbering of the user's functions are told as they arise, with the line that made them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from onehour.check.observe.evaluation import CALLS, LINES, VariableTracer

TEXT = """def evaluate(start):
    correct = 1.0
    start()
    total = 4
    rate = correct / total
    percent = scaled(rate)
    return percent, 0.5


def scaled(value):
    factor = 100.0
    return value * factor
"""


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or coverage has the trace function")
def test_what_is_told(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(TEXT)
    told: list[tuple[str, float, str]] = []
    reading = VariableTracer(lambda name, value, place: told.append((name, value, place.rpartition(":")[2])))
    names: dict[str, Any] = {}
    exec(compile(TEXT, str(path), "exec"), names)
    names["evaluate"](lambda: reading.start([sys._getframe(1)]))
    reading.stop()
    assert sys.gettrace() is None
    assert ("evaluate:rate", 0.25, "5") in told
    assert ("scaled:factor", 100.0, "11") in told
    assert ("scaled() 0", 25.0, "12") in told
    assert ("evaluate:percent", 25.0, "6") in told
    assert ("evaluate() 0", 25.0, "7") in told
    assert ("evaluate() 1", 0.5, "7") in told
    assert not [entry for entry in told if entry[0] == "evaluate:correct"]  # it was known before


def test_a_debugger_is_left_alone():
    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        VariableTracer(lambda *told: None).start([])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_it_reads_a_little_while_only():
    told: list[str] = []
    reading = VariableTracer(lambda name, value, place: told.append(name))
    before = sys.gettrace()
    reading.start([])
    for _ in range(2 * LINES):
        round(1.5)
    reading.stop()
    reading.stop()
    sys.settrace(before)
    assert told == []
    assert CALLS > LINES
