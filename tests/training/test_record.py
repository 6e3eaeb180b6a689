"""A run's folder: every file with what it must hold, the record deterministic, the recipe enough to repeat it."""

import hashlib
import json
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from onehour.api import train
from onehour.machine import cores
from onehour.training.record import Run, final_error, move_aside, refuse_other_classes
from onehour.training.recorder import take_folder


@pytest.fixture(scope="module")
def run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    # The watchdog leaves a file where the run takes longer than a second.
    return train(tiny.recipe(), out=tmp_path_factory.mktemp("record") / "run", hang_timeout=None)


def test_a_finished_folder_holds_these_files(run: Run):
    parts = {"environment.json", "metrics.jsonl", "recipe.toml", "summary.json", "timing.jsonl"}
    assert {path.name for path in run.folder.iterdir()} == {".lock", "checkpoints"} | parts
    saved = {"manifest.json", "model.safetensors", "optimizer.safetensors", "progress.json"}
    for checkpoint in (run.folder / "checkpoints").iterdir():
        assert {path.name for path in checkpoint.iterdir()} == saved


def test_the_record_begins_with_the_recipe_and_holds_an_evaluation_an_epoch(run: Run):
    first, *others = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert first == {"recipe": run.recipe.as_dict()}
    assert first["recipe"]["samples"] == 48  # the data said so
    assert others == run.metrics
    assert [(r["epoch"], r["iteration"], r["position"]) for r in others] == [(1, 6, 48), (2, 12, 96)]
    for record in others:
        assert sorted(record) == [
            *("epoch", "iteration", "lr", "position"),
            *("top1_error", "train_error", "train_loss", "val_loss"),
        ]
        assert record["lr"] == run.recipe.schedule((record["iteration"] - 1) / 6)
        assert 0 <= record["train_error"] <= 100
        assert record["top1_error"] * 20 % 100 == pytest.approx(0)  # a count out of 20


def test_recipe_toml_repeats_the_run(run: Run, tmp_path: Path):
    again = train(str(run.folder / "recipe.toml"), out=tmp_path / "again", trust=True)
    assert again.summary["weights_sha256"] == run.summary["weights_sha256"]
    assert again.summary["state_sha256"] == run.summary["state_sha256"]


def test_timing_splits_each_step(run: Run):
    for line in run.timing:
        assert {"epoch", "iteration", "images", "seconds", "images_per_second", "evaluate_seconds"} <= line.keys()
        assert line["parts"] == ["data", "compute", "reduction", "update"]
        assert len(line["steps_ms"]) == 6
        assert all(len(step) == 4 and min(step) >= 0 for step in line["steps_ms"])
        assert sum(map(sum, line["steps_ms"])) <= 1000 * line["seconds"] + 1
        assert line["images"] == 48
        assert line["images_per_second"] == pytest.approx(48 / line["seconds"])


def test_the_summary_says_how_it_ended(run: Run):
    summary = run.summary
    assert summary["outcome"] == "finished"
    assert (summary["recipe"], summary["minibatch"], summary["seed"]) == ("tiny", 8, 0)
    assert (summary["epochs"], summary["iterations"]) == (2, 12)
    errors = [record["top1_error"] for record in run.metrics]
    assert summary["last_errors"] == errors
    assert summary["final_error"] == run.final_error == sum(errors) / 2  # the median of two
    seconds = sum(line["seconds"] for line in run.timing)
    assert summary["images_per_second"] == pytest.approx(96 / seconds)
    assert set(summary["step_ms"]) == {"data", "compute", "reduction", "update"}
    slowest = max(summary["step_ms"], key=summary["step_ms"].get)
    names = {"data": "data", "compute": "forward and backward", "reduction": "reduction", "update": "update"}
    assert names[slowest] in summary["bottleneck"]


def test_the_summary_describes_parameters_and_buffers(run: Run):
    summary = run.summary
    assert summary["parameters"] == 4 * 9 + 4 + 4 + 4 + 16 * 3 + 3
    assert summary["parameter_bytes"] == summary["optimizer_bytes"] == 4 * summary["parameters"]
    assert summary["parameter_tensors"]["0.weight"] == {"shape": [4, 1, 3, 3], "dtype": "float32", "bytes": 144}
    assert summary["buffer_tensors"]["1.running_var"] == {"shape": [4], "dtype": "float32", "bytes": 16}
    assert summary["buffer_bytes"] == 2 * 16 + 8


