"""Every rule takes a number whatever holds it, and refuses what is none by its name and the value received."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from onehour.config import Recipe
from onehour.rules.aggregate import global_mean
from onehour.rules.arguments import fraction, not_negative, positive, positive_int, whole_number
from onehour.rules.batchnorm import GHOSTS, convert_batchnorm
from onehour.rules.decay import parameter_groups
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch, fixed_scaling, linear_scaling, sqrt_scaling
from onehour.rules.schedule import constant_warmup, cosine_decay, gradual_warmup, scaled_step_schedule, step_decay
from onehour.rules.scheduler import ScheduleLR
from onehour.rules.shuffle import SampleStream

Rule = Callable[[Any], Any]
USUAL = step_decay(3.2, [30])
SCALINGS = (linear_scaling, sqrt_scaling, fixed_scaling)


def whole(**changes: Any) -> Any:
    """The paper's schedule at 8k."""
    given: dict[str, Any] = {"base_lr": 0.1, "base_minibatch": 256, "minibatch": 8192, "milestones": [30]}
    given |= {"warmup_epochs": 5, **changes}
    return scaled_step_schedule(**given)


def scheduled(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"samples": 1000, "minibatch": 96}
    return ScheduleLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), USUAL, **(sizes | changes)).get_last_lr()


ABOVE_ZERO: list[tuple[str, Rule]] = [
    *[("base_lr", lambda x, scaling=scaling: scaling(x, 256, 1024)) for scaling in SCALINGS],
    ("base_lr", lambda x: whole(base_lr=x)(7)),
    ("lr", lambda x: step_decay(x, [30])(31)),
    ("factor", lambda x: step_decay(0.1, [30], x)(31)),
    ("factor", lambda x: whole(factor=x)(31)),
    ("lr", lambda x: cosine_decay(x, 90)(1)),
    ("epochs", lambda x: cosine_decay(0.1, x)(0.25)),
    ("epochs", lambda x: Minibatch(32, 8).iterations(1000, x)),
    ("epochs", lambda x: gradual_warmup(USUAL, 0.1, x)(0.25)),
    ("epochs", lambda x: constant_warmup(USUAL, 0.1, x)(0.25)),
]
FROM_ZERO: list[tuple[str, Rule]] = [
    ("start_lr", lambda x: gradual_warmup(USUAL, x, 5)(0)),
    ("start_lr", lambda x: constant_warmup(USUAL, x, 5)(0)),
    ("warmup_epochs", lambda x: whole(warmup_epochs=x)(0.25)),
    ("weight_decay", lambda x: parameter_groups(nn.Linear(2, 2), weight_decay=x)[0]["weight_decay"]),
]
SEVERAL: list[Rule] = [
    lambda x: step_decay(3.2, [x(1.5), x(2.5)])(2),
    lambda x: Recipe(base_lr=x(0.5), momentum=x(0.5), weight_decay=x(0.5), warmup_epochs=x(2.5)).to_toml(),
]
COUNTS: list[tuple[str, Rule]] = [
    *[("base_minibatch", lambda x, scaling=scaling: scaling(0.1, x, 64)) for scaling in SCALINGS],
    *[("minibatch", lambda x, scaling=scaling: scaling(0.1, 256, x)) for scaling in SCALINGS],
    ("base_minibatch", lambda x: whole(base_minibatch=x)),
    ("minibatch", lambda x: whole(minibatch=x)),
    ("per_worker", lambda x: Minibatch(x, 8)),
    ("workers", lambda x: Minibatch(32, x)),
    ("minibatch", lambda x: Minibatch.of(x, 1)),
    ("per_worker", lambda x: Minibatch.of(256, x)),
    ("samples", lambda x: Minibatch(32, 8).iterations(x, 3)),
    ("samples", lambda x: SampleStream(samples=x, minibatch=1, seed=0).indices(0).tolist()),
    ("minibatch", lambda x: global_mean(6.0, x)),
    ("samples", lambda x: scheduled(samples=x)),
    ("minibatch", lambda x: scheduled(minibatch=x)),
    *[("per_worker", lambda x, kind=kind: repr(kind(3, per_worker=x))) for kind in GHOSTS.values()],
    ("per_worker", lambda x: repr(convert_batchnorm(nn.BatchNorm2d(3), per_worker=x))),
]
WHOLE: list[tuple[str, Rule]] = [
    ("seed", lambda x: seed_for(x, "sample")),
    ("key", lambda x: seed_for(0, "sample", x)),
    ("seed", lambda x: SampleStream(samples=64, minibatch=8, seed=x).indices(0).tolist()),
    ("iteration", lambda x: SampleStream(samples=64, minibatch=8, seed=0).indices(x).tolist()),
]

