"""A tape travels as JSON, and drops what is too much."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from onehour.check import tape as tapes
from onehour.check.tape import (
    EVENTS,
    BackwardPass,
    EpochBegan,
    LossTerm,
    OptimizerSeen,
    ParameterGroup,
    SampleOrder,
    Tape,
    TapeEvent,
)

NESTED: list[TapeEvent] = [
    BackwardPass("t.py:4", terms=[LossTerm("mse_loss", "t.py:3", "sum", 8, 8.0, 1.0, 1.0)], before={"0": [0.5]}),
    OptimizerSeen("t.py:1", groups=[ParameterGroup(parameters=2)], decay=[[0.1, 0.2]]),
    EpochBegan("t.py:2", order=SampleOrder(count=4, digest="d")),
]


def test_every_kind_of_event_is_read_back_as_it_was(tmp_path: Path):
    tape = Tape()
    for event in [*(kind("t.py:9") for kind in EVENTS.values()), *NESTED]:
        tape.add(event)
    assert len(tape.events) > 20
    tape.save(tmp_path / "tape.json")
    assert Tape.load(tmp_path / "tape.json").events == tape.events
    assert [path.name for path in tmp_path.iterdir()] == ["tape.json"]


def test_every_kind_that_holds_other_dataclasses_is_among_them():
    inner = [name for name, kind in vars(tapes).items() if is_dataclass(kind) and name not in {*EVENTS, "Tape"}]
    assert sorted(inner) == ["LossTerm", "ParameterGroup", "SampleOrder"]
    types = {kind: " ".join(str(field.type) for field in fields(kind)) for kind in EVENTS.values()}
    holds = {kind for kind, text in types.items() if any(name in text for name in inner)}
    assert holds == {type(event) for event in NESTED}


def test_what_is_too_much_is_dropped_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tapes, "MOST_EVENTS", 2)
    tape = Tape()
    for event in NESTED:
        tape.add(event)
    assert tape.events == NESTED[:2]
    assert tape.full
