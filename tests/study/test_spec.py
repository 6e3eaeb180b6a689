"""A sweep's cells, and the axes that they follow from."""

import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.config import PITFALLS, Recipe
from onehour.recipes import digits, resnet50
from onehour.study.spec import SPEC, SweepSpec, arm_of, label_of, parse_arm, pitfall_arms, spec_of, table_arms

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


DIGITS = digits(classes=10)
TABLE = ["warmup=none", "warmup=constant", "scaling=fixed", "scaling=sqrt", "base_lr=0.1", "base_lr=0.4"]


def asked(
    arms: Sequence[str] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    seeds: range = range(2),
    at: Sequence[int] | None = None,
    recipe: Recipe = DIGITS,
) -> SweepSpec:
    return spec_of(recipe, sizes, seeds, arms, at)


def labels(spec: SweepSpec) -> list[str]:
    return [label_of(arm) for arm in spec.arms]


def test_the_default_is_the_papers_axis_and_its_tables_at_16_times_the_base():
    spec = spec_of(DIGITS, None, range(5), None, None)
    assert spec.minibatches == (32, 64, 128, 256, 512, 1024, 2048)
    assert spec.seeds == (0, 1, 2, 3, 4)
    assert spec.arms_at == (512,)
    assert labels(spec) == TABLE
    assert len(list(spec.cells())) == 7 * 5 + 6 * 5
    assert spec.recipe == DIGITS


def test_the_axis_of_imagenet_is_the_papers():
    spec = asked(["none"], recipe=resnet50(classes=1000))
    assert spec.minibatches == (256, 512, 1024, 2048, 4096, 8192, 16384)
    assert (spec.arms, spec.arms_at) == ((), ())


@pytest.mark.parametrize(("samples", "last", "at"), [(8192, 2048, 512), (600, 512, 512), (300, 256, 256), (32, 32, 32)])
def test_the_axis_ends_where_the_data_does_and_the_arms_stand_at_its_end(samples: int, last: int, at: int):
    spec = asked(["warmup=none"], recipe=DIGITS.replace(samples=samples))
    assert spec.minibatches[-1] == last
    assert spec.arms_at == (at,)


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["table"], TABLE),
        ([], TABLE),
        (["none"], []),
        (["pitfalls"], [*(f"pitfall={name}" for name in PITFALLS), "per_worker=512", "zero_gamma=false"]),
        (["warmup=none,constant", "scaling=sqrt"], ["warmup=none", "warmup=constant", "scaling=sqrt"]),
        (["table", "warmup=none", "none"], TABLE),  # nothing twice
        (["weight-decay=1e-3"], ["weight_decay=0.001"]),
        (["nesterov=false"], ["nesterov=false"]),
        (["milestones=8+16,12+20"], ["milestones=8+16", "milestones=12+20"]),
        (["base_minibatch=1k"], ["base_minibatch=1024"]),
    ],
)
def test_arms_by_word_and_by_value(arms: list[str], expected: list[str]):
    assert labels(asked(arms)) == expected


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["per_worker=4,8,16,32,64"], ["per_worker=4", "per_worker=8", "per_worker=32", "per_worker=64"]),
        (["warmup=gradual,none"], ["warmup=none"]),
        (["base_lr=0.2,0.20,2e-1"], []),
        (["zero_gamma=true"], []),
        (["milestones=8+16+64/3"], []),
    ],
)
def test_a_value_that_the_recipe_has_is_the_recipes_own_entry(arms: list[str], expected: list[str]):
    spec = asked(arms)
    assert labels(spec) == expected
    assert bool(spec.arms_at) == bool(expected)


def test_a_recipe_that_is_not_the_papers_has_other_arms():
    changed = DIGITS.replace(warmup="none", scaling="sqrt", base_lr=0.4, zero_gamma=False)
    table = ["warmup=constant", "warmup=gradual", "scaling=fixed", "scaling=linear", "base_lr=0.2", "base_lr=0.8"]
    assert labels(asked(["table"], recipe=changed)) == table
    assert labels(asked(["pitfalls"], recipe=changed))[-1] == "zero_gamma=true"


