"""What the files of a run's folder hold, so that one that was edited or damaged is one message wherever it is read."""

from __future__ import annotations

from typing import Any

from onehour.sidefile import COUNT, NUMBER, NUMBER_OR_NONE, PERCENT, TEXT, TEXT_OR_NONE, Kind

__all__ = ["ENVIRONMENT", "METRICS", "OUTCOME", "PARTS", "SUMMARY", "TIMING"]

PARTS = ("data", "compute", "reduction", "update")
"""Of an iteration, whose milliseconds steps_ms has."""


def _lists(value: Any) -> bool:
    return isinstance(value, list)


def _is_step(value: Any) -> bool:
    return _lists(value) and len(value) == len(PARTS) and all(map(NUMBER[1], value))


ERRORS: Kind = ("a list of errors in percent", lambda value: _lists(value) and all(map(PERCENT[1], value)))
STEPS: Kind = (f"lists of {len(PARTS)} numbers", lambda value: _lists(value) and all(map(_is_step, value)))
SESSIONS: Kind = (
    "a list of objects",
    lambda value: _lists(value) and value != [] and all(isinstance(session, dict) for session in value),
)
SEEDS: Kind = ("a whole number of at least 1", lambda value: COUNT[1](value) and value > 0)
SECONDS: Kind = ("a number of seconds", lambda value: value is None or (NUMBER[1](value) and value >= 0))

METRICS = {"epoch": NUMBER, "iteration": COUNT, "position": COUNT, "train_error": PERCENT, "top1_error": PERCENT}
"""Of a line; its losses may have left the finite numbers."""
TIMING = {"images": NUMBER, "seconds": NUMBER, "evaluate_seconds": NUMBER, "steps_ms": STEPS}
SUMMARY = {
    "outcome": TEXT,
    "final_error": NUMBER_OR_NONE,
    "last_errors": ERRORS,
    "images_per_second": NUMBER_OR_NONE,
    "seconds_training": SECONDS,
    "bottleneck": TEXT,
    "seeds_together": SEEDS,
}
OUTCOME = {"outcome": TEXT, "message": TEXT, "job": TEXT_OR_NONE}
ENVIRONMENT = {"sessions": SESSIONS}
