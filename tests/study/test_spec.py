"""A sweep's spec: its cells, its file, and what is refused before anything trains."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.config import PITFALLS, Recipe
from onehour.study.spec import SPEC, SweepSpec, arm_of, label_of, parse_arm, pitfall_arms, table_arms

studies = importlib.import_module("studies")
BASE: Recipe = studies.BASE


def spec(**changes: Any) -> SweepSpec:
    common: dict[str, Any] = {"recipe": BASE, "minibatches": (32, 512), "seeds": (0, 1)}
    return SweepSpec(**(common | changes))


def test_cells_are_every_minibatch_and_seed_and_every_arm_where_arms_are():
    arms = (*parse_arm("warmup=none,constant"), *parse_arm("per_worker=128"))
    cells = list(spec(arms=arms, arms_at=(256, 512)).cells())
    assert len(cells) == 2 * 2 + 3 * 2 * 2
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.name for cell in cells][:2] == ["32-s0", "32-s1"]
    assert cells[-1].name == "per_worker=128-512-s1"
    for cell in cells:
        assert arm_of(cell.recipe, BASE) == cell.arm


def test_a_cells_name_is_a_folders_name():
    (arm,) = parse_arm("optimizer=my.package:Class/../x")
    name = next(cell.name for cell in spec(arms=(arm,), arms_at=(512,)).cells() if cell.arm)
    assert name == "optimizer=my.package_Class_.._x-512-s0"
    assert "/" not in name


@settings(deadline=None)
@given(
    sizes=st.lists(st.sampled_from([32, 64, 128, 512]), min_size=1, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, unique=True, max_size=4),
    name=st.text(max_size=12),
)
def test_the_file_holds_all_of_it(sizes: list[int], seeds: list[int], name: str):
    arms = (*table_arms(BASE)[:2], *pitfall_arms(BASE, 512)[-2:])
    made = spec(recipe=BASE.replace(name=name), minibatches=tuple(sizes), seeds=tuple(seeds), arms=arms, arms_at=(512,))
    values = tomllib.loads(made.to_toml())
    assert values["minibatches"] == sizes
    assert values["arms"] == [label_of(arm) for arm in arms]
    assert Recipe.from_dict(values["recipe"]) == made.recipe


def test_what_is_written_is_read(tmp_path: Path):
    made = spec(arms=tuple(table_arms(BASE)), arms_at=(512,))
    made.write(tmp_path / "deep" / "sweep")
    assert SweepSpec.read(tmp_path / "deep" / "sweep") == made
    assert [path.name for path in (tmp_path / "deep" / "sweep").iterdir()] == [SPEC]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("minibatches = [32, 512]", "", "has no minibatches; it was written by a sweep: do not edit it"),
        ("[32, 512]", "[32, 33]", "not a multiple of per_worker"),
        ("[32, 512]", "[32, 32]", "minibatches holds a value twice: 32, 32"),
        ("[32, 512]", "32", "object is not iterable"),
        ("[32, 512]", "[]", "needs at least one minibatch and one seed"),
        ('"warmup=none"', '"warmth=none"', "warmup"),
        ('"warmup=none"', '"warmup=gradual"', "is what the recipe has already"),
        ("[recipe]", "[recip]", "has no recipe"),
        ("seeds =", "seeds", "Expected '='"),
        ("[recipe]", "[recipe", r"Expected '\]'"),
    ],
)
def test_a_file_edited_by_hand_is_named_with_what_is_wrong(tmp_path: Path, old: str, new: str, said: str):
    spec(arms=tuple(parse_arm("warmup=none")), arms_at=(512,)).write(tmp_path)
    path = tmp_path / SPEC
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as caught:
        SweepSpec.read(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("warmup", "expected FIELD=VALUE"),
        ("warmup=", "expected FIELD=VALUE"),
        ("warmup=none,", "expected FIELD=VALUE"),
        ("minibatch=64", "cannot change minibatch"),
        ("epochs=3", "cannot change epochs"),
        ("warmpu=none", "expected warmup"),
        ("zero_gamma=maybe", "must be true or false"),
        ("base_lr=fast", "must be a number"),
        ("per_worker=many", "is not a size"),
    ],
)
def test_what_is_no_arm_is_refused(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        parse_arm(text)


def test_arms_are_written_as_recipes_hold_them():
    assert parse_arm("base-lr=.1,1e-1") == [(("base_lr", "0.1"),), (("base_lr", "0.1"),)]
    assert parse_arm("per_worker=1k") == [(("per_worker", "1024"),)]
    assert parse_arm("milestones=8+64/3") == [(("milestones", "8+64/3"),)]
    assert spec().applied((("milestones", "8+64/3"),), 32, 0).milestones == ("8", "64/3")


def test_the_papers_arms_and_the_pitfalls_leave_out_what_the_recipe_has():
    assert [label_of(arm) for arm in table_arms(BASE)] == [
        *("warmup=none", "warmup=constant", "scaling=fixed", "scaling=sqrt", "base_lr=0.1", "base_lr=0.4")
    ]
    labels = [label_of(arm) for arm in pitfall_arms(BASE, 512)]
    assert labels == [*(f"pitfall={name}" for name in PITFALLS), "per_worker=512", "zero_gamma=false"]
    for arm in (*table_arms(BASE), *pitfall_arms(BASE, 512)):
        recipe = spec().applied(arm, 512, 3)
        assert arm_of(recipe, BASE) == arm
        assert (recipe.minibatch, recipe.seed) == (512, 3)


def test_a_cell_that_no_run_can_have_is_named():
    with pytest.raises(ValueError, match=r"minibatch 32 with per_worker=64: .* not a multiple"):
        spec(arms=tuple(parse_arm("per_worker=64")), arms_at=(32,))


def test_arms_and_where_they_are_belong_together():
    with pytest.raises(ValueError, match="arms and arms_at belong together"):
        spec(arms_at=(512,))
