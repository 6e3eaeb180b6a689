"""A recipe is checked when it is built: every value that no run can have is one ValueError that names it."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehour.config import ADAPTIVE, Recipe
from onehour.rules.adam import adam_scaling
from onehour.training.record import Run, differences

NAN, INF = math.nan, math.inf

# Each is said with its name.
VALUES: list[tuple[str, list[Any]]] = [
    *(("minibatch", [0, -256, "8k", None, True]), ("per_worker", [0, 2.5]), ("base_minibatch", [0])),
    *(("samples", [0, 1e6]), ("classes", [0, -1]), ("epochs", [0, -1.5, INF]), ("image_size", [0])),
    *(("test_resize", [2.5]), ("mixup", [-0.2]), ("cutmix", [NAN]), ("label_smoothing", [-0.1])),
    *(("base_lr", [0, -0.1, NAN, INF, "0.1", True]), ("momentum", [-0.1, NAN]), ("weight_decay", [-1e-4, INF])),
    *(("clip_norm", [0, INF]), ("freeze", [3]), ("decay_factor", [0]), ("warmup_epochs", [-1, NAN])),
    *(("scaling", [None]), ("optimizer", [3]), ("nesterov", [1]), ("compile", ["yes"]), ("channels_last", [None])),
    *(("zero_gamma", [0]), ("scale_adaptive", ["no"]), ("seed", [0.5, True, "0"])),
    *(("name", [3]), ("model", [None]), ("data", [b"x"]), ("task", [3]), ("collate", [3]), ("pitfall", [3])),
    *(("ramp", [5]), ("warmup_epochs", [10**400]), ("base_lr", [10**400])),
]
# (changes, what the message must say)
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    *(({name: value}, [name, repr(value)]) for name, values in VALUES for value in values),
    ({"minibatch": 256.0}, ["minibatch", "whole", "256.0"]),
    ({"minibatch": 100}, ["minibatch 100", "per_worker 32", "96 or 128"]),
    ({"minibatch": 16}, ["minibatch 16", "per_worker 32", "32"]),
    ({"minibatch": 1024, "samples": 1000}, ["minibatch 1024", "1000 samples", "at most 1000"]),
    ({"canonical_pass": 0}, ["canonical_pass", "0"]),
    ({"reduce": "canonical", "canonical_pass": 3}, ["canonical_pass 3 must divide k = 8", "minibatch 256"]),
    (
        {"reduce": "canonical", "canonical_pass": 4, "minibatch": 512, "ramp": ("64:8",)},
        ["canonical_pass 4 must divide k = 2", "minibatch 64"],
    ),
    ({"reduce": "canonical", "canonical_pass": 2, "batchnorm": "keep"}, ["batchnorm keep takes one worker a pass"]),
    ({"random_erasing": 1.5}, ["random_erasing", "at most 1", "1.5"]),
    ({"mixup": 0.2, "per_worker": 1}, ["mixup", "per_worker", "at least 2, got 1"]),
    ({"label_smoothing": 1}, ["label_smoothing", "below 1", "1"]),
    ({"momentum": 1}, ["momentum", "below 1", "1"]),
    ({"momentum": 0}, ["nesterov", "momentum"]),
    ({"ema": 1}, ["ema", "below 1"]),
    ({"ema": 0}, ["ema", "above zero"]),
    ({"freeze": "stem.*"}, ["freeze", "list", "'stem.*'"]),
    ({"freeze": ["stem.*", 3]}, ["freeze", "3"]),
    ({"layer_rates": ["stem.*"]}, ["layer_rates", "'stem.*'", "stem.*=0.1"]),
    ({"layer_rates": {"stem.*": 0}}, ["layer_rates", "'stem.*=0'", "above zero"]),
    ({"layer_rates": {"stem.*": "fast"}}, ["layer_rates", "'stem.*=fast'"]),
    ({"layer_rates": ["=2"]}, ["layer_rates", "'=2'"]),
    ({"layer_rates": ["a=1", "a=2"]}, ["layer_rates", "a twice"]),
    ({"warmup_epochs": 91}, ["warmup_epochs 91", "90 epochs"]),
    ({"milestones": ("60", "30")}, ["milestones", "60", "30"]),
    ({"milestones": ("30", "30")}, ["milestones", "30"]),
    ({"milestones": ("0",)}, ["milestones", "0"]),
    ({"milestones": ("x",)}, ["milestone", "'x'"]),
    ({"milestones": (NAN,)}, ["milestone", "nan"]),
    ({"milestones": "36"}, ["milestone", "36"]),
    ({"milestones": ("1e400",)}, ["milestone", "1e400"]),
    ({"decay_factor": 1e200}, ["0.1", "factor 1e+200", "3 milestones", "not finite"]),
    ({"epochs": 1e308, "milestones": ("30",)}, ["epochs 1e+308", "2**53 images"]),
    *(({name: 10**400}, [name, "401 digits", "2**53"]) for name in ("minibatch", "base_minibatch", "samples")),
    ({"milestones": 30}, ["milestone", "30"]),
    ({"milestones": None}, ["milestone", "None"]),
    ({"scaling": "liner"}, ["scaling", "'liner'", "linear"]),
    ({"decay": "exp"}, ["decay", "'exp'", "one of step, cosine"]),
    ({"warmup": "gradul"}, ["warmup", "'gradul'", "gradual"]),
    ({"precision": "bf61"}, ["precision", "'bf61'", "bf16"]),
    ({"precision": "fp16"}, ["precision fp16", "loss scaling", "bf16"]),
    ({"optimizer": "sdg"}, ["optimizer", "'sdg'", "sgd"]),
    ({"minibach": 256}, ["'minibach'", "expected minibatch"]),
    ({"batch_size": 256}, ["'batch_size'", "expected"]),
]


def said(error: pytest.ExceptionInfo[ValueError], fragments: list[str]) -> bool:
    return all(fragment in str(error.value) for fragment in fragments)


@pytest.mark.parametrize(("changes", "fragments"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_value_that_no_run_can_have_is_refused_by_name_in_one_line(changes, fragments):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        Recipe().replace(**changes)
    assert said(error, fragments)


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_linear_scaling_of_an_adaptive_optimizer_is_refused_unless_insisted_on(optimizer):
    with pytest.raises(ValueError, match=f"linear scaling does not hold for {optimizer}.*sqrt.*scale_adaptive"):
        Recipe(optimizer=optimizer, minibatch=512)
    assert Recipe(optimizer=optimizer, minibatch=512, scale_adaptive=True).target_lr == 0.2
    assert Recipe(optimizer=optimizer, minibatch=512, scaling="fixed").target_lr == 0.1
    assert Recipe(optimizer=optimizer, minibatch=1024, scaling="sqrt").target_lr == 0.2
    assert Recipe(optimizer=optimizer, minibatch=256).target_lr == 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0, "nesterov": False},
        {"random_erasing": 1, "label_smoothing": 0, "mixup": 8},
        {"momentum": 0, "optimizer": "adam"},
        {"warmup_epochs": 91, "warmup": "none"},
        {"warmup_epochs": 0},
        {"weight_decay": 0},
        {"milestones": ()},
        {"milestones": (8, 16.5, "64/3")},
        {"minibatch": 1024, "samples": 1024},
        {"seed": -(2**70)},
        {"optimizer": "my.package:Lion"},
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_a_run_can_have_are_taken(changes):
    for name, value in changes.items():
        taken = getattr(Recipe(**changes), name)
        assert taken == (tuple(str(m) for m in ("8", "33/2", "64/3")) if value == (8, 16.5, "64/3") else value)


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().minibatch = 512  # type: ignore[misc]


def test_recipes_with_the_same_values_are_equal_and_hash_alike():
    assert Recipe(milestones=(30, 60, 80)) == Recipe()  # type: ignore[arg-type]
    assert hash(Recipe(seed=1)) == hash(Recipe(seed=1))
    assert Recipe(seed=1) != Recipe(seed=2)


@pytest.mark.parametrize(
    ("changes", "epoch", "rate"),
    [
        ({"minibatch": 8192}, 0, 0.1),
        ({"minibatch": 8192}, 2.5, 1.65),
        ({"minibatch": 8192}, 5, 3.2),
        ({"minibatch": 8192}, 80, 0.0032),
        ({"minibatch": 8192, "warmup": "constant"}, 4.99, 0.1),
        ({"minibatch": 8192, "warmup": "none"}, 0, 3.2),
        ({"minibatch": 8192, "warmup_epochs": 0}, 0, 3.2),
        ({"minibatch": 8192, "decay": "cosine"}, 45, 1.6),
        ({"minibatch": 256}, 0, 0.1),
        ({"minibatch": 128}, 0, 0.05),
        ({"minibatch": 8192, "scaling": "fixed"}, 0, 0.1),
    ],
)
def test_the_schedule_follows_from_the_recipe(changes, epoch, rate):
    assert Recipe(**changes).schedule(epoch) == pytest.approx(rate, rel=1e-12)


RECIPES = st.builds(
    Recipe,
    name=st.text(),
    model=st.text(),
    data=st.text(),
    samples=st.none() | st.integers(10**6, 2**45),
    classes=st.none() | st.integers(1, 2**53 - 1),
    minibatch=st.integers(1, 1000).map(lambda k: 32 * k),
    base_lr=st.floats(1e-300, 1e300),
    momentum=st.floats(1e-300, 1, exclude_max=True),
    weight_decay=st.floats(0, 1e300) | st.integers(0, 3),
    decay_factor=st.floats(1e-300, 1),
    milestones=st.sets(st.fractions(min_value="1/1000", max_value=10**6)).map(
        lambda epochs: tuple(str(epoch) for epoch in sorted(epochs))
    ),
    warmup=st.sampled_from(["gradual", "constant", "none"]),
    warmup_epochs=st.integers(0, 90),
    freeze=st.lists(st.text(min_size=1), max_size=2),
    layer_rates=st.dictionaries(st.text(min_size=1), st.floats(1e-300, 1e300), max_size=2),
    precision=st.sampled_from(["float32", "bf16", "float64"]),
    zero_gamma=st.booleans(),
    compile=st.booleans(),
    seed=st.integers(),
)
ODD = [
    *("😀 ∞ é", 'a "quote" \\ and \\u0041', "\x00\x01\x1f\x7f\x80\x85"),
    *("\ttab\nline\r\nreturn\r", "\u2028\ufeff", "'''"),
]


@given(RECIPES)
def test_a_recipe_survives_toml_exactly(recipe):
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_survives_a_file(tmp_path, name):
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe(name=name).to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path).name == name


@given(RECIPES)
def test_a_recipe_survives_a_dictionary_without_what_is_not_given(recipe):
    values = recipe.as_dict()
    assert None not in values.values()
    assert Recipe.from_dict(values) == recipe


def test_sizes_in_a_dictionary_may_be_written_with_a_k():
    values = {"minibatch": "8k", "base_minibatch": "256", "samples": "1000k", "milestones": [30, "64/1"]}
    recipe = Recipe.from_dict(values)
    assert (recipe.minibatch, recipe.base_minibatch, recipe.samples) == (8192, 256, 1_024_000)
    assert recipe.milestones == ("30", "64")
    assert values["minibatch"] == "8k"  # what was given is not changed


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('minibatch = 256\nname = "a\n', ["line 2"]),
        ("minibatch = 256\n= 3", ["line 2"]),
        ("minibatch = 256\nminibatch = 512\n", ["line 2"]),
        ("minibach = 256", ["'minibach'", "expected minibatch"]),
        ("[train]\nminibatch = 256", ["'train'"]),
        ("minibatch = 100", ["minibatch 100"]),
        ('minibatch = "8q"', ["minibatch", "'8q'"]),
        ("milestones = 30", ["milestone", "30"]),
        ('milestones = "36"', ["milestone", "36"]),
        ("base_lr = nan", ["base_lr", "nan"]),
        ("base_lr = [0.1]", ["base_lr", "0.1"]),
        ("base_lr = 2020-01-01", ["base_lr"]),
    ],
)
def test_a_bad_file_is_refused_with_its_path_and_the_line_or_key(tmp_path, text, fragments):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.toml: ") as error:
        Recipe.from_toml(path)
    assert said(error, fragments)


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.toml cannot be read: No such file"):
        Recipe.from_toml(Path(tmp_path / "missing.toml"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Recipe.from_toml(tmp_path)


def test_rates_of_layers_are_a_table_or_texts_in_any_order():
    table = tomllib.loads('[layer_rates]\n"stem.*" = 0.1\n"head.*" = 10\n')
    recipe = Recipe.from_dict(table)
    assert recipe == Recipe(layer_rates=("stem.*=0.1", "head.*=10"))
    assert recipe.rate_factors == {"head.*": 10, "stem.*": 0.1}
    assert recipe.as_dict()["layer_rates"] == ["head.*=10.0", "stem.*=0.1"]


def test_fields_beyond_the_paper_are_written_only_where_they_are_given():
    beyond: dict[str, Any] = {"clip_norm": 1.0, "ema": 0.99, "freeze": ["stem.*"], "layer_rates": ["head.*=0.5"]}
    assert not beyond.keys() & Recipe().as_dict().keys()
    assert Recipe(**beyond).as_dict() == Recipe().as_dict() | beyond


def adamw(**changes: Any) -> Recipe:
    """At four times the base minibatch."""
    common = {"optimizer": "adamw", "base_lr": 0.001, "weight_decay": 0.05, "minibatch": 1024, "scaling": "sqrt"}
    return Recipe.from_dict(common | changes)


def test_adams_kind_follows_the_square_root_rule_as_a_whole():
    assert adamw().adam == adam_scaling(base_minibatch=256, minibatch=1024, lr=0.001, weight_decay=0.05)
    assert adamw().target_weight_decay == 0.1
    assert adamw(optimizer="adam").target_weight_decay == 0.05
    assert adamw(optimizer="rmsprop").adam is None


@pytest.mark.parametrize("changes", [{"scale_betas": False}, {"scaling": "fixed"}])
def test_without_the_rule_adams_numbers_are_the_recipes_own(changes):
    adam = adamw(**changes).adam
    assert adam is not None
    assert (adam["betas"], adam["eps"], adam["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.05)
    assert adam["lr"] == (0.001 if "scaling" in changes else 0.002)


def test_a_minibatch_that_leaves_no_average_is_refused_with_what_works():
    with pytest.raises(ValueError, match=r"beta1 0\.9 .* below 10 times, or with a beta1 above 0\.9375 .* scale_betas"):
        adamw(minibatch=4096)
    adam = adamw(minibatch=4096, beta1=0.95).adam
    assert adam is not None
    assert adam["betas"] == pytest.approx((0.2, 0.984))


def test_a_folder_from_before_the_rule_keeps_the_rate_alone(tmp_path):
    for recipe, changed in ((adamw(), ["scale_betas: False → True"]), (Recipe(), []), (adamw(scaling="fixed"), [])):
        older = [line for line in recipe.to_toml().splitlines() if not line.startswith("scale_betas")]
        assert not any(line.startswith(("beta", "epsilon")) for line in older)
        (tmp_path / "recipe.toml").write_text("\n".join(older))
        assert differences(Run(tmp_path).recipe, recipe) == changed
