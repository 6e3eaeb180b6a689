"""What a sweep's folder lacks, who may go on in it, and how long that will take."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweeptask
from sweeptask import names

from onehour.config import Recipe
from onehour.execution import Execution
from onehour.lock import HeldFolder
from onehour.sweeps.sweep import Work, expected_seconds, pick_jobs, places_of, train_sweep, work_of


def pretend(folder: Path, recipe: Recipe, outcome: str = "finished", speed: float | None = 1000.0) -> None:
    """A cell that has ended."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    (folder / "summary.json").write_text(json.dumps({"outcome": outcome, "images_per_second": speed}))


@pytest.mark.parametrize(
    ("jobs", "together", "expected"),
    [
        (1, None, [["8-s0", "8-s1", "8-s2"], ["16-s0", "16-s1", "16-s2"]]),
        (2, None, [["8-s0", "8-s1", "8-s2"], ["16-s0", "16-s1", "16-s2"]]),
        (3, None, [["8-s1", "8-s2"], ["16-s1", "16-s2"], ["8-s0"], ["16-s0"]]),
        (6, None, [["8-s0"], ["8-s1"], ["8-s2"], ["16-s0"], ["16-s1"], ["16-s2"]]),
        (99, None, [["8-s0"], ["8-s1"], ["8-s2"], ["16-s0"], ["16-s1"], ["16-s2"]]),
        (99, 3, [["8-s0", "8-s1", "8-s2"], ["16-s0", "16-s1", "16-s2"]]),
        (1, 2, [["8-s1", "8-s2"], ["16-s1", "16-s2"], ["8-s0"], ["16-s0"]]),
    ],
)
def test_seeds_are_grouped_so_that_every_job_has_something_to_do(
    tmp_path: Path, jobs: int, together: int | None, expected: list[list[str]]
):
    work = work_of(sweeptask.spec(seeds=3), tmp_path, jobs=jobs, together=together)
    assert names(work) == expected
    assert work.left == 6
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_no_more_than_ten_seeds_are_one_network(tmp_path: Path):
    work = work_of(sweeptask.spec(minibatches=(8,), seeds=23), tmp_path, jobs=1)
    assert [len(task.recipes) for task in work.tasks] == [8, 8, 7]
    seeds = sorted(recipe.seed for task in work.tasks for recipe in task.recipes)
    assert seeds == list(range(23))


@pytest.mark.parametrize("together", [0, -1])
def test_seeds_together_must_be_a_count(tmp_path: Path, together: int):
    with pytest.raises(ValueError, match="seeds_together must be above zero"):
        work_of(sweeptask.spec(), tmp_path, jobs=1, together=together)


def test_what_has_ended_is_left_out_even_where_it_left_the_finite_numbers(tmp_path: Path):
    spec = sweeptask.spec(seeds=3)
    recipes = {cell.name: cell.recipe for cell in spec.cells()}
    spec.write(tmp_path)
    for name, outcome in (("8-s0", "finished"), ("8-s2", "non-finite"), ("16-s1", "finished")):
        pretend(tmp_path / "cells" / name, recipes[name], outcome)
    half = tmp_path / "cells" / "16-s0"
    half.mkdir()
    (half / "recipe.toml").write_text(recipes["16-s0"].to_toml())
    work = work_of(spec, tmp_path, jobs=1)
    assert names(work) == [["16-s0", "16-s2"], ["8-s1"]]
    assert [cell.name for cell in work.cells] == list(recipes)


