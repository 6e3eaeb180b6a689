"""One dial: everything that a run derives from its recipe, each with its rule and the paper's section."""

import json
import math
import subprocess
import sys

import pytest

from onehour.config import Recipe
from onehour.planner import plan
from onehour.recipes import RECIPES, digits, recipe

# What is always derived, and its value for the paper's 8k run beside that at the base minibatch of 256.
PAPER = {
    "minibatch": (8192, 256),
    "per_worker": (32, 32),
    "workers": (256, 8),
    "base_lr": (0.1, 0.1),
    "base_minibatch": (256, 256),
    "target_lr": (3.2, 0.1),
    "warmup_start_lr": (0.1, 0.1),
    "warmup_epochs": (5, 0),
    "epochs": (90, 90),
    "lr_at_epoch_30": (0.32, 0.01),
    "lr_at_epoch_60": (0.032, 0.001),
    "lr_at_epoch_80": (0.0032, 0.0001),
    "samples": (1_281_167, 1_281_167),
    "iterations_per_epoch": (1_281_167 / 8192, 1_281_167 / 256),
    "iterations": (14_076, 450_411),
    "warmup_iterations": (5 * 1_281_167 / 8192, 0),
    "warmup_lr_step": (3.1 * 8192 / (5 * 1_281_167), 0),
    "images_per_second_for_one_hour": (90 * 1_281_167 / 3600, 90 * 1_281_167 / 3600),
}
ALWAYS = [
    "minibatch",
    "per_worker",
    "workers",
    "base_lr",
    "base_minibatch",
    "target_lr",
    "warmup_start_lr",
    "warmup_epochs",
    "epochs",
    "iterations_per_epoch",
    "iterations",
]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_8k_run_derives_this_value_and_this_at_the_base(name):
    derived = plan("resnet50", minibatch=8192)[name]
    assert (derived.value, derived.base) == pytest.approx(PAPER[name], rel=1e-12)


def test_what_goes_beyond_the_paper_is_derived_where_it_is_asked_for():
    beyond = {"clip_norm": 1, "ema": 0.999, "freeze": ("bn1.*", "conv1.*"), "layer_rates": ("fc.*=10",)}
    found = plan("resnet50", minibatch=1024, **beyond)
    values = {name: (found[name].value, found[name].base) for name in found.values if name not in PAPER}
    assert values == {
        "target_lr of fc.*": (4, 1),
        "clip_norm": (1, 1),
        "ema": (pytest.approx(0.999**4, rel=1e-15), 0.999),
        "freeze": ("bn1.*, conv1.*", "bn1.*, conv1.*"),
    }
    assert "Busbridge" in found["ema"].rule


def test_nothing_else_is_derived():
    assert list(plan("resnet50", minibatch=8192).values) == list(PAPER)


@pytest.mark.parametrize("name", RECIPES)
def test_json_has_each_derived_value_with_its_rule_and_section(name):
    values = json.loads(plan(name).to_json())
    assert set(ALWAYS) <= set(values)
    for derived in values.values():
        assert derived.keys() >= {"value", "rule", "section"}
        assert derived["rule"]
        assert derived["section"]
        assert derived["value"] is not None


def test_json_is_the_same_data_as_the_plan():
    eight = plan("resnet50", minibatch=8192, processes=3, images_per_second=1000)
    assert json.loads(eight.to_json()) == eight.as_dict()
    assert eight.as_dict()["iterations"]["value"] == 14_076


def test_an_hour_needs_32029_images_a_second():
    needed = plan("resnet50", minibatch=8192)["images_per_second_for_one_hour"].value
    assert int(needed) == 32_029
    assert plan("resnet50", minibatch=8192, images_per_second=needed)["hours"].value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("speed", [0, -1.0, math.nan])
def test_a_speed_that_is_not_above_zero_is_refused(speed):
    with pytest.raises(ValueError, match="images_per_second must be above zero"):
        plan("resnet50", images_per_second=speed)


