"""Runs as a study sees them, nothing dropped; folders and CSVs that do not say what they should are refused."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import studies
from hypothesis import given
from hypothesis import strategies as st

from onehour.study.results import Result, Study, check_run, read_csv, read_paths, read_study, study_of
from onehour.training.record import Run

ERRORS = [60.0, 30.0, 12.0, 9.0, 8.5, 8.25, 8.75]


def run_at(folder: Path, error: float = 3.5, **changes: Any) -> Path:
    """A run of the digits recipe with some fields changed, or another outcome."""
    options = {name: changes.pop(name) for name in ("outcome", "together") if name in changes}
    return studies.write_run(folder, studies.BASE.replace(**changes), error, **options)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_sweeps_entries_are_its_truth(study: Study):
    assert [entry.minibatch for entry in study.flat] == list(studies.TRUTH)
    for entry in study.flat[1:6]:
        assert entry.mean == pytest.approx(studies.TRUTH[entry.minibatch or 0], abs=1e-9)
        assert entry.std == pytest.approx(0.15 if entry.mean < 5 else 0.12 * entry.mean)
    assert [entry.label for entry in study.arms] == [studies.label_of(arm) for arm in studies.arms_of()]
    costs = {entry.label: entry.mean - studies.TRUTH[512] for entry in study.arms}
    assert costs["warmup=none"] == pytest.approx(studies.COSTS["warmup=none"])
    assert costs["per_worker=4"] == pytest.approx(studies.COSTS["per_worker=4"])
    assert study.spec is not None
    assert study.recipe == study.spec.recipe
    assert study.reference is study.flat[0]
    beside = study.beside(study.arms[0])
    assert beside is not None
    assert (beside.minibatch, beside.arm) == (512, ())


def test_the_error_of_a_run_is_the_median_of_its_last_five_epochs(study: Study):
    for result in study.flat[0].results:
        errors = [line["top1_error"] for line in Run(Path(result.source)).metrics]
        assert result.error == statistics.median(errors[-5:])
        assert [point.error for point in result.curve] == errors
        assert (result.seconds, result.environment["torch"]) == (52.0, "2.13.0+cpu")


def test_a_run_that_left_the_finite_numbers_counts_as_chance(study: Study):
    last = study.flat[-1]
    assert [result.outcome for result in last.results].count("non-finite") == 2
    assert sorted(last.errors)[-2:] == [90.0, 90.0]
    assert last.n == 5
    assert last.mean == pytest.approx(statistics.fmean(last.errors))
    assert all(result.seconds is None for result in last.results if result.outcome == "non-finite")


def test_an_unfinished_run_is_kept_without_an_error_and_a_missing_one_is_missing(tmp_path: Path):
    options: dict[str, Any] = {"minibatches": (64, 128), "arms": (), "together": 5}
    studies.write_sweep(tmp_path, left_out=["64-s2"], unfinished=["128-s4"], **options)
    study = read_paths([tmp_path])
    entries = {entry.minibatch: entry for entry in study.flat}
    assert (entries[64].n, len(entries[64].results)) == (4, 4)
    assert (entries[128].n, len(entries[128].results)) == (4, 5)
    open_run = next(result for result in entries[128].results if result.outcome == "unfinished")
    assert (open_run.error, open_run.seed, len(open_run.curve)) == (None, 4, 12)
    assert {result.together for result in entries[64].results} == {5}


def test_plain_runs_are_held_against_the_smallest_minibatch(tmp_path: Path):
    sizes: dict[str, dict[str, Any]] = {"large": {}, "other": {"warmup": "none"}, "small": {"minibatch": 64}}
    study = read_study([run_at(tmp_path / name, **({"minibatch": 512} | sizes[name])) for name in sizes])
    assert study.reference is not None
    assert study.reference.minibatch == 64
    assert [(entry.minibatch, entry.label) for entry in study.entries] == [(64, ""), (512, ""), (512, "warmup=none")]
    assert (study.entries[0].mean, math.isnan(study.entries[0].std)) == (3.5, True)  # of one seed


def test_the_same_run_twice_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a and .*b are the same run \(minibatch 32, seed 0\)"):
        read_study([run_at(tmp_path / name) for name in "ab"])


@pytest.mark.parametrize("change", [{"epochs": 12, "milestones": ("6",)}, {"data": "images"}, {"model": "mlp"}])
def test_runs_of_different_tasks_are_refused(tmp_path: Path, change: dict[str, Any]):
    runs = [run_at(tmp_path / "a"), run_at(tmp_path / "b", minibatch=64, **change)]
    with pytest.raises(ValueError, match=f"b has {next(iter(change))} .* instead of .*: runs of different tasks"):
        read_study(runs)


def test_a_sweep_is_reported_alone(tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=1, minibatches=(32,), arms=())
    with pytest.raises(ValueError, match="is a sweep; report it alone"):
        read_study([run_at(tmp_path / "a"), tmp_path / "sweep"])


def test_a_line_that_a_killed_process_was_writing_is_no_evaluation(tmp_path: Path):
    folder = run_at(tmp_path / "a", outcome="unfinished")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 13, "top1_er')
    assert len(read_study([folder]).entries[0].results[0].curve) == 12
    with pytest.raises(ValueError, match="a: no run has ended yet, so there is nothing to report"):
        read_paths([folder])


def test_chance_needs_the_number_of_classes(tmp_path: Path):
    recipe = studies.digits()
    assert recipe.classes is None
    folder = studies.write_run(tmp_path / "a", recipe, 3.5, outcome="non-finite")
    with pytest.raises(ValueError, match=r"recipe\.toml has no classes"):
        read_study([folder])


@given(
    st.lists(st.tuples(st.sampled_from([32, 64, None]), st.sampled_from(["", "none", "constant"]), st.integers(0, 3)))
)
def test_grouping_loses_no_run_and_changes_none(keys: list[tuple[int | None, str, int]]):
    results = [
        Result(str(number), (("warmup", kind),) if kind else (), size, seed, "finished", float(seed))
        for number, (size, kind, seed) in enumerate(dict.fromkeys(keys))
    ]
    study = study_of(results, None)
    assert sorted(study.results, key=lambda result: int(result.source)) == results
    assert all(result.arm == entry.arm for entry in study.entries for result in entry.results)
    assert len({(entry.arm, entry.minibatch) for entry in study.entries}) == len(study.entries)
    flat = [not entry.arm for entry in study.entries]
    assert flat == sorted(flat, reverse=True)


def test_what_a_training_wrote_is_sound(tmp_path: Path):
    check_run(run_at(tmp_path / "lost", outcome="non-finite"))
    check_run(run_at(tmp_path / "open", outcome="unfinished"))


DAMAGES = [
    ("metrics.jsonl", '"top1_error": 3.6', '"top1_error": "low"', "top1_error is 'low'; expected a number from 0 to"),
    ("metrics.jsonl", '"top1_error": 3.6', '"top1_error": NaN', "top1_error is nan; expected a number from 0 to 100"),
    ("metrics.jsonl", '"top1_error": 3.6', '"top1_error": 360', "top1_error is 360; expected a number from 0 to 100"),
    ("metrics.jsonl", '"epoch": 2,', '"epoch": true,', "line 3: epoch is True; expected a number"),
    ("metrics.jsonl", '"train_error"', '"trained_error"', "line 2: it has no 'train_error'"),
    ("metrics.jsonl", '"top1_error"', '"top5_error"', r"metrics\.jsonl is damaged: line 2: it has no 'top1_error'"),
    ("metrics.jsonl", '{"epoch": 5', '{"epo\n', r"metrics\.jsonl is damaged: line 6"),
    ("metrics.jsonl", '"seed": 0', '"seed": 0.5', "line 1: expected the recipe that was trained"),
    ("metrics.jsonl", '{"recipe"', '{"receipt"', "line 1: it has no 'recipe'"),
    ("metrics.jsonl", '"top1_error": 3.6}', '"top1_error": 3.2}', "but summary.json has .*: one of them was edited"),
    ("recipe.toml", 'warmup = "gradual"', 'warmup = "none"', r"is not what was trained \(warmup: gradual → none\)"),
    ("recipe.toml", "minibatch = 32", "minibatch = 33", r"recipe\.toml: minibatch 33 is not a multiple"),
    ("recipe.toml", "minibatch = 32", "minibatch 32", r"recipe\.toml: Expected '='"),
    ("summary.json", '"finished"', "3", r"summary\.json is damaged: outcome is 3; expected text"),
    ("summary.json", "52.0", '"long"', "seconds_training is 'long'; expected a number of seconds"),
    ("summary.json", '"seeds_together": 5', '"seeds_together": 0', "seeds_together is 0; expected a whole number"),
    ("summary.json", "{", "[", r"summary\.json is damaged"),
    ("environment.json", "[{", "[[{", r"environment\.json is damaged"),
    ("environment.json", '"sessions"', '"session"', r"environment\.json is damaged: it has no 'sessions'"),
    ("environment.json", '[{"python": "3.11.7"', '["a", {"python": "3.11.7"', "expected a list of objects"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), DAMAGES)
def test_an_edited_file_is_named(tmp_path: Path, name: str, old: str, new: str, said: str):
    run = run_at(tmp_path / "run", together=5)
    text = (run / name).read_text(encoding="utf-8")
    assert old in text
    written(run / name, text.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as caught:
        read_paths([run])
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_of_a_sweep_is_checked_too(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=())
    written(tmp_path / "cells" / "64-s0" / "summary.json", json.dumps({"outcome": None, "seconds_training": 3}))
    with pytest.raises(ValueError, match=r"64-s0/summary\.json is damaged: outcome is None; expected text"):
        read_paths([tmp_path])


def test_a_finished_runs_file_cut_at_any_place_is_named(tmp_path: Path):
    run = run_at(tmp_path / "run")
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for end in range(0, len(content), 97):
        path.write_bytes(content[:end])
        epochs = content[first:end].count(b"\n")
        with pytest.raises(ValueError, match=rf"metrics\.jsonl ends at epoch {epochs} of 24, but the run is finished"):
            read_paths([run])
    path.write_bytes(content[:first])
    with pytest.raises(ValueError, match=r"says that it is finished, but metrics\.jsonl holds no evaluation"):
        read_study([run])
    (run / "summary.json").unlink()  # as a killed run leaves it
    check_run(run)


def test_a_file_is_a_run_and_its_name_the_label(tmp_path: Path):
    path = studies.write_csv(tmp_path / "my loop.csv", ERRORS)
    result = read_csv(path)
    assert [(point.epoch, point.error) for point in result.curve] == list(enumerate(ERRORS, 1))
    assert (result.minibatch, result.seed, result.arm) == (None, None, (("curve", "my loop"),))
    (entry,) = read_paths([path]).entries
    assert entry.errors == (statistics.median(ERRORS[-5:]),)


def test_columns_may_stand_in_any_order_with_others_between(tmp_path: Path):
    text = "\ufeff Error ,lr, EPOCH,Train_Error,minibatch,seed,arm\r\n9.5,0.1,1,20,1k,3,warmup=none\r\n\r\n"
    text += "8.5,,2.5,,1k,3,warmup=none\r\n"
    result = read_csv(written(tmp_path / "a.csv", text))
    assert (result.minibatch, result.seed, result.arm) == (1024, 3, (("warmup", "none"),))
    assert [(p.epoch, p.error, p.train_error) for p in result.curve] == [(1.0, 9.5, 20.0), (2.5, 8.5, None)]


@pytest.mark.parametrize("text", ["ours, tuned", "warmth=none", "base_lr=fast", "="])
def test_an_arm_that_is_no_recipes_field_is_text(tmp_path: Path, text: str):
    path = written(tmp_path / "a.csv", f'epoch,error,arm\n1,9,"{text}"\n')
    assert read_csv(path).arm == (("arm", text),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.csv is empty; expected a header line with epoch,error"),
        ("\n\n", "a.csv is empty; expected a header line with epoch,error"),
        ("1,60\n2,30\n", "a.csv, line 1: expected a header with one column epoch and one error, got '1,60'"),
        ("epoch,error,Error\n1,60,5\n", "one column epoch and one error, got 'epoch,error,Error'"),
        ("epoch;error\n1;60\n", "line 1: expected a header with one column epoch and one error, got 'epoch;error'"),
        ("epoch,error\n", "a.csv has a header and no line under it"),
        ("epoch,error\n1\n", "a.csv, line 2 has 1 of 2 values; expected epoch, error"),
        ("epoch,error\n1,60\n2,sixty\n", "a.csv, line 3: error is 'sixty'; expected percent, a number from 0 to 100"),
        ("epoch,error\n1,nan\n", "line 2: error is 'nan'; expected percent"),
        ("epoch,error\n1,101\n", "line 2: error is '101'; expected percent"),
        ("epoch,error\n1,-1\n", "line 2: error is '-1'; expected percent"),
        ("epoch,error\n1,\n", "line 2: error is ''; expected percent"),
        ("epoch,error,train_error\n1,2,x\n", "line 2: train_error is 'x'; expected percent"),
        ("epoch,error\n1,60\n1,50\n", "a.csv, line 3: epoch is '1'; expected a number above 1"),
        ("epoch,error\n-1,60\n", "line 2: epoch is '-1'; expected a number of at least 0"),
        ("epoch,error\n0,60\n0,50\n", "line 3: epoch is '0'; expected a number above 0"),
        ("epoch,error\nlast,60\n", "line 2: epoch is 'last'; expected a number of at least 0"),
        ("epoch,error\ninf,60\n", "line 2: epoch is 'inf'; expected a number of at least 0"),
        ("epoch,error,seed\n1,6,0\n2,5,1\n", "line 3: seed is '1' and was '0' before; a file is one run"),
        ("epoch,error,minibatch\n1,6,64\n2,5,32\n", "line 3: minibatch is '32' and was '64' before"),
        ("epoch,error,minibatch\n1,6,many\n", "a.csv: minibatch: 'many' is not a size"),
        ("epoch,error,seed\n1,6,first\n", "a.csv: seed is 'first'; expected a whole number"),
        ("\x89PNG\x00\udcff", "a.csv is not a CSV file: it is not text"),
    ],
)
def test_bad_files_are_named_with_their_line_and_what_was_expected(tmp_path: Path, text: str, said: str):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"a\.csv") as caught:
        read_csv(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_paths_and_paths_given_twice(tmp_path: Path):
    with pytest.raises(ValueError, match=r"gone\.csv cannot be read: No such file"):
        read_paths([tmp_path / "gone.csv"])
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        with pytest.raises(ValueError, match=f"{name} is neither a sweep's folder"):
            read_paths([tmp_path / name])
    path = studies.write_csv(tmp_path / "a.csv", ERRORS)
    with pytest.raises(ValueError, match="is given twice"):
        read_paths([path, tmp_path / "." / "a.csv"])
    with pytest.raises(ValueError, match="nothing to report; give"):
        read_paths([])


def test_seeds_and_minibatches_of_others_make_a_table(tmp_path: Path):
    paths = [
        studies.write_csv(tmp_path / f"{size}-{seed}.csv", [50, 10 + size / 256 + seed], minibatch=size, seed=seed)
        for size in (256, 512)
        for seed in (0, 1, 2)
    ]
    study = read_paths(paths)
    assert study.recipe is None
    assert [(entry.minibatch, entry.n) for entry in study.flat] == [(256, 3), (512, 3)]
    assert study.reference is study.flat[0]
    with pytest.raises(ValueError, match="are the same run"):
        read_paths([*paths, studies.write_csv(tmp_path / "again.csv", [50, 10], minibatch=256, seed=0)])


def test_files_of_one_name_are_told_apart_by_their_folders_and_have_no_place_on_the_axis(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
    paths = [studies.write_csv(tmp_path / name / "log.csv", ERRORS) for name in "ab"]
    study = read_paths([*paths, run_at(tmp_path / "run")])
    assert [entry.label for entry in study.entries] == ["", "curve=a/log", "curve=b/log"]
    assert study.reference is study.entries[0]


def test_others_runs_stand_beside_ours_of_the_same_size(tmp_path: Path):
    path = studies.write_csv(tmp_path / "torch.csv", [60.0] * 17 + ERRORS, minibatch=512, arm="plain torch")
    study = read_paths([run_at(tmp_path / "run", 4.0, minibatch=512), path])
    (arm,) = study.arms
    assert arm.label == "arm=plain torch"
    beside = study.beside(arm)
    assert beside is not None
    assert beside.mean == 4.0


def test_runs_of_different_lengths_are_refused(tmp_path: Path):
    long, short = [
        [studies.write_csv(tmp_path / f"{size}-{seed}.csv", errors, minibatch=size, seed=seed) for seed in (0, 1)]
        for size, errors in ((32, [60.0] * 83 + ERRORS), (64, [60.0] * 13 + ERRORS))
    ]
    run = run_at(tmp_path / "run")
    for paths, other in (([*long, *short], r"32-0\.csv at epoch 90"), ([run, *short], "run at epoch 24")):
        with pytest.raises(ValueError, match=rf"64-0\.csv ends at epoch 20 and .*{other}: runs of different"):
            read_paths(paths)
    loose = studies.write_csv(tmp_path / "loose.csv", ERRORS)
    assert len(read_paths([run, loose]).entries) == 2


@pytest.mark.parametrize("epochs", [range(10), range(11), range(1, 11), range(0, 10, 2), [0.5, 5, 9.97]])
def test_epochs_may_be_counted_from_0_and_skipped(epochs: range | list[float], tmp_path: Path):
    path = studies.write_csv(tmp_path / "a.csv", [60.0] * 3 + ERRORS, minibatch=32)
    lines = "".join(f"{epoch},9,64\n" for epoch in epochs)
    other = written(tmp_path / "b.csv", f"epoch,error,minibatch\n{lines}")
    assert [entry.n for entry in read_paths([path, other]).flat] == [1, 1]
    assert read_csv(other).curve[0].epoch == epochs[0]
