"""Parameters chosen by their names: what a pattern stands for, and what is near one that stands for nothing."""

import pytest

from onehour.rules.names import match_names

NAMES = ["stem.conv.weight", "stem.bn.weight", "stem.bn.bias", "layer1.0.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("steam.*", "stem.*"), ("layer2.*", "layer1.*"), ("head.wieght", "head.weight")],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern: str, near: str):
    with pytest.raises(ValueError, match="matches no parameter; near it are") as refused:
        match_names(["stem.*", pattern], NAMES, what="freeze", of="parameter")
    assert near in str(refused.value)
    assert str(refused.value).count(",") == 2  # three names, however many there are


def test_a_pattern_is_a_whole_name():
    found = match_names(["stem.*", "*.bias", "head"], [*NAMES, "head"], what="", of="")
    assert found == {"stem.*": NAMES[:3], "*.bias": ["stem.bn.bias", "head.bias"], "head": ["head"]}
