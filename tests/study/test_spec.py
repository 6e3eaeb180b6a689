"""A sweep's cells, the axes that they follow from, and arms as they are typed and in words."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.config import PITFALLS, Recipe
from onehour.recipes import digits, resnet50
from onehour.study.spec import (
    SPEC,
    Arm,
    SweepSpec,
    applied,
    arm_of,
    group_of,
    label_of,
    parse_arm,
    pitfall_arms,
    plain_name,
    spec_of,
    table_arms,
)

BASE: Recipe = studies.BASE
TABLE = ["warmup=none", "warmup=constant", "scaling=fixed", "scaling=sqrt", "base_lr=0.1", "base_lr=0.4"]
WRONG = [*(f"pitfall={name}" for name in PITFALLS), "per_worker=512", "zero_gamma=false"]
ARMS = [*table_arms(BASE), *pitfall_arms(BASE, 512)]


def spec(**changes: Any) -> SweepSpec:
    common: dict[str, Any] = {"recipe": BASE, "minibatches": (32, 512), "seeds": (0, 1)}
    return SweepSpec(**(common | changes))


def asked(
    arms: Sequence[str] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    seeds: range = range(2),
    at: Sequence[int] | None = None,
    recipe: Recipe = BASE,
) -> SweepSpec:
    return spec_of(recipe, sizes, seeds, arms, at)


def labels(spec: SweepSpec) -> list[str]:
    return [label_of(arm) for arm in spec.arms]


def test_cells_are_every_minibatch_and_seed_and_every_arm_where_arms_are():
    arms = (*parse_arm("warmup=none,constant"), *parse_arm("per_worker=128"))
    cells = list(spec(arms=arms, arms_at=(256, 512)).cells())
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 + 3 * 2 * 2
    assert [cell.name for cell in cells][:2] == ["32-s0", "32-s1"]
    assert cells[-1].name == "per_worker=128-512-s1"
    for cell in cells:
        assert arm_of(cell.recipe, BASE) == cell.arm


def test_a_cells_name_is_a_folders_name():
    (arm,) = parse_arm("optimizer=my.package:Class/../x")
    name = next(cell.name for cell in spec(arms=(arm,), arms_at=(512,)).cells() if cell.arm)
    assert name == "optimizer=my.package_Class_.._x-512-s0"


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
    with pytest.raises(ValueError, match=r"nowhere/sweep\.toml cannot be read: No such file or directory"):
        SweepSpec.read(Path("nowhere"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("minibatches = [32, 512]", "", "has no minibatches; it was written by a sweep: do not edit it"),
        ("[32, 512]", "[32, 33]", "not a multiple of per_worker"),
        ("[32, 512]", "[32, 32]", "minibatches holds a value twice: 32, 32"),
        ("[32, 512]", "32", "object is not iterable"),
        ("[32, 512]", "[]", "needs at least one minibatch and one seed"),
        ('"warmup=none"', '"warmth=none"', "warmup"),
        ('"warmup=none"', '"warmup=gradual"', "already is the recipe's value"),
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


def test_arms_are_written_as_recipes_hold_them():
    assert parse_arm("base-lr=.1,1e-1") == [(("base_lr", "0.1"),), (("base_lr", "0.1"),)]
    assert parse_arm("per_worker=1k") == [(("per_worker", "1024"),)]
    assert parse_arm("milestones=8+64/3") == [(("milestones", "8+64/3"),)]
    assert applied(BASE, (("milestones", "8+64/3"),), 32, 0).milestones == ("8", "64/3")


@pytest.mark.parametrize(
    ("own", "arm"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing=0.0"),
        ({"clip_norm": 1.0}, "clip_norm=none"),
        ({"freeze": ("fc.*",)}, "freeze="),
        ({"beta2": 0.95}, "beta2=0.999"),
    ],
)
def test_what_a_recipe_leaves_out_of_its_base_is_an_arm_too(own: dict[str, Any], arm: str):
    found = arm_of(BASE, BASE.replace(**own))
    assert label_of(found) == arm
    assert applied(BASE.replace(**own), found, 32, 0) == BASE


def test_the_square_root_rule_is_one_arm_where_betas_follow_it():
    base = BASE.replace(optimizer="adamw", scaling="fixed")
    assert label_of(arm_of(base.replace(scaling="sqrt"), base)) == "scaling=sqrt"


def test_the_papers_arms_and_the_pitfalls_leave_out_what_the_recipe_has():
    assert [label_of(arm) for arm in ARMS] == [*TABLE, *WRONG]
    for arm in ARMS:
        recipe = applied(BASE, arm, 512, 3)
        assert arm_of(recipe, BASE) == arm
        assert (recipe.minibatch, recipe.seed) == (512, 3)
        assert [arm] == parse_arm(label_of(arm))


def test_arms_and_where_they_are_belong_together():
    with pytest.raises(ValueError, match="arms and arms_at belong together"):
        spec(arms_at=(512,))


def test_the_default_is_the_papers_axis_and_its_tables_at_16_times_the_base():
    spec = asked(seeds=range(5))
    assert spec.minibatches == (32, 64, 128, 256, 512, 1024, 2048)
    assert spec.seeds == (0, 1, 2, 3, 4)
    assert spec.arms_at == (512,)
    assert labels(spec) == TABLE
    assert spec.reference_seeds == tuple(range(10))
    assert len(list(spec.cells())) == 7 * 5 + 5 + 6 * 5
    assert spec.recipe == BASE


def test_the_axis_of_imagenet_is_the_papers():
    spec = asked(["none"], recipe=resnet50(classes=1000))
    assert spec.minibatches == (256, 512, 1024, 2048, 4096, 8192, 16384)
    assert (spec.arms, spec.arms_at) == ((), ())


@pytest.mark.parametrize(("samples", "last", "at"), [(8192, 2048, 512), (600, 512, 512), (300, 256, 256), (32, 32, 32)])
def test_the_axis_ends_where_the_data_does_and_the_arms_stand_at_its_end(samples: int, last: int, at: int):
    spec = asked(["warmup=none"], recipe=BASE.replace(samples=samples))
    assert spec.minibatches[-1] == last
    assert spec.arms_at == (at,)


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (["table"], TABLE),
        ([], TABLE),
        (["none"], []),
        (["pitfalls"], WRONG),
        (["warmup=none,constant", "scaling=sqrt"], ["warmup=none", "warmup=constant", "scaling=sqrt"]),
        (["table", "warmup=none", "none"], TABLE),  # nothing twice
        (["weight-decay=1e-3"], ["weight_decay=0.001"]),
        (["nesterov=false"], ["nesterov=false"]),
        (["milestones=8+16,12+20"], ["milestones=8+16", "milestones=12+20"]),
        (["base_minibatch=1k"], ["base_minibatch=1024"]),
        # What the recipe has is the recipe's own entry.
        (["per_worker=4,8,16,32,64"], ["per_worker=4", "per_worker=8", "per_worker=32", "per_worker=64"]),
        (["warmup=gradual,none"], ["warmup=none"]),
        (["base_lr=0.2,0.20,2e-1"], []),
        (["zero_gamma=true"], []),
        (["milestones=8+16+64/3"], []),
    ],
)
def test_arms_by_word_and_by_value(arms: list[str], expected: list[str]):
    spec = asked(arms)
    assert labels(spec) == expected
    assert bool(spec.arms_at) == bool(expected)


def test_sizes_may_be_numpys_and_one_arm_a_text(tmp_path: Path):
    sizes: Any = np.array([32, 64])
    made = spec_of(BASE, sizes, range(1), "warmup=none", sizes[1:])
    assert (made.minibatches, made.arms_at, labels(made)) == ((32, 64), (64,), ["warmup=none"])
    made.write(tmp_path)
    assert SweepSpec.read(tmp_path) == made


def test_a_recipe_that_is_not_the_papers_has_other_arms():
    changed = BASE.replace(warmup="none", scaling="sqrt", base_lr=0.4, zero_gamma=False)
    table = ["warmup=constant", "warmup=gradual", "scaling=fixed", "scaling=linear", "base_lr=0.2", "base_lr=0.8"]
    assert labels(asked(["table"], recipe=changed)) == table
    assert labels(asked(["pitfalls"], recipe=changed))[-1] == "zero_gamma=true"
    assert "per_worker=256" in labels(asked(["pitfalls"], at=[256]))


@pytest.mark.parametrize(
    ("changes", "scalings"),
    [
        ({"scaling": "sqrt", "scale_betas": False}, ["fixed"]),
        ({"scaling": "sqrt", "scale_betas": False, "scale_adaptive": True}, ["fixed", "linear"]),
        ({"scaling": "fixed"}, []),  # √k with its betas leaves no average at 16 times the base
    ],
)
def test_scalings_that_an_optimizer_does_not_allow_are_no_arms_of_the_table(changes: dict[str, Any], scalings: list):
    recipe = BASE.replace(optimizer="adamw", base_lr=1e-3, **changes)
    found = labels(asked([], recipe=recipe))
    assert [label for label in found if "scaling" in label] == [f"scaling={kind}" for kind in scalings]
    with pytest.raises(ValueError, match="minibatch 100 is not a multiple"):
        asked([], recipe=recipe, at=[100])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 64).map(lambda k: 16 * k), min_size=1, max_size=5, unique=True) | st.none(),
    at=st.lists(st.integers(1, 64).map(lambda k: 16 * k), min_size=1, max_size=3),
    seeds=st.integers(1, 4),
    first=st.integers(0, 9),
)
def test_minibatches_of_the_arms_join_the_axis_and_every_cell_is_there_once(
    sizes: list[int] | None, at: list[int], seeds: int, first: int
):
    """So that an arm has its recipe's own entry beside it."""
    alone = asked(["none"], sizes=sizes, at=at).minibatches
    spec = asked(["warmup=none"], sizes=sizes, seeds=range(first, first + seeds), at=at)
    assert alone == tuple(sorted(sizes or (32, 64, 128, 256, 512, 1024, 2048)))
    assert spec.minibatches == tuple(sorted({*alone, *at}))
    assert spec.arms_at == tuple(sorted(set(at)))
    names = [cell.name for cell in spec.cells()]
    more = seeds * (len(spec.minibatches) > 1)  # of the reference
    assert len(set(names)) == len(names) == seeds * (len(spec.minibatches) + len(spec.arms_at)) + more


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ((32, 64), None, {32: 4, 64: 2}),
        ((32, 64), 7, {32: 7, 64: 2}),
        ((64, 128), None, {64: 4, 128: 2}),  # without the base the smallest is the reference
        ((16, 32), None, {16: 2, 32: 4}),
        ((64,), None, {64: 2}),  # nothing is compared with it
    ],
)
def test_the_reference_has_twice_the_seeds(sizes: tuple[int, ...], given: int | None, expected: dict[int, int]):
    made = spec_of(BASE, sizes, range(3, 5), ["none"], None, given)
    seeds = {size: [cell.recipe.seed for cell in made.cells() if cell.recipe.minibatch == size] for size in sizes}
    assert {size: len(found) for size, found in seeds.items()} == expected
    assert all(found == list(range(3, 3 + len(found))) for found in seeds.values())


