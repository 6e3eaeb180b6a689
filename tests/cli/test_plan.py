"""`onehour plan` and what it prints; the values themselves are tested in test_planner.py."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from onehour.api import train
from onehour.cli import main

IMAGENET = ["--samples", "1281167"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *arguments]) == 0
    heard = capsys.readouterr()
    assert heard.err == ""
    return heard.out


def test_a_plan_prints_value_base_rule_and_section_of_each(capsys: pytest.CaptureFixture[str]):
    lines = said(["resnet50", "--minibatch", "8k"], capsys).splitlines()
    head, *others = [line.split() for line in lines]
    assert head == ["value", "at", "8192", "at", "256", "rule", "section"]
    rows = {cells[0]: (cells, line) for cells, line in zip(others, lines[1:], strict=True)}
    for name, value, base, rule, section in (
        ("target_lr", "3.2", "0.1", "kn/256", "§2.1"),
        ("per_worker", "32", "32", "BatchNorm", "§2.3"),
        ("workers", "256", "8", "8192 / 32", "§2.3"),
        ("iterations", "14076", "450411", "nothing dropped", "§3"),
        ("warmup_epochs", "5", "0", "counted inside", "§2.2"),
        ("lr_at_epoch_30", "0.32", "0.01", "0.1", "§5.1"),
        ("lr_at_epoch_80", "0.0032", "0.0001", "0.1", "§5.1"),
    ):
        cells, line = rows[name]
        assert cells[1:3] == [value, base]
        assert cells[-1] == section
        assert rule in line


def test_a_plan_without_a_recipe_takes_a_rate_and_its_minibatch(capsys: pytest.CaptureFixture[str]):
    flags = ["--base", "0.1@256", *IMAGENET, "--minibatch", "8k", "--processes", "256", "--json"]
    found = json.loads(said(flags, capsys))
    expected = {"minibatch": 8192, "per_worker": 32, "workers": 256, "base_lr": 0.1, "target_lr": 3.2, "placement": 256}
    assert {name: found[name]["value"] for name in expected} == expected
    assert found["target_lr"]["section"] == "2.1"


@pytest.mark.parametrize("recipe", [["resnet50"], ["--base", "0.1@256", *IMAGENET]])
def test_several_minibatches_print_the_papers_table(capsys: pytest.CaptureFixture[str], recipe: list[str]):
    head, *rows = [
        line.split() for line in said([*recipe, "--minibatch", "256,512,1k,2k,4k,8k,16k"], capsys).splitlines()
    ]
    assert head[:3] == ["minibatch", "workers", "target_lr"]
    rates = [(row[0], row[2]) for row in rows]
    sizes = ["256", "512", "1024", "2048", "4096", "8192", "16384"]
    assert rates == list(zip(sizes, ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "6.4"], strict=True))
    found = json.loads(said([*recipe, "--minibatch", ",".join(sizes), "--json"], capsys))
    assert [plan["target_lr"]["value"] for plan in found] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4]


@pytest.mark.parametrize(("typed", "epochs"), [("1k", 1024), ("1.5", 1.5)])
def test_epochs_are_a_count_or_any_number(capsys: pytest.CaptureFixture[str], typed: str, epochs: float):
    assert json.loads(said(["digits", "--epochs", typed, "--json"], capsys))["epochs"]["value"] == epochs


def test_detection_prints_t3b(capsys: pytest.CaptureFixture[str]):
    rows = [line.split() for line in said(["detection", "--minibatch", "2,4,8,16"], capsys).splitlines()[1:]]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("2", "0.0025", "1280000"),
        ("4", "0.005", "640000"),
        ("8", "0.01", "320000"),
        ("16", "0.02", "160000"),
    ]


def test_a_ramp_grows_to_each_minibatch_of_a_plan(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "digits", "--minibatch", "1k,2k", "--ramp", "256:8,512:16"]) == 0
    iterations = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert iterations == [8 * 8192 // 256 + 8 * 8192 // 512 + 8 * 8192 // kn for kn in (1024, 2048)]


def test_speed_adds_hours(capsys: pytest.CaptureFixture[str]):
    plan = json.loads(said(["resnet50", "--minibatch", "8k", "--images-per-second", "32029", "--json"], capsys))
    assert plan["hours"]["value"] == pytest.approx(1, abs=1e-4)
    assert "hours" not in json.loads(said(["resnet50", "--json"], capsys))


def test_a_runs_own_speed_adds_hours(tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without another recipe the run's own is planned."""
    run = train(tiny.recipe(milestones=("3/2",)), out=tmp_path / "run")
    capsys.readouterr()
    plan = json.loads(said(["--run", str(run.folder), "--json"], capsys))
    seconds = sum(line["seconds"] for line in run.timing)
    assert plan["iterations"]["value"] == run.summary["iterations"]
    assert plan["hours"]["value"] == pytest.approx(seconds / 3600, rel=1e-3)
    sizes = f"{run.recipe.minibatch},{2 * run.recipe.minibatch}"
    flags = ["--minibatch", sizes, "--processes", "1,2", "--bandwidth", "10", "--price", "2", "--holds-to", "8,64"]
    head, *rows = said(["--run", str(run.folder), *flags], capsys).splitlines()
    columns = head.split()
    assert columns[-5:] == ["processes", "hours", "efficiency", "price", "largest_workers"]
    table = [dict(zip(columns, row.split(), strict=True)) for row in rows[:4]]
    assert [row["processes"] for row in table] == ["1", "2", "1", "2"]
    assert len({row["hours"] for row in table}) == 4
    for row in table:
        assert float(row["price"]) == pytest.approx(2 * int(row["processes"]) * float(row["hours"]), rel=1e-4)
    below = [line.partition(":")[0] for line in rows[4:]]
    assert list(dict.fromkeys(below)) == [
        *("image_seconds", "slowest", "reduction_seconds", "iteration_seconds", "hours", "efficiency", "price")
    ]


def test_a_run_that_has_not_ended_has_no_speed(tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "recipe.toml").write_text(tiny.recipe().to_toml())
    assert main(["plan", "--run", str(tmp_path)]) == 2
    assert "has no images_per_second yet" in capsys.readouterr().err


def test_a_pair_that_cannot_be_is_said_beside_the_table_of_the_others(capsys: pytest.CaptureFixture[str]):
    arguments = ["plan", "resnet50", "--minibatch", "256,8k", "--processes", "8,64"]
    assert main(arguments) == 0
    heard = capsys.readouterr()
    assert [line.split()[::5] for line in heard.out.splitlines()[1:]] == [["256", "8"], ["8192", "8"], ["8192", "64"]]
    (line,) = heard.err.splitlines()
    assert line.startswith("note: minibatch 256, processes 64 is not possible: ")
    assert main([*arguments[:2], "--minibatch", "256,512", "--processes", "64", "--json"]) == 2
    assert "64 processes" in capsys.readouterr().err


def test_flags_and_files_change_the_plan(tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.toml").write_text('minibatch = "1k"\nsamples = 5000\nbase_lr = 0.3\n')
    plan = json.loads(said([str(tmp_path / "mine.toml"), "--scaling", "sqrt", "--warmup", "none", "--json"], capsys))
    assert plan["target_lr"]["value"] == pytest.approx(0.6)
    assert plan["iterations"]["value"] == -(-90 * 5000 // 1024)
    assert plan["warmup_epochs"]["value"] == 0
