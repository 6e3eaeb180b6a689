"""Folders that 0.1 wrote (v0_1/make.sh) resume, evaluate and report."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import onehour
from onehour.cli import main
from onehour.training.record import Run

OLD = Path(__file__).parent / "v0_1"
RECIPE = [
    *("train", "digits", "--model", "oldnet:net", "--base-lr", "0.05", "--minibatch", "1024", "--epochs", "2"),
    *("--warmup", "none", "--milestones", "1", "--device", "cpu", "--threads", "1"),
]
SWEEP = [
    *("sweep", "digits", "--base-lr", "0.1", "--model", "oldnet:net", "--minibatch", "512,1k"),
    *("--base-minibatch", "512"),
    *("--epochs", "1", "--warmup", "none", "--milestones", "1", "--arm", "none", "--jobs", "1", "--device", "cpu"),
]


@pytest.fixture(autouse=True)
def here(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, where their network can be imported."""
    shutil.copytree(OLD, alone, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(alone)
    monkeypatch.setenv("PYTHONPATH", str(alone))
    return alone


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_a_stopped_run_goes_on_to_the_end_that_0_1_found(here: Path):
    assert main([*RECIPE, "--out", "stopped"]) == 0
    sessions = json.loads(Path("stopped/environment.json").read_text(encoding="utf-8"))["sessions"]
    assert [session["from_iteration"] for session in sessions] == [0, 9]
    assert lines(Path("stopped/metrics.jsonl"))[:-1] == lines(OLD / "stopped" / "metrics.jsonl")
    was = lines(OLD / "finished" / "metrics.jsonl")[-1]
    assert lines(Path("stopped/metrics.jsonl"))[-1] == pytest.approx(was, rel=1e-3), "processors round differently"


def test_a_finished_run_is_not_trained_again(here: Path):
    before = {path: path.read_bytes() for path in Path("finished").rglob("*") if path.is_file()}
    assert main([*RECIPE, "--out", "finished"]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_evaluates_and_exports(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "finished", "--model", "oldnet:net"]) == 0
    assert "52.1" in capsys.readouterr().out
    assert main(["export", "finished", "--to", "weights.safetensors"]) == 0


def test_a_run_and_a_sweep_report(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.study.picture.FORMATS", ("svg",))
    assert main(["report", "sweep"]) == 0
    assert rows(Path("sweep/results.csv")) == rows(OLD / "sweep" / "results.csv")
    assert main(["report", "finished"]) == 0


@pytest.mark.usefixtures("forked")
def test_a_sweep_goes_on_with_more_seeds(here: Path):
    done = {path: path.read_bytes() for path in Path("sweep/cells").rglob("*.json*")}
    assert main([*SWEEP, "--seeds", "3", "--out", "sweep"]) == 0
    assert {path: path.read_bytes() for path in done} == done
    assert [Run(Path(f"sweep/cells/{size}-s2")).finished for size in (512, 1024)] == [True, True]


def test_a_pack_is_read(here: Path):
    from onehour.data.sources import load_data

    data = load_data("pack")
    assert (len(data.train), len(data.validation), data.classes) == (6, 6, 2)
    assert main(["data", "doctor", "pack"]) == 0
    assert onehour.recipe("resnet50", data="pack").data == "pack"
