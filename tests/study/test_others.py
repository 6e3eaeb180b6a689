"""Others' CSVs: what they may look like, what is refused with its line, and how they stand beside runs."""

import importlib
import statistics
from pathlib import Path

import pytest

from onehour.study.others import read_csv, read_paths

studies = importlib.import_module("studies")
ERRORS = [60.0, 30.0, 12.0, 9.0, 8.5, 8.25, 8.75]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_run_and_its_name_the_label(tmp_path: Path):
    path = studies.write_csv(tmp_path / "my loop.csv", ERRORS)
    result = read_csv(path)
    assert result.error == statistics.median(ERRORS[-5:])
    assert [(point.epoch, point.top1_error) for point in result.curve] == list(enumerate(ERRORS, 1))
    assert (result.minibatch, result.seed, result.arm) == (None, None, (("curve", "my loop"),))
    (entry,) = read_paths([path]).entries
    assert entry.errors == (8.75,)


def test_columns_may_stand_in_any_order_with_others_between(tmp_path: Path):
    text = "\ufeff Error ,lr, EPOCH,Train_Error,minibatch,seed,arm\r\n9.5,0.1,1,20,1k,3,warmup=none\r\n\r\n"
    text += "8.5,,2.5,,1k,3,warmup=none\r\n"
    result = read_csv(written(tmp_path / "a.csv", text))
    assert (result.minibatch, result.seed, result.arm) == (1024, 3, (("warmup", "none"),))
    assert [(p.epoch, p.top1_error, p.train_error) for p in result.curve] == [(1.0, 9.5, 20.0), (2.5, 8.5, None)]


@pytest.mark.parametrize("text", ["ours, tuned", "warmth=none", "base_lr=fast", "="])
def test_an_arm_that_is_no_recipes_field_is_text(tmp_path: Path, text: str):
    path = written(tmp_path / "a.csv", f'epoch,error,arm\n1,9,"{text}"\n')
    assert read_csv(path).arm == (("arm", text),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.csv is empty; expected a header line with epoch,error"),
        ("\n\n", "a.csv is empty; expected a header line with epoch,error"),
        ("1,60\n2,30\n", "a.csv, line 1: expected a header with the columns epoch and error, got '1,60'"),
        ("epoch;error\n1;60\n", "line 1: expected a header with the columns epoch and error, got 'epoch;error'"),
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
        ("epoch,error,seed\n1,6,0\n2,5,1\n", "line 3: seed is '1' and was '0' before; a file is one run"),
        ("epoch,error,minibatch\n1,6,64\n2,5,32\n", "line 3: minibatch is '32' and was '64' before"),
        ("epoch,error,minibatch\n1,6,many\n", "a.csv: minibatch: 'many' is not a size"),
        ("epoch,error,seed\n1,6,first\n", "a.csv: seed is 'first'; expected a whole number"),
    ],
)
def test_bad_files_are_named_with_their_line_and_what_was_expected(tmp_path: Path, text: str, said: str):
    path = written(tmp_path / "a.csv", text)
    with pytest.raises(ValueError, match=r"a\.csv") as caught:
        read_csv(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_no_csv(tmp_path: Path):
    path = tmp_path / "weights.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe")
    with pytest.raises(ValueError, match=r"weights\.csv is not a CSV file: it is not text"):
        read_csv(path)


def test_missing_paths_and_paths_given_twice(tmp_path: Path):
    with pytest.raises(ValueError, match=r"gone\.csv cannot be read: No such file"):
        read_paths([tmp_path / "gone.csv"])
    with pytest.raises(ValueError, match="gone is neither a sweep's folder"):
        read_paths([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is neither a sweep's folder"):
        read_paths([tmp_path / "empty"])
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


def test_a_curve_without_a_minibatch_has_no_place_on_the_axis(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    study = read_paths([studies.write_csv(tmp_path / "mine.csv", ERRORS), run])
    assert study.reference is not None
    assert study.reference.minibatch == 32
    assert [entry.label for entry in study.entries] == ["", "curve=mine"]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
    paths = [studies.write_csv(tmp_path / name / "log.csv", ERRORS) for name in "ab"]
    assert [entry.label for entry in read_paths(paths).entries] == ["curve=a/log", "curve=b/log"]


def test_others_runs_stand_beside_ours_of_the_same_size(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE.replace(minibatch=512), 4.0)
    path = studies.write_csv(tmp_path / "torch.csv", [60.0] * 17 + ERRORS, minibatch=512, arm="plain torch")
    study = read_paths([run, path])
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
    with pytest.raises(ValueError, match=r"64-0\.csv ends at epoch 20 and .*32-0\.csv at epoch 90: runs of different"):
        read_paths([*long, *short])
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    with pytest.raises(ValueError, match=r"64-0\.csv ends at epoch 20 and .*run at epoch 24: runs of different"):
        read_paths([run, *short])
    loose = studies.write_csv(tmp_path / "loose.csv", ERRORS)
    assert len(read_paths([run, loose]).entries) == 2


@pytest.mark.parametrize("epochs", [range(10), range(11), range(1, 11), range(0, 10, 2), [0.5, 5, 9.97]])
def test_epochs_may_be_counted_from_0_and_skipped(epochs: range | list[float], tmp_path: Path):
    path = studies.write_csv(tmp_path / "a.csv", [60.0] * 3 + ERRORS, minibatch=32)
    lines = "".join(f"{epoch},9,64\n" for epoch in epochs)
    other = written(tmp_path / "b.csv", f"epoch,error,minibatch\n{lines}")
    assert [entry.n for entry in read_paths([path, other]).flat] == [1, 1]
    assert read_csv(other).curve[0].epoch == epochs[0]


def test_runs_that_have_not_ended_are_nothing_to_report_yet(tmp_path: Path):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5, outcome="unfinished")
    with pytest.raises(ValueError, match="run: no run has ended yet, so there is nothing to report"):
        read_paths([run])