@pytest.mark.parametrize("at", [[48], [48, 512], [4096]])
def test_minibatches_of_the_arms_join_the_axis(at: list[int]):
    """So that an arm has its recipe's own entry beside it."""
    spec = asked(["warmup=none"], at=at)
    assert spec.minibatches == tuple(sorted({32, 64, 128, 256, 512, 1024, 2048, *at}))
    assert spec.arms_at == tuple(at)
    beside = {cell.recipe.minibatch for cell in spec.cells() if not cell.arm}
    assert {cell.recipe.minibatch for cell in spec.cells() if cell.arm} == set(at) <= beside


def test_minibatches_of_the_arms_are_left_out_where_there_is_no_arm():
    assert asked(["none"], at=[48]).minibatches == asked(["none"]).minibatches


def test_batchnorm_over_all_of_kn_is_over_all_of_the_arms_minibatch():
    assert "per_worker=256" in labels(asked(["pitfalls"], at=[256]))


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 64).map(lambda k: 16 * k), min_size=1, max_size=5, unique=True),
    at=st.lists(st.integers(1, 64).map(lambda k: 16 * k), min_size=1, max_size=3),
    seeds=st.integers(1, 4),
    first=st.integers(0, 9),
)
def test_any_axis_is_sorted_without_repetition_and_every_cell_is_there_once(
    sizes: list[int], at: list[int], seeds: int, first: int
):
    spec = asked(["warmup=none"], sizes=sizes, seeds=range(first, first + seeds), at=at)
    assert spec.minibatches == tuple(sorted({*sizes, *at}))
    assert spec.arms_at == tuple(sorted(set(at)))
    names = [cell.name for cell in spec.cells()]
    assert len(set(names)) == len(names) == seeds * (len(spec.minibatches) + len(spec.arms_at))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["warmpu=none"]}, "a recipe has no 'warmpu'; expected warmup"),
        ({"arms": ["warmup=nome"]}, "minibatch 512 with warmup=nome: warmup is 'nome'; expected none"),
        ({"arms": ["pitfall=warmup-per-epo"]}, "no pitfall is called 'warmup-per-epo'; expected warmup-per-epoch"),
        ({"arms": ["warmup"]}, r"--arm is 'warmup'; expected FIELD=VALUE\[,VALUE…\]"),
        ({"arms": ["warmup="]}, "--arm is 'warmup='"),
        ({"arms": ["warmup=none,"]}, "--arm is 'warmup=none,'"),
        ({"arms": ["tabel"]}, "--arm is 'tabel'"),
        ({"arms": [""]}, "--arm is ''"),
        ({"arms": ["base_lr=fast"]}, "base_lr must be a number, got 'fast'"),
        ({"arms": ["nesterov=no"]}, "nesterov must be true or false, got 'no'"),
        ({"arms": ["per_worker=many"]}, "'many' is not a size"),
        ({"arms": ["per_worker=24"]}, "minibatch 512 with per_worker=24: .* is not a multiple of per_worker 24"),
        ({"arms": ["base_lr=-1"]}, "minibatch 512 with base_lr=-1.0: base_lr must be"),
        ({"arms": ["reduce=canonical", "pitfalls"], "recipe": DIGITS.replace(reduce="canonical")}, "reduce canonical"),
        *(
            ({"arms": [f"{name}=1"]}, f"--arm cannot change {name}: an arm is one thing changed")
            for name in ("minibatch", "seed", "epochs", "model", "data", "samples", "classes", "name")
        ),
        ({"seeds": range(0)}, "--seeds is 0; expected at least 1"),
        ({"sizes": [32, 32]}, "minibatches holds a value twice: 32, 32"),
        ({"sizes": [100]}, "minibatch 100: minibatch 100 is not a multiple of per_worker 16"),
        ({"sizes": [32, 16384]}, "minibatch 16384 is larger than the data set of 8192 samples"),
        ({"arms": ["warmup=none"], "at": [16384]}, "minibatch 16384 with warmup=none: .* larger than the data set"),
        ({"arms": ["warmup=none"], "at": [40]}, "minibatch 40 with warmup=none: .* not a multiple of per_worker 16"),
        ({"recipe": DIGITS.replace(samples=48, minibatch=16, base_minibatch=64)}, "base minibatch 64 is larger than"),
    ],
)
def test_what_no_sweep_can_have_is_one_message(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as refused:
        asked(**options)
    assert len(str(refused.value).splitlines()) == 1
