"""Refusals name what was refused and the value received."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from onehour.config import Recipe
from onehour.rules.aggregate import global_mean
from onehour.rules.checks import fraction, not_negative, positive, positive_int, whole_number
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import Minibatch, fixed_scaling, linear_scaling, sqrt_scaling
from onehour.rules.schedule import constant_warmup, cosine_decay, gradual_warmup, step_decay
from onehour.rules.shuffle import SampleStream

NO_NUMBERS = [math.nan, math.inf, -math.inf, -1, -1e-300, True, "1", None, [1], 1j]


@pytest.mark.parametrize("value", [1, 7, 2**80, np.int64(3)])
def test_positive_int_returns_whole_numbers_above_zero(value):
    assert positive_int("x", value) == value
    assert type(positive_int("x", value)) is int


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "1", None, True, False, math.nan, [1]])
def test_positive_int_refuses_all_else_and_names_it(value):
    with pytest.raises(ValueError, match=r"^samples must be .*, got ") as error:
        positive_int("samples", value)
    assert repr(value) in str(error.value)


HOLDERS = [
    *(np.float64, np.float32, np.float16, np.array, torch.tensor, Fraction),
    *(lambda value: np.array(value, np.float32), lambda value: torch.tensor(value, dtype=torch.float64)),
]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_number_is_a_plain_one_whatever_holds_it(holder):
    for check in (not_negative, positive, lambda name, value: fraction(name, value, upper=1)):
        assert check("x", holder(0.5)) == 0.5
        assert type(check("x", holder(0.5))) is float


@pytest.mark.parametrize("holder", [np.int64, np.uint8, np.array, torch.tensor])
def test_a_whole_number_is_a_plain_one_whatever_holds_it(holder):
    for check in (positive_int, whole_number, positive):
        assert check("x", holder(3)) == 3
        assert type(check("x", holder(3))) is int


@pytest.mark.parametrize(
    "value",
    [
        np.True_,
        np.array(True),
        torch.tensor(True),
        np.zeros(2),
        torch.zeros(1),
        np.array("1"),
        Decimal("0.5"),
        b"1",
        1j,
    ],
)
@pytest.mark.parametrize("check", [positive_int, whole_number, positive])
def test_what_holds_no_number_is_one_line(check, value):
    with pytest.raises(ValueError, match=r"^lr must be a (whole )?number, got ") as error:
        check("lr", value)
    assert "\n" not in str(error.value)


RULES = [
    lambda x: linear_scaling(x(0.5), 256, 8192),
    lambda x: sqrt_scaling(x(0.5), 256, 1024),
    lambda x: fixed_scaling(x(0.5), 256, 1024),
    lambda x: step_decay(x(0.5), [x(1.5), x(2.5)], x(0.5))(2),
    lambda x: cosine_decay(x(0.5), x(2.5))(1),
    lambda x: gradual_warmup(step_decay(3.2, [30]), x(0.5), x(2.5))(1),
    lambda x: constant_warmup(step_decay(3.2, [30]), x(0.5), x(2.5))(1),
    lambda x: Recipe(base_lr=x(0.5), momentum=x(0.5), weight_decay=x(0.5), warmup_epochs=x(2.5)).to_toml(),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_every_rule_takes_it(rule, holder):
    found, expected = rule(holder), rule(float)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "wrong", [math.nan, math.inf, -1.0, True, "x", None, 1j, np.float32("nan"), torch.tensor(-1.0)]
)
def test_every_rule_refuses_what_is_none_in_one_line(rule, wrong):
    with pytest.raises(ValueError, match=r"must be|is not an epoch") as error:
        rule(lambda value: wrong)
    assert "\n" not in str(error.value)


WHOLE = [
    lambda x: linear_scaling(0.1, x(256), x(8192)),
    lambda x: Minibatch(x(32), x(8)),
    lambda x: Minibatch.of(x(256), x(32)),
    lambda x: Minibatch(32, 8).iterations(x(1000), x(3)),
    lambda x: SampleStream(samples=x(64), minibatch=x(8), seed=x(3)).indices(x(2), x(0)).tolist(),
    lambda x: seed_for(x(3), "sample", x(5)),
    lambda x: global_mean(6.0, x(6)),
    lambda x: Recipe(minibatch=x(256), per_worker=x(32), epochs=x(90), seed=x(3), classes=x(7)).to_toml(),
]


@pytest.mark.parametrize("rule", WHOLE)
@pytest.mark.parametrize("holder", [np.int64, np.int16, np.array, torch.tensor])
def test_every_count_may_be_held_by_anything(rule, holder):
    found, expected = rule(holder), rule(int)
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("rule", WHOLE)
@pytest.mark.parametrize("wrong", [2.5, 2.0, True, "8", None, math.nan, np.float64(8), torch.tensor(8.0), np.ones(2)])
def test_every_count_refuses_what_is_no_whole_number(rule, wrong):
    with pytest.raises(ValueError, match="must be a whole number, got") as error:
        rule(lambda value: wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1e-300, 1e300])
def test_not_negative_returns_the_value_itself(value):
    assert not_negative("x", value) is value


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("check", [not_negative, positive, lambda name, value: fraction(name, value, upper=1)])
def test_numbers_that_are_none_are_refused_by_name_and_value(check, value):
    with pytest.raises(ValueError, match=r"^lr must be ") as error:
        check("lr", value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, 0.0, -0.0])
def test_positive_refuses_zero(value):
    with pytest.raises(ValueError, match="lr must be above zero, got "):
        positive("lr", value)


@pytest.mark.parametrize(("value", "allowed"), [(0, True), (0.999, True), (1, False), (1.5, False)])
def test_fraction_holds_its_upper_bound_out(value, allowed):
    if allowed:
        assert fraction("momentum", value, upper=1) == value
        return
    with pytest.raises(ValueError, match="momentum must be below 1, got "):
        fraction("momentum", value, upper=1)