def test_fewer_seeds_at_the_reference_are_refused():
    with pytest.raises(ValueError, match="--reference-seeds is 1; expected at least the 2 of --seeds"):
        spec_of(BASE, (32, 64), range(2), ["none"], None, 1)


def test_a_file_without_seeds_of_the_reference_has_none(tmp_path: Path):
    """As earlier versions wrote it."""
    spec().write(tmp_path)
    path = tmp_path / SPEC
    path.write_text(path.read_text().replace("reference_seeds = []\n", ""))
    assert SweepSpec.read(tmp_path) == spec()


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
        ({"arms": ["per_worker=64"], "at": [32]}, "minibatch 32 with per_worker=64: .* not a multiple"),
        ({"arms": ["base_lr=-1"]}, "minibatch 512 with base_lr=-1.0: base_lr must be"),
        ({"arms": ["reduce=canonical", "pitfalls"], "recipe": BASE.replace(reduce="canonical")}, "reduce canonical"),
        *(
            ({"arms": [f"{name}=1"]}, f"--arm cannot change {name}: an arm is one thing changed")
            for name in ("minibatch", "seed", "epochs", "model", "data", "samples", "classes", "name")
        ),
        ({"seeds": range(0)}, "--seeds is 0; expected at least 1"),
        ({"sizes": [32, 32]}, "minibatches holds a value twice: 32, 32"),
        ({"sizes": []}, "minibatches is empty"),
        ({"sizes": 64}, "minibatches must be a list of sizes, got 64"),
        ({"sizes": [64.5]}, "minibatches must be a whole number, got 64.5"),
        ({"sizes": [100]}, "minibatch 100: minibatch 100 is not a multiple of per_worker 16"),
        ({"sizes": [32, 16384]}, "minibatch 16384 is larger than the data set of 8192 samples"),
        ({"arms": ["warmup=none"], "at": [16384]}, "minibatch 16384 with warmup=none: .* larger than the data set"),
        ({"arms": ["warmup=none"], "at": [40]}, "minibatch 40 with warmup=none: .* not a multiple of per_worker 16"),
        ({"arms": ["pitfalls"], "at": [256, 512]}, "--arm pitfalls is measured at one minibatch"),
        ({"recipe": BASE.replace(samples=48, minibatch=16, base_minibatch=64)}, "base minibatch 64 is larger than"),
    ],
)
def test_what_no_sweep_can_have_is_one_message(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as refused:
        asked(**options)
    assert len(str(refused.value).splitlines()) == 1


def test_the_sweeps_own_arms_have_plain_names():
    names = [plain_name(arm, BASE, 512) for arm in ARMS]
    assert len(set(names)) == len(ARMS)
    assert not [name for name in names if "=" in name or "_" in name or len(name) > 41]


@pytest.mark.parametrize(
    ("arm", "name", "group"),
    [
        ((("base_lr", "0.1"),), "half the rate", "rate"),
        ((("base_lr", "0.4"),), "twice the rate", "rate"),
        ((("base_lr", "0.3"),), "1.5 times the rate", "rate"),
        ((("per_worker", "512"),), "BatchNorm over all of kn", "pitfall"),
        ((("per_worker", "8"),), "n = 8", "n"),
        ((("momentum", "0.8"),), "momentum = 0.8", "other"),
        ((("warmup", "none"), ("scaling", "sqrt")), "no warmup, the rate scaled by √k", "rate"),
        ((("warmup", "none"), ("momentum", "0.8")), "no warmup, momentum = 0.8", "other"),
        ((("arm", "plain torch"),), "plain torch", "other"),
        ((), "the recipe", "other"),
    ],
)
def test_names_and_questions(arm: Arm, name: str, group: str):
    assert (plain_name(arm, digits(), 512), group_of(arm, 512)) == (name, group)