def test_the_digests_are_those_of_the_files_that_were_saved(run: Run):
    """Over sorted keys, dtypes, shapes and bytes; recomputed with numpy alone."""

    def update(file: str) -> None:
        tensors = load_file(run.folder / "checkpoints" / "iteration-000000012" / file)
        for name in sorted(tensors):
            array: np.ndarray = tensors[name]
            digest.update(f"{name} torch.{array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())

    digest = hashlib.sha256()
    update("model.safetensors")
    assert run.summary["weights_sha256"] == digest.hexdigest()
    update("optimizer.safetensors")
    assert run.summary["state_sha256"] == digest.hexdigest()


def test_the_environment_says_what_a_result_may_depend_on(run: Run):
    (session,) = json.loads((run.folder / "environment.json").read_text())["sessions"]
    assert session["from_iteration"] == 0
    assert session["processes"] == 1
    assert session["workers_per_pass"] == 2
    assert session["cores"] == cores()
    assert {"command", "python", "torch", "numpy", "platform", "processor", "threads", "device"} <= session.keys()


@pytest.mark.parametrize(
    ("errors", "median"),
    [([5.0], 5.0), ([5.0, 7.0], 6.0), ([99.0, 1.0, 2.0, 3.0, 4.0, 5.0], 3.0), ([1.0, 9.0, 2.0, 8.0, 3.0], 3.0)],
)
def test_the_final_error_is_the_median_of_the_last_five(errors: list[float], median: float):
    assert final_error(errors) == median


def test_a_run_says_what_it_is(run: Run, tiny: ModuleType, tmp_path: Path):
    assert repr(run) == f"Run({str(run.folder)!r}: final error {run.final_error:.2f} %)"
    take_folder(tmp_path / "new", tiny.recipe(samples=48), warn=print).release()
    new = Run(tmp_path / "new")
    assert "unfinished" in repr(new)
    assert new.metrics == []
    assert new.timing == []
    assert new.summary == {}
    with pytest.raises(ValueError, match="has no evaluation yet"):
        _ = new.final_error


def test_a_damaged_record_is_one_message_with_its_path(run: Run, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(run.recipe.to_toml())
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text("{\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        _ = Run(tmp_path).metrics
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        _ = Run(tmp_path).summary


def test_the_record_is_brought_to_disk_before_the_checkpoint_and_not_by_the_training(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync, rename, done = os.fsync, Path.rename, []

    def note(name: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            done.append(name)

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        note(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def renamed(path: Path, to: Path) -> Path:
        note(f"→ {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    train(tiny.recipe(epochs=1), out=tmp_path / "run")
    assert done[:3] == ["metrics.jsonl", "timing.jsonl", "run"]
    assert "→ iteration-000000006" in done[3:]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat", "é"], None),
        (["cat", "e\u0301"], None),  # as another disk spells it
        ([], None),
        (["dog", "é"], "class 0 of .* was 'cat' when it was trained, and in the data it is 'dog'"),
        (["cat"], "class 1 of .* was 'é' when .* it is none"),
        (["cat", "é", "z"], "class 2 of .* was none when .* it is 'z'"),
    ],
)
def test_classes_are_compared_by_name_and_place(run: Run, names: list[str], said: str | None):
    refused = nullcontext() if said is None else pytest.raises(ValueError, match=said)
    with mock.patch.object(Run, "class_names", ["cat", "é"]), refused:
        refuse_other_classes(run, names)


def test_of_a_link_the_folder_behind_it_is_moved_aside(tmp_path: Path):
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (tmp_path / "disk" / "mine" / "old").touch()
    (tmp_path / "run").symlink_to("disk/mine")
    assert move_aside(tmp_path / "run") == tmp_path / "disk" / "mine.1"
    assert (tmp_path / "disk" / "mine.1" / "old").exists()
    assert (tmp_path / "run").readlink() == Path("disk/mine")
    assert [*(tmp_path / "run").iterdir()] == []
