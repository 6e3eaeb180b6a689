"""Arms in words, the question that each answers, and the paper's cost of the same change."""

import pytest

from onehour.config import PITFALLS, Recipe
from onehour.recipes import digits
from onehour.study.spec import Arm, label_of, pitfall_arms, table_arms
from onehour.study.text import group_of, paper_cost, plain_name

ARMS = [*table_arms(digits()), *pitfall_arms(digits(), 512)]


@pytest.mark.parametrize("arm", ARMS, ids=label_of)
def test_the_sweeps_own_arms_have_plain_names(arm: Arm):
    name = plain_name(arm, digits(), 512)
    assert "=" not in name
    assert "_" not in name
    assert len(name) < 42


def test_names_are_told_apart():
    assert len({plain_name(arm, digits(), 512) for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ((("base_lr", "0.1"),), "half the rate"),
        ((("base_lr", "0.4"),), "twice the rate"),
        ((("base_lr", "0.3"),), "1.5 times the rate"),
        ((("per_worker", "512"),), "BatchNorm over all of kn"),
        ((("per_worker", "8"),), "n = 8"),
        ((("momentum", "0.8"),), "momentum = 0.8"),
        ((("warmup", "none"), ("scaling", "sqrt")), "no warmup, the rate scaled by √k"),
        ((("arm", "plain torch"),), "plain torch"),
        ((), "the recipe"),
    ],
)
def test_names(arm: Arm, name: str):
    assert plain_name(arm, digits(), 512) == name


def test_questions():
    kinds = [group_of(arm, 512) for arm in ARMS]
    assert kinds == ["rate"] * 6 + ["pitfall"] * (len(PITFALLS) + 2)
    assert group_of((("per_worker", "8"),), 512) == "n"
    assert group_of((("warmup", "none"), ("base_lr", "0.4")), 512) == "rate"
    assert group_of((("warmup", "none"), ("momentum", "0.8")), 512) == "other"
    assert group_of((("arm", "plain torch"),), 512) == "other"


def test_the_papers_cost_needs_the_papers_own_recipe():
    assert paper_cost((("warmup", "none"),), Recipe()) == pytest.approx(24.84 - 23.74)
    assert paper_cost((("base_lr", "0.05"),), Recipe()) == pytest.approx(24.27 - 23.74)
    assert paper_cost((("warmup", "constant"),), Recipe(warmup="none")) is None
    assert paper_cost((("warmup", "none"),), None) is None
    assert paper_cost((("warmup", "none"), ("momentum", "0.8")), Recipe()) is None
