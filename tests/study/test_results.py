"""Runs as a study sees them, nothing dropped; folders that no longer say what training wrote are refused."""

import importlib
import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.study.others import read_paths
from onehour.study.results import Result, check_folders, check_run, read_study, study_of
from onehour.training.record import Run

studies = importlib.import_module("studies")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "sweep"
    studies.write_sweep(path, left_out=["64-s2"], unfinished=["128-s4"], together=5)
    return path


def test_a_sweeps_entries_are_its_truth(folder: Path):
    study = read_study([folder])
    assert [entry.minibatch for entry in study.flat] == list(studies.TRUTH)
    for entry in study.flat[3:6]:
        assert entry.mean == pytest.approx(studies.TRUTH[entry.minibatch], abs=1e-9)
        assert entry.std == pytest.approx(0.15 if entry.mean < 5 else 0.12 * entry.mean)
    assert [entry.label for entry in study.arms] == [studies.label_of(arm) for arm in studies.arms_of()]
    costs = {entry.label: entry.mean - studies.TRUTH[512] for entry in study.arms}
    assert costs["warmup=none"] == pytest.approx(studies.COSTS["warmup=none"])
    assert costs["per_worker=4"] == pytest.approx(studies.COSTS["per_worker=4"])
    assert study.spec is not None
    assert study.recipe == study.spec.recipe


def test_the_error_of_a_run_is_the_median_of_its_last_five_epochs(folder: Path):
    for entry in read_study([folder]).flat[:2]:
        for result in entry.results:
            errors = [line["top1_error"] for line in Run(Path(result.source)).metrics]
            assert result.error == statistics.median(errors[-5:])
            assert [point.top1_error for point in result.curve] == errors


def test_a_run_that_left_the_finite_numbers_counts_as_chance(folder: Path):
    study = read_study([folder])
    last = study.flat[-1]
    assert [result.outcome for result in last.results].count("non-finite") == 2
    assert sorted(last.errors)[-2:] == [90.0, 90.0]
    assert last.n == 5
    assert last.mean == pytest.approx(statistics.fmean(last.errors))
    assert all(result.seconds is None for result in last.results if result.outcome == "non-finite")


def test_an_unfinished_run_is_kept_without_an_error_and_a_missing_one_is_missing(folder: Path):
    entries = {entry.minibatch: entry for entry in read_study([folder]).flat}
    assert (entries[64].n, len(entries[64].results)) == (4, 4)
    assert (entries[128].n, len(entries[128].results)) == (4, 5)
    open_run = next(result for result in entries[128].results if result.outcome == "unfinished")
    assert (open_run.error, open_run.seed, len(open_run.curve)) == (None, 4, 12)


def test_reference_and_what_an_arm_is_held_against(folder: Path):
    study = read_study([folder])
    assert study.reference is not None
    assert study.reference.minibatch == 32
    beside = study.beside(study.arms[0])
    assert beside is not None
    assert (beside.minibatch, beside.arm) == (512, ())


def test_time_and_seeds_that_were_trained_together(folder: Path):
    result = read_study([folder]).flat[0].results[0]
    assert (result.seconds, result.together) == (52.0, 5)
    assert result.environment["torch"] == "2.13.0+cpu"


def test_plain_runs_are_held_against_the_smallest_minibatch(tmp_path: Path):
    base = studies.BASE
    large = studies.write_run(tmp_path / "large", base.replace(minibatch=512), 4.0)
    small = studies.write_run(tmp_path / "small", base.replace(minibatch=64), 3.5)
    other = studies.write_run(tmp_path / "other", base.replace(minibatch=512, warmup="none"), 5.0)
    study = read_study([large, other, small])
    assert study.reference is not None
    assert study.reference.minibatch == 64
    assert [(entry.minibatch, entry.label) for entry in study.entries] == [(64, ""), (512, ""), (512, "warmup=none")]


