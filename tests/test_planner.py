"""One dial: everything that a run derives from its recipe, each with its rule and the paper's section."""

import json
import math
from pathlib import Path
from typing import Any

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
SOURCES = ("resnet50", Recipe(samples=1_281_167))
ALWAYS = {*PAPER} - {"warmup_iterations", "warmup_lr_step", "images_per_second_for_one_hour"}
ALWAYS = {name for name in ALWAYS if not name.startswith("lr_at_epoch")}


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


@pytest.mark.parametrize("name", RECIPES)
def test_json_has_each_derived_value_with_its_rule_and_section(name):
    values = json.loads(plan(name).to_json())
    assert set(values) >= ALWAYS
    for derived in values.values():
        assert derived.keys() >= {"value", "rule", "section"}
        assert derived["rule"]
        assert derived["section"]
        assert derived["value"] is not None


def test_json_is_the_same_data_as_the_plan_and_nothing_else_is_derived():
    assert list(plan("resnet50", minibatch=8192).values) == list(PAPER)
    eight = plan("resnet50", minibatch=8192, processes=3, images_per_second=1000)
    assert json.loads(eight.to_json()) == eight.as_dict()
    assert eight.as_dict()["iterations"]["value"] == 14_076


def test_an_hour_needs_32029_images_a_second():
    needed = plan("resnet50", minibatch=8192)["images_per_second_for_one_hour"].value
    assert int(needed) == 32_029
    assert plan("resnet50", minibatch=8192, images_per_second=needed)["hours"].value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("processes", "each"), [(1, "256 each"), (8, "32 each"), (3, "85 or 86 each"), (256, "1 each")]
)
def test_a_placement_says_how_many_workers_a_process_hosts(processes, each):
    placement = plan("resnet50", minibatch=8192, processes=processes)["placement"]
    assert placement.value == processes
    assert placement.rule == f"256 workers on {processes} processes: {each}"


STEPS = [[1.0, 59.0, 0.0, 10.0], [1.0, 67.0, 0.0, 10.0]] * 4
"""Milliseconds of data, computing, reduction and update: of 64 images, 1 ms each, and 10 more."""


