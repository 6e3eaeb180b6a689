"""What a person asks of a sweep, and the cells that follow: the paper's axis and tables where nothing is asked."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour import Recipe
from onehour.config import PITFALLS
from onehour.recipes import digits, resnet50
from onehour.study.axes import spec_of
from onehour.study.spec import SweepSpec, label_of

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
