"""Folders that were edited by hand or cut: each is one message that names the file and what was expected."""

import importlib
import json
from pathlib import Path

import pytest

from onehour.study.others import read_paths
from onehour.study.sound import check_folders, check_run

studies = importlib.import_module("studies")


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