def run_of(folder: Path, steps: list[list[float]] = STEPS, processes: int = 1, **changes: Any) -> Path:
    """A run of digits at 64 that took so long."""
    folder.mkdir()
    files = {
        "summary.json": {"images_per_second": 864.0, "parameter_bytes": 10**6, "buffer_bytes": 0},
        "timing.jsonl": {"seconds": sum(map(sum, steps)) / 1e3, "images": 64 * len(steps), "steps_ms": steps},
        "environment.json": {"sessions": [{"processes": processes, "workers_per_pass": 4}]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")
    (folder / "recipe.toml").write_text(digits(minibatch=64, **changes).to_toml())
    return folder


def test_hours_follow_from_a_runs_iterations_and_differ_between_minibatches(tmp_path: Path):
    """An image takes 1 ms, the rest of an iteration 10 ms, which a larger minibatch spends less often."""
    run = run_of(tmp_path / "run")
    for size in (32, 64, 512):
        planned = plan("digits", minibatch=size, run=run)
        assert planned["iteration_seconds"].value == pytest.approx(1e-3 * size + 10e-3)
        assert planned["hours"].value == pytest.approx(24 * 8192 / size * (1e-3 * size + 10e-3) / 3600)
        assert (planned["placement"].value, planned["efficiency"].value) == (1, 1.0)


def test_other_processes_wait_for_the_slowest_one_and_for_the_network(tmp_path: Path):
    run = run_of(tmp_path / "run")
    planned = plan("digits", minibatch=128, run=run, processes=4, bandwidth=0.1, latency=100, spread=0.05, price=3)
    ring = 2 * 3 / 4 * 8e6 / 1e8 + 2 * 3 * 1e-4
    slowest = 1 + 0.05 * 1.02938
    seconds = 32e-3 * slowest + ring + 10e-3
    assert planned["slowest"].value == pytest.approx(slowest, abs=1e-5)
    assert planned["reduction_seconds"].value == pytest.approx(ring)
    assert planned["iteration_seconds"].value == pytest.approx(seconds, rel=1e-5)
    assert planned["efficiency"].value == pytest.approx((128e-3 + 10e-3) / 4 / seconds, rel=1e-5)
    assert planned["price"].value == pytest.approx(planned["hours"].value * 4 * 3)
    for name, said in (("slowest", "0.05"), ("reduction_seconds", "1 MB at 0.1 Gbit/s"), ("image_seconds", "the same")):
        assert said in planned[name].rule


def test_the_spread_is_the_runs_own_unless_it_is_given(tmp_path: Path):
    run = run_of(tmp_path / "run", [[0.0, 64.0 + 6.4 * (number - 50) / 34, 0.0, 0.0] for number in range(101)])
    planned = plan("digits", minibatch=128, run=run, processes=2, bandwidth=1)
    assert planned["slowest"].value == pytest.approx(1 + 0.1 / math.sqrt(math.pi), abs=1e-9)
    assert plan("digits", minibatch=128, run=run, processes=2, bandwidth=1, spread=0)["slowest"].value == 1


def test_as_many_processes_as_the_run_had_wait_as_it_did(tmp_path: Path):
    run = run_of(tmp_path / "run", [[0.0, 32.0, 20.0, 10.0]] * 3, processes=2)
    planned = plan("digits", minibatch=128, run=run)
    assert planned["placement"].value == 2
    assert planned["iteration_seconds"].value == pytest.approx(64e-3 + 20e-3 + 10e-3)
    assert plan("digits", minibatch=128, run=run, processes=1)["iteration_seconds"].value == pytest.approx(138e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"processes": 2}, "the run had 1 process: what the reduction costs on 2 depends on the network; give bandw"),
        ({"processes": 2, "bandwidth": 0}, "bandwidth must be above zero, got 0"),
        ({"processes": 2, "bandwidth": 1, "latency": -1}, "latency must be"),
        ({"processes": 2, "bandwidth": 1, "spread": math.nan}, "spread must be"),
        ({"price": 0}, "price must be above zero"),
        ({"images_per_second": 9}, "give images per second or a run, not both"),
        ({"model": "resnet18"}, r"does not tell how fast this recipe is \(model: resnet8 → resnet18\)"),
        ({"per_worker": 32}, r"\(per_worker: 16 → 32\)"),
        ({"processes": 5}, "5 processes cannot share 4 workers"),
    ],
)
def test_what_a_run_cannot_tell_is_one_message(tmp_path: Path, options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        plan("digits", minibatch=64, run=run_of(tmp_path / "run"), **options)


@pytest.mark.parametrize("minibatch", [80, 160])
def test_what_process_0_waits_for_those_with_more_workers_is_counted_once(tmp_path: Path, minibatch: int):
    """5 workers on 2 processes: process 0 has 2, computes 32 ms and waits for 3 workers' 48 ms and 4 ms more."""
    run = run_of(tmp_path / "run", [[0.0, 32.0, 20.0, 10.0]] * 3, processes=2)
    (run / "recipe.toml").write_text(digits(minibatch=80).to_toml())
    seconds = {80: 32e-3 + 20e-3 + 10e-3, 160: 80e-3 + 4e-3 + 10e-3}[minibatch]
    assert plan("digits", minibatch=minibatch, run=run)["iteration_seconds"].value == pytest.approx(seconds)


def test_a_canonical_run_is_placed_and_timed_by_halving(tmp_path: Path):
    options: Any = {"minibatch": 192, "reduce": "canonical"}
    assert plan("digits", **options, processes=3)["placement"].rule.endswith("on 3 processes: 3 or 6 each")
    assert plan("digits", **options, canonical_pass=4, processes=3)["placement"].rule.endswith(": 4 each")
    run = run_of(tmp_path / "run", processes=3, reduce="canonical")
    (run / "recipe.toml").write_text(digits(**options).to_toml())
    seconds = plan("digits", **(options | {"minibatch": 384}), run=run)["iteration_seconds"].value
    assert seconds == pytest.approx(128e-3 + 10e-3)
    with pytest.raises(ValueError, match=r"\(canonical_pass: 1 → 2; canonical_threads: 1 → 4\)"):
        plan("digits", **options, run=run, canonical_pass=2, canonical_threads=4)


def test_the_base_of_a_canonical_run_need_not_have_whole_passes():
    changes: Any = {"reduce": "canonical", "canonical_pass": 16, "minibatch": 8192}
    assert plan("resnet50", **changes)["workers"].base == 8


def test_a_step_of_the_warmup_ends_where_the_decay_has_brought_the_rate():
    planned = plan("resnet50", minibatch=8192, decay="cosine")
    end = planned.recipe.schedule(5)
    assert end < 3.2
    assert planned["warmup_lr_step"].value == pytest.approx((end - 0.1) * 8192 / (5 * 1_281_167))
    assert f"({end:g} − η) / T" in planned["warmup_lr_step"].rule


def test_a_share_of_several_seeds_time_is_no_runs(tmp_path: Path):
    run = run_of(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text()) | {"seeds_together": 5}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="was timed as one of 5 seeds in one network; give a run alone"):
        plan("digits", minibatch=64, run=run)


