"""Refusals name what was refused and the value received."""

import math

import numpy as np
import pytest

from onehour.rules.checks import fraction, not_negative, positive, positive_int

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


@pytest.mark.parametrize("value", [0, 0.0, 1, 1e-300, 1e300, np.float64(0.5)])
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
