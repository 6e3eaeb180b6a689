"""The velocity when the rate changes, judged from what was recorded of it."""

from typing import Any

import pytest

from onehour.check.case import Case
from onehour.check.pitfalls import judge
from onehour.check.story import Story
from onehour.check.tape import OptimizerSeen, OptimizerStep, ParameterGroup, Tape


def found(form: str, steps: list[dict[str, Any]]) -> dict[str, str]:
    tape = Tape()
    groups = [ParameterGroup(momentum=0.9, parameters=1)]
    kind = {"form": form, "velocity": ["v"] if form == "inside" else [], "adaptive": False, "decay": []}
    tape.add(OptimizerSeen("train.py:1", optimizer=0, groups=groups, **kind))
    for step in steps:
        tape.add(OptimizerStep("train.py:9", **step))
    return {finding.pitfall: finding.measured for finding in judge(Case([Story(tape)]))}


def ramp(scaled: float) -> list[dict[str, Any]]:
    """Rates 0.1, 0.2, 0.4, 0.8; the velocity is multiplied by `scaled` where the rate doubles."""
    rates = [0.1 * 2**t for t in range(4)]
    return [{"rates": [rate], "kept": {"v": scaled}, "off": [0.0, 0.25]} for rate in rates]


@pytest.mark.parametrize(
    ("form", "scaled", "expected"),
    [
        ("outside", 1.0, []),
        ("outside", 2.0, ["momentum-outside-corrected"]),
        ("inside", 2.0, []),
        ("inside", 1.0, ["momentum-inside-uncorrected"]),
        ("inside", 1.5, []),  # someone does something else
    ],
)
def test_both_forms(form: str, scaled: float, expected: list[str]):
    assert list(found(form, ramp(scaled))) == expected


def test_the_numbers():
    said = found("inside", ramp(1.0))["momentum-inside-uncorrected"]
    assert said == "velocity × 1 as the rate went from 0.1 to 0.2; that update lies 25 % from eq 10"
    said = found("outside", [{**step, "off": [0.5, 0.0]} for step in ramp(2.0)])["momentum-outside-corrected"]
    assert said == "velocity × 2 as the rate went from 0.1 to 0.2; that update lies 50 % from eq 9"


def test_a_coefficient_that_is_scaled_for_a_step():
    """Horovod's way: m·η′/η in the step that changes the rate."""
    steps = ramp(1.0)
    for index, step in enumerate(steps):
        step["momenta"] = [1.8 if index else 0.9]
    assert found("outside", steps)["momentum-outside-corrected"].startswith("momentum × 2 as the rate went")


def test_a_policy_that_cycles_the_momentum_is_no_correction():
    """It meets the ratio of the rates once, by chance."""
    steps = ramp(1.0)
    for step, momentum in zip(steps, (0.95, 0.9, 1.8, 0.85), strict=True):
        step["momenta"] = [momentum]
    assert found("outside", steps) == {}


def test_without_a_form_nothing_is_claimed():
    assert found("", ramp(2.0)) == {}