HOLDERS = [
    *(np.float64, np.float32, np.float16, np.array, torch.tensor, Fraction),
    *(lambda value: np.array(value, np.float32), lambda value: torch.tensor(value, dtype=torch.float64)),
]
NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, -1e-300, True, "1", None, [1], 1j, np.float32("nan"), Decimal("0.5")]
NO_NUMBERS += [np.True_, np.array(True), torch.tensor(True), np.zeros(2), torch.zeros(1), torch.tensor(-1.0), b"1"]
NOT_WHOLE = [1.0, 2.5, math.nan, True, False, "8", None, 1j, [1]]
NOT_WHOLE += [np.float64(8), torch.tensor(8.0), np.ones(2), np.True_]


def refused(name: str, rule: Rule, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as error:
        rule(value)
    assert "\n" not in str(error.value)
    assert " ".join(repr(value).split()) in str(error.value)


@pytest.mark.parametrize(("name", "rule"), [*ABOVE_ZERO, *FROM_ZERO])
def test_a_rule_takes_a_finite_number_and_refuses_all_else(name: str, rule: Rule):
    for holder in HOLDERS:
        found, expected = rule(holder(0.5)), rule(0.5)
        assert (found, type(found)) == (expected, type(expected))
    for value in NO_NUMBERS:
        refused(name, rule, value)


@pytest.mark.parametrize("rule", SEVERAL)
def test_so_does_what_takes_several(rule: Rule):
    for holder in HOLDERS:
        assert rule(holder) == rule(float)
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=r"must be|is not an epoch") as error:
            rule(lambda _, value=value: value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "rule"), ABOVE_ZERO)
def test_zero_is_refused_where_it_makes_no_sense(name: str, rule: Rule):
    for zero in (0, 0.0, -0.0, np.float32(0)):
        refused(name, rule, zero)


@pytest.mark.parametrize(("name", "rule"), FROM_ZERO)
def test_zero_is_taken_elsewhere(name: str, rule: Rule):
    assert isinstance(rule(0), int | float)


@pytest.mark.parametrize(("name", "rule"), [*COUNTS, *WHOLE])
def test_a_rule_takes_a_whole_number_and_refuses_all_else(name: str, rule: Rule):
    for holder in (np.int64, np.int16, np.array, torch.tensor):
        assert repr(rule(holder(2))) == repr(rule(2))
    for value in NOT_WHOLE:
        refused(name, rule, value)


@pytest.mark.parametrize(("name", "rule"), COUNTS)
def test_a_count_is_above_zero(name: str, rule: Rule):
    for value in (0, -1, np.int64(0)):
        refused(name, rule, value)


def test_what_is_taken_is_a_plain_number():
    for check in (not_negative, positive, partial(fraction, upper=1)):
        assert all(type(check("x", holder(0.5))) is float for holder in HOLDERS)
    for check in (positive_int, whole_number, positive):
        assert all(type(check("x", holder(3))) is int for holder in (int, np.int64, np.uint8, np.array, torch.tensor))
    assert positive_int("x", 2**80) == 2**80
    for value in (0, 0.0, 1, 1e-300, 1e300):
        assert not_negative("x", value) is value


@pytest.mark.parametrize(("value", "allowed"), [(0, True), (0.999, True), (1, False), (1.5, False)])
def test_fraction_holds_its_upper_bound_out(value: float, allowed: bool):
    if allowed:
        assert fraction("momentum", value, upper=1) == value
        return
    with pytest.raises(ValueError, match="momentum must be below 1, got "):
        fraction("momentum", value, upper=1)