def test_hours_are_not_left_out_silently_where_the_samples_are_unknown():
    with pytest.raises(ValueError, match="samples"):
        plan(Recipe(model="resnet50"), images_per_second=1000)


@pytest.mark.parametrize(
    ("processes", "each"),
    [(1, "256 each"), (8, "32 each"), (3, "85 or 86 each"), (256, "1 each")],
)
def test_a_placement_says_how_many_workers_a_process_hosts(processes, each):
    placement = plan("resnet50", minibatch=8192, processes=processes)["placement"]
    assert placement.value == processes
    assert placement.rule == f"256 workers on {processes} processes: {each}"


def test_more_processes_than_workers_are_refused():
    with pytest.raises(ValueError, match="257 processes cannot share 256 workers"):
        plan("resnet50", minibatch=8192, processes=257)


def test_no_placement_or_hours_are_made_up():
    assert {"placement", "hours"}.isdisjoint(plan("resnet50").values)


@pytest.mark.parametrize(
    ("changes", "start", "epochs", "rule"),
    [
        ({"minibatch": 8192}, 0.1, 5, "at every iteration"),
        ({"minibatch": 8192, "warmup": "constant"}, 0.1, 5, "then a jump"),
        ({"minibatch": 8192, "warmup": "none"}, 3.2, 0, "none"),
        ({"minibatch": 256}, 0.1, 0, "the rate does not grow"),
        ({"minibatch": 128}, 0.05, 0, "the rate does not grow"),
    ],
)
def test_a_warmup_is_what_the_rate_starts_with(changes, start, epochs, rule):
    planned = plan("resnet50", **changes)
    assert planned["warmup_start_lr"].value == start
    assert planned["warmup_epochs"].value == epochs
    assert rule in planned["warmup_start_lr"].rule
    assert ("warmup_iterations" in planned.values) == (epochs > 0)
    assert ("warmup_lr_step" in planned.values) == (changes == {"minibatch": 8192})


@pytest.mark.parametrize(("scaling", "lr"), [("linear", 3.2), ("sqrt", 0.1 * 32**0.5), ("fixed", 0.1)])
def test_the_rate_follows_the_scaling(scaling, lr):
    planned = plan("resnet50", minibatch=8192, scaling=scaling)
    assert planned["target_lr"].value == pytest.approx(lr, rel=1e-15)
    assert planned["target_lr"].base == 0.1


def test_a_milestone_that_is_a_fraction_keeps_its_name():
    assert plan("digits")["lr_at_epoch_64/3"].value == pytest.approx(0.2e-3, rel=1e-12)


def test_a_milestone_after_the_end_is_not_listed():
    values = plan("resnet50", epochs=60, milestones=("30", "60", "80")).values
    listed = [name for name in values if name.startswith("lr_at")]
    assert listed == ["lr_at_epoch_30"]


def test_a_run_without_samples_derives_what_does_not_need_them():
    values = plan(Recipe(model="resnet50", minibatch=512)).values
    assert values["target_lr"].value == 0.2
    assert {"samples", "iterations", "iterations_per_epoch", "warmup_iterations"}.isdisjoint(values)


def test_a_recipe_its_name_and_its_file_give_the_same_plan(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(digits().to_toml(), encoding="utf-8")
    plans = [plan(source, minibatch=64).as_dict() for source in ("digits", recipe("digits"), str(path))]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("source", ["resnet50", Recipe(samples=1_281_167)])
def test_a_change_that_no_run_can_have_is_refused(source):
    with pytest.raises(ValueError, match="minibatch 100 is not a multiple of per_worker 32"):
        plan(source, minibatch=100)
    with pytest.raises(ValueError, match="no 'minibach'; expected minibatch"):
        plan(source, minibach=256)


def test_planning_does_not_import_torch():
    """torch takes seconds to import; `onehour plan` and `--help` should not wait for it."""
    code = (
        "import sys, onehour; made = onehour.plan('resnet50', minibatch=8192, processes=8);"
        "print(made['iterations'].value, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["14076", "False"]