def test_the_canonical_reduction_is_not_modelled(tmp_path: Path):
    run = run_of(tmp_path / "run", reduce="canonical")
    with pytest.raises(ValueError, match="reduce canonical costs on 2 processes is not modelled"):
        plan("digits", minibatch=64, reduce="canonical", run=run, processes=2, bandwidth=1)


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        *(("resnet50", {"images_per_second": n}, "images_per_second must be ") for n in (0, -1.0, math.nan)),
        ("resnet50", {"images_per_second": math.inf}, "images_per_second must be finite"),
        (Recipe(model="resnet50"), {"images_per_second": 1000}, "samples"),
        ("digits", {"price": 1, "processes": 2}, "a price needs hours and processes"),
        ("digits", {"price": 1, "images_per_second": 9}, "a price needs hours and processes"),
        ("resnet50", {"holds_to": (9000, 5000)}, "holds_to is 9000 to 5000"),
        ("resnet50", {"holds_to": (1, 2)}, "holds_to ends at 2, below the 32 images of one worker"),
        *(("resnet50", {name: -5}, "give a run, or leave them out") for name in ("bandwidth", "latency", "spread")),
        *((source, {"minibatch": 100}, "minibatch 100 is not a multiple of per_worker 32") for source in SOURCES),
        *((source, {"minibach": 256}, "no 'minibach'; expected minibatch") for source in SOURCES),
    ],
)
def test_what_cannot_be_planned_is_one_message(source: Any, options: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        plan(source, **options)


def test_a_price_is_that_of_all_processes():
    assert plan("digits", processes=2, images_per_second=24 * 8192 / 3600, price=4)["price"].value == pytest.approx(8)


def test_the_largest_k_is_that_of_the_interval():
    largest = plan("resnet50", holds_to=(5000, 9000))["largest_workers"]
    assert largest.value == 281
    assert "from 156 workers on" in largest.rule


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


def test_a_milestone_that_is_a_fraction_keeps_its_name_and_one_after_the_end_is_not_listed():
    assert plan("digits")["lr_at_epoch_64/3"].value == pytest.approx(0.2e-3, rel=1e-12)
    values = plan("resnet50", epochs=60, milestones=("30", "60", "80")).values
    assert [name for name in values if name.startswith("lr_at")] == ["lr_at_epoch_30"]


def test_a_run_without_samples_derives_what_does_not_need_them():
    values = plan(Recipe(model="resnet50", minibatch=512)).values
    assert values["target_lr"].value == 0.2
    assert {"samples", "iterations", "iterations_per_epoch", "warmup_iterations"}.isdisjoint(values)


def test_a_recipe_its_name_and_its_file_give_the_same_plan(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(digits().to_toml(), encoding="utf-8")
    plans = [plan(source, minibatch=64).as_dict() for source in ("digits", recipe("digits"), str(path), path)]
    assert plans[0] == plans[1] == plans[2] == plans[3]