def test_what_a_kill_leaves_in_the_first_moment_is_no_obstacle(tmp_path: Path):
    """Files that were being written, of the sweep and of a cell."""
    cell = tmp_path / "cells" / "8-s0"
    cell.mkdir(parents=True)
    (cell / ".recipe.toml.writing").touch()
    spec = sweeptask.spec()
    (tmp_path / "a").mkdir()
    for name in (".lock", ".sweep.toml.writing"):
        (tmp_path / "a" / name).touch()
    assert work_of(spec, tmp_path / "a", jobs=1).left == 4
    spec.write(tmp_path)
    assert work_of(spec, tmp_path, jobs=1).left == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_lr": 0.3}, r"another recipe \(base_lr: 0\.1 → 0\.3\); choose another --out"),
        ({"base_lr": 0.3, "epochs": 3}, r"(epochs: 2 → 3; base_lr: 0\.1 → 0\.3|base_lr: 0\.1 → 0\.3; epochs: 2 → 3)"),
        ({"pitfall": "overlapping-shards"}, r"\(pitfall: None → overlapping-shards\)"),
        ({"per_worker": 16, "minibatches": (16,), "minibatch": 16}, r"\(per_worker: 4 → 16\)"),
        ({"per_worker": 3, "minibatches": (9,), "minibatch": 9}, r"\(per_worker: 4 → 3\)"),
    ],
)
def test_a_sweep_of_another_recipe_is_refused_with_the_difference_alone(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    sweeptask.spec().write(tmp_path)
    before = (tmp_path / "sweep.toml").read_bytes()
    with pytest.raises(ValueError, match=message):
        next(train_sweep(sweeptask.spec(**changes), tmp_path, jobs=1, execution=sweeptask.HERE))
    assert (tmp_path / "sweep.toml").read_bytes() == before


def test_other_minibatches_and_seeds_are_no_other_recipe(tmp_path: Path):
    sweeptask.spec().write(tmp_path)
    assert work_of(sweeptask.spec(minibatches=(48,), seeds=5, minibatch=16, seed=7), tmp_path, jobs=1).left == 5


def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files and no sweep\.toml; choose another --out"):
        next(train_sweep(sweeptask.spec(), tmp_path, jobs=1, execution=sweeptask.HERE))
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.tex", ".lock"}
    with HeldFolder(tmp_path, patience=0):
        pass


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sweep.toml", "minibatches = [8", "sweep.toml: "),
        ("sweep.toml", "minibatches = [8]", "sweep.toml has no recipe; it was written by a sweep: do not edit it"),
        ("cells/8-s0/recipe.toml", "name = ", "recipe.toml: "),
        ("cells/8-s0/recipe.toml", 'name = "tiny"\n', "is a run of another recipe"),
        ("cells/8-s0/summary.json", '{"outcome": "fini', "summary.json is damaged"),
        ("cells/8-s0/notes.txt", "", r"8-s0 holds other files and no recipe\.toml"),
    ],
)
def test_a_folder_that_was_edited_or_cut_is_one_message(tmp_path: Path, name: str, text: str, message: str):
    spec = sweeptask.spec()
    spec.write(tmp_path)
    cell = next(spec.cells())
    if "notes" not in name:
        pretend(tmp_path / "cells" / cell.name, cell.recipe)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        work_of(spec, tmp_path, jobs=1)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("visible", "gpus", "jobs", "processes", "expected"),
    [
        (None, 0, 2, 1, [None, None]),
        (None, 1, 2, 1, ["0", "0"]),
        (None, 4, 2, 1, ["0", "1"]),
        (None, 2, 4, 1, ["0", "1", "0", "1"]),
        (None, 4, 2, 2, ["0,1", "2,3"]),
        (None, 5, 3, 2, ["0,1", "2,3", "0,1"]),
        (None, 2, 1, 4, ["0,1"]),  # more processes than GPUs share them
        ("4,6", 2, 3, 1, ["4", "6", "4"]),
    ],
)
def test_gpus_are_dealt_out_to_the_processes(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, jobs: int, processes: int, expected: list[str]
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = places_of(jobs, Execution(device="cuda", processes=processes))
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places] == expected
    assert len(places_of(jobs, Execution(device="cpu", processes=processes))) == jobs


def test_a_job_for_each_core_or_gpu_and_the_cores_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("onehour.machine._quotas", lambda *_: [])
    monkeypatch.delenv("OMP_NUM_THREADS")
    here = Execution(device="cpu", threads=1)
    assert pick_jobs(None, processes=1, device="cpu") == (8, here)
    assert pick_jobs(3, processes=1, device="cpu") == (3, Execution(device="cpu", threads=2))
    assert pick_jobs(None, processes=2, device="cpu") == (1, Execution(device="cpu", threads=4, processes=2))
    assert places_of(3, here) == [{"ONEHOUR_CORES": "2"}] * 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert pick_jobs(None, processes=1, device="auto") == (4, Execution(device="cuda", threads=2))
    assert pick_jobs(None, processes=4, device="auto")[0] == 1
    with pytest.raises(ValueError, match="--processes 5 needs 5 GPUs, one each, and torch sees 4 GPUs here"):
        pick_jobs(None, processes=5, device="auto")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pick_jobs(2, processes=1, device="cpu")[1].threads is None
    for jobs in (0, -2):
        with pytest.raises(ValueError, match="jobs must be above zero"):
            pick_jobs(jobs, processes=1, device="cpu")


def test_the_time_that_is_left_follows_from_the_cells_that_have_ended(tmp_path: Path):
    """48 images an epoch, 2 epochs: 96 images a run."""
    spec = sweeptask.spec(seeds=3)
    spec.write(tmp_path)
    cells = {cell.name: cell.recipe for cell in spec.cells()}
    pretend(tmp_path / "cells" / "8-s0", cells["8-s0"], speed=40.0)
    pretend(tmp_path / "cells" / "8-s1", cells["8-s1"], speed=20.0)
    pretend(tmp_path / "cells" / "16-s1", cells["16-s1"], "non-finite", speed=None)
    for jobs, expected in ((1, 3 * 96 / 30), (2, 3 * 96 / 30 / 2), (9, 3 * 96 / 30 / 3)):
        work = work_of(spec, tmp_path, jobs=jobs)
        assert expected_seconds(work, jobs=jobs, execution=sweeptask.HERE) == pytest.approx(expected)
    assert expected_seconds(Work((), (), tmp_path), jobs=1, execution=sweeptask.HERE) == 0


@pytest.mark.parametrize(("together", "reduce", "passes"), [(3, "fast", 1), (3, "canonical", 3), (1, "fast", 3)])
def test_without_any_the_first_task_is_tried_and_nothing_stays_of_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    together: int,
    reduce: str,
    passes: int,
):
    """By this clock an iteration takes .05 seconds, be it of one seed or of three; canonical runs are single."""
    ticks = itertools.count(0, 0.05)
    monkeypatch.setattr("onehour.sweeps.sweep.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    spec = sweeptask.spec(minibatches=(8,), seeds=3, epochs=40, reduce=reduce)
    work = work_of(spec, tmp_path / "sweep", jobs=1, together=together)
    found = expected_seconds(work, jobs=1, execution=sweeptask.HERE)
    assert 0.95 < found / (40 * 6 * 0.05 * passes) < 1.05
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "sweep").exists()
    assert not any((tmp_path / "temporary").glob("tmp*"))  # torch puts a cache of its own there