def test_one_seed_has_no_std(tmp_path: Path):
    entry = read_study([studies.write_run(tmp_path / "a", studies.BASE, 3.5)]).entries[0]
    assert entry.mean == 3.5
    assert math.isnan(entry.std)


def test_the_same_run_twice_is_refused(tmp_path: Path):
    paths = [studies.write_run(tmp_path / name, studies.BASE, 3.5) for name in "ab"]
    with pytest.raises(ValueError, match=r"a and .*b are the same run \(minibatch 32, seed 0\)"):
        read_study(paths)


@pytest.mark.parametrize("change", [{"epochs": 12, "milestones": ("6",)}, {"data": "images"}, {"model": "mlp"}])
def test_runs_of_different_tasks_are_refused(tmp_path: Path, change: dict[str, object]):
    first = studies.write_run(tmp_path / "a", studies.BASE, 3.5)
    second = studies.write_run(tmp_path / "b", studies.BASE.replace(minibatch=64, **change), 3.5)
    with pytest.raises(ValueError, match=f"b has {next(iter(change))} .* instead of .*: runs of different tasks"):
        read_study([first, second])


def test_a_sweep_is_reported_alone(tmp_path: Path, folder: Path):
    run = studies.write_run(tmp_path / "a", studies.BASE, 3.5)
    with pytest.raises(ValueError, match="is a sweep; report it alone"):
        read_study([run, folder])


def test_a_line_that_a_killed_process_was_writing_is_no_evaluation(tmp_path: Path):
    folder = studies.write_run(tmp_path / "a", studies.BASE, 3.5, outcome="unfinished")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 13, "top1_er')
    assert len(read_study([folder]).entries[0].results[0].curve) == 12


def test_a_file_cut_in_its_middle_is_named(tmp_path: Path):
    folder = studies.write_run(tmp_path / "a", studies.BASE, 3.5)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], lines[5][:20] + "\n", *lines[6:]]))
    with pytest.raises(ValueError, match=r"a/metrics\.jsonl is damaged"):
        read_study([folder])


def test_a_line_without_an_error_is_named(tmp_path: Path):
    folder = studies.write_run(tmp_path / "a", studies.BASE, 3.5)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"top1_error"', '"top5_error"'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2: it has no 'top1_error'"):
        read_study([folder])


def test_a_finished_run_without_an_evaluation_is_refused(tmp_path: Path):
    folder = studies.write_run(tmp_path / "a", studies.BASE, 3.5)
    (folder / "metrics.jsonl").write_text(json.dumps({"recipe": {}}) + "\n")
    with pytest.raises(ValueError, match=r"says that it is finished, but metrics\.jsonl holds no evaluation"):
        read_study([folder])


def test_chance_needs_the_number_of_classes(tmp_path: Path):
    recipe = studies.digits()
    assert recipe.classes is None
    folder = studies.write_run(tmp_path / "a", recipe, 3.5, outcome="non-finite")
    with pytest.raises(ValueError, match=r"recipe\.toml has no classes"):
        read_study([folder])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([32, 64, None]), st.sampled_from(["", "none", "constant"]), st.integers(0, 3)))
)
def test_grouping_loses_no_run_and_changes_none(keys: list[tuple[int | None, str, int]]):
    results = [
        Result(str(number), (("warmup", kind),) if kind else (), size, seed, "finished", float(seed))
        for number, (size, kind, seed) in enumerate(dict.fromkeys(keys))
    ]
    study = study_of(results, None)
    found = [result for entry in study.entries for result in entry.results]
    assert sorted(found, key=lambda result: int(result.source)) == results
    assert all(result.arm == entry.arm for entry in study.entries for result in entry.results)
    assert len({(entry.arm, entry.minibatch) for entry in study.entries}) == len(study.entries)
    assert [not entry.arm for entry in study.entries] == sorted(
        (not entry.arm for entry in study.entries), reverse=True
    )


def edited(folder: Path, name: str, old: str, new: str) -> Path:
    run = studies.write_run(folder / "run", studies.BASE, 3.5, together=5)
    text = (run / name).read_text(encoding="utf-8")
    assert old in text
    (run / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    return run


def test_what_a_training_wrote_is_sound(tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=1, minibatches=(32,), arms=(), unfinished=["32-s0"])
    check_folders([tmp_path / "sweep"])
    check_run(studies.write_run(tmp_path / "lost", studies.BASE, 3.5, outcome="non-finite"))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "metrics.jsonl",
            '"top1_error": 3.6',
            '"top1_error": "low"',
            r"top1_error is 'low'; expected a number from 0 to",
        ),
        (
            "metrics.jsonl",
            '"top1_error": 3.6',
            '"top1_error": NaN',
            "top1_error is nan; expected a number from 0 to 100",
        ),
        (
            "metrics.jsonl",
            '"top1_error": 3.6',
            '"top1_error": 360',
            "top1_error is 360; expected a number from 0 to 100",
        ),
        ("metrics.jsonl", '"epoch": 2,', '"epoch": true,', "line 3: epoch is True; expected a number"),
        ("metrics.jsonl", '"train_error"', '"trained_error"', "line 2: it has no 'train_error'"),
        ("metrics.jsonl", '"seed": 0', '"seed": 0.5', "line 1: expected the recipe that was trained"),
        ("metrics.jsonl", '{"recipe"', '{"receipt"', "line 1: it has no 'recipe'"),
        (
            "metrics.jsonl",
            '"top1_error": 3.6}',
            '"top1_error": 3.2}',
            "but summary.json has .*: one of them was edited",
        ),
        ("recipe.toml", 'warmup = "gradual"', 'warmup = "none"', r"is not what was trained \(warmup: gradual → none\)"),
        ("recipe.toml", "minibatch = 32", "minibatch = 33", r"recipe\.toml: minibatch 33 is not a multiple"),
        ("recipe.toml", "minibatch = 32", "minibatch 32", r"recipe\.toml: Expected '='"),
        ("summary.json", '"finished"', "3", r"summary\.json is damaged: outcome is 3; expected text"),
        ("summary.json", "52.0", '"long"', r"seconds_training is 'long'; expected a number of seconds"),
        ("summary.json", '"seeds_together": 5', '"seeds_together": 0', "seeds_together is 0; expected a whole number"),
        ("summary.json", "{", "[", r"summary\.json is damaged"),
        ("environment.json", "[{", "[[{", r"environment\.json is damaged"),
        ("environment.json", '"sessions"', '"session"', r"environment\.json is damaged: it has no 'sessions'"),
        ("environment.json", '[{"python": "3.11.7"', '["a", {"python": "3.11.7"', "expected a list of objects"),
    ],
)
def test_an_edited_file_is_named(tmp_path: Path, name: str, old: str, new: str, said: str):
    run = edited(tmp_path, name, old, new)
    with pytest.raises(ValueError, match=said) as caught:
        read_paths([run])
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_object_is_damaged(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    (run / "summary.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"summary\.json is damaged: it holds \[1\]; expected an object"):
        check_run(run)


def test_a_run_of_a_sweep_is_checked_too(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=())
    path = tmp_path / "cells" / "64-s0" / "summary.json"
    path.write_text(json.dumps({"outcome": None, "seconds_training": 3}))
    with pytest.raises(ValueError, match=r"64-s0/summary\.json is damaged: outcome is None; expected text"):
        read_paths([tmp_path])


def test_a_finished_runs_file_cut_at_any_place_is_named(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for end in range(0, len(content), 97):
        path.write_bytes(content[:end])
        epochs = content[first:end].count(b"\n")
        with pytest.raises(ValueError, match=rf"metrics\.jsonl ends at epoch {epochs} of 24, but the run is finished"):
            read_paths([run])
    (run / "summary.json").unlink()  # as a killed run leaves it
    check_run(run)
