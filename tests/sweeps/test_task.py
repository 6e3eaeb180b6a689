"""A piece of a sweep: its seeds as one network where that is exact, else one by one, and always to their ends."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tinytask import after
from torch import nn

from onehour.data.sources import complete
from onehour.execution import Execution
from onehour.sweeps.task import Task, run_task
from onehour.training.record import Run, StoppedError, latest_contents

pytestmark = pytest.mark.usefixtures("forked")

HERE = Execution(device="cpu", threads=1)


def never() -> bool:
    return False


def task_of(tiny: ModuleType, where: Path, seeds: range = range(3), **changes: Any) -> Task:
    recipe, _ = complete(tiny.recipe(**changes))
    return Task(tuple(recipe.replace(seed=seed) for seed in seeds), tuple(where / str(seed) for seed in seeds))


def runs(task: Task) -> list[Run]:
    return [Run(folder) for folder in task.folders]


def test_seeds_are_one_network_where_that_is_exact(tiny: ModuleType, tmp_path: Path):
    task = task_of(tiny, tmp_path)
    assert run_task(task, HERE, never) is None
    assert [(run.finished, run.summary["seeds_together"]) for run in runs(task)] == [(True, 3)] * 3
    assert [run.recipe for run in runs(task)] == list(task.recipes)
    assert task.images == 3 * 2 * 48


@pytest.mark.parametrize(
    ("changes", "model", "reason"),
    [
        ({"reduce": "canonical"}, None, "canonical, compile and channels_last are for single runs"),
        ({"data": "tinytask:listed", "classes": 3}, None, "the data does not lie in memory"),
        ({}, lambda net: net().append(nn.LogSoftmax(1)), "the joined network gives other logits"),
        ({}, lambda net: net().append(nn.Dropout(0.1)), "the model draws random numbers"),
    ],
)
def test_else_they_are_trained_one_by_one_and_it_is_said_why(
    tiny: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    model: Callable[[Callable[[], nn.Module]], nn.Module] | None,
    reason: str,
):
    net = tiny.net
    if model is not None:
        monkeypatch.setattr(tiny, "net", lambda: model(net))
    task = task_of(tiny, tmp_path, range(2), **changes)
    assert reason in (run_task(task, HERE, never) or "")
    assert [run.finished for run in runs(task)] == [True] * 2
    assert not any("seeds_together" in run.summary for run in runs(task))
    assert len({run.summary["weights_sha256"] for run in runs(task)}) == 2


def test_seeds_that_do_not_fit_into_memory_together_are_trained_one_by_one(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("onehour.training.seeds.train_seeds", full)
    task = task_of(tiny, tmp_path, range(2))
    assert run_task(task, HERE, never) == "all at once they do not fit into memory"
    assert all(Run(folder).finished for folder in task.folders)


@pytest.mark.parametrize("seeds", [1, 3])
def test_stopped_it_has_saved_and_the_same_task_goes_on(tiny: ModuleType, tmp_path: Path, seeds: int):
    task = task_of(tiny, tmp_path, range(seeds))
    with pytest.raises(StoppedError):
        run_task(task, HERE, after(8))
    assert all(latest_contents(folder) is not None for folder in task.folders)
    assert not any(run.summary for run in runs(task))
    run_task(task, HERE, never)
    for run in runs(task):
        assert run.finished
        assert run.environment["from_iteration"] == 8


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_that_leaves_the_finite_numbers_has_come_to_its_end_too(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int
):
    train, validation = tiny.data()
    train.tensors[0][-1, 0, 0, 0] = tiny.HUGE
    monkeypatch.setattr(tiny, "data", lambda: (train, validation))
    task = task_of(tiny, tmp_path, range(seeds))
    assert run_task(task, HERE, never) == (None if seeds > 1 else "one seed")
    assert [run.summary["outcome"] for run in runs(task)] == ["non-finite"] * seeds


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tinytask:failing"}, "model tinytask:failing failed when called: RuntimeError: no disk"),
        ({"model": "tinytask:nit"}, "tinytask has no 'nit'; expected net"),
        ({"optimizer": "nowhere:SGD"}, "nowhere cannot be imported"),
        ({"pitfall": "momentum-inside-uncorrected", "momentum": 0.0, "nesterov": False}, "needs optimizer sgd"),
    ],
)
def test_bad_input_is_one_message(tiny: ModuleType, tmp_path: Path, seeds: int, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as refused:
        run_task(task_of(tiny, tmp_path, range(seeds), **changes), HERE, never)
    assert len(str(refused.value).splitlines()) == 1


def test_a_run_may_have_several_processes(tiny: ModuleType, tmp_path: Path, environ: dict[str, str]):
    task = task_of(tiny, tmp_path, range(1))
    assert run_task(task, Execution(device="cpu", processes=2), never) == "several processes"
    (run,) = runs(task)
    assert run.finished
    assert run.environment["processes"] == 2
    assert run.recipe == task.recipes[0]


@pytest.mark.slow
def test_a_run_of_several_processes_is_told_once_to_stop_and_goes_on(
    tiny: ModuleType, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """An iteration takes longer than it takes to look again: a second signal would end it before it has saved."""
    monkeypatch.setenv("PAUSE", "2.5")
    task = task_of(tiny, tmp_path, range(1), model="sweeptask:slow")
    two = Execution(device="cpu", processes=2)
    folder = task.folders[0]
    with pytest.raises(StoppedError):
        run_task(task, two, lambda: (folder / "environment.json").exists())
    stopped = latest_contents(folder)
    assert stopped is not None
    iteration = json.loads(stopped[-1])["iteration"]
    assert 0 < iteration < 12
    monkeypatch.setenv("PAUSE", "0")
    run_task(task, two, never)
    assert runs(task)[0].finished
    assert runs(task)[0].environment["from_iteration"] == iteration


def test_more_processes_than_workers_are_one_message(tiny: ModuleType, tmp_path: Path, environ: dict[str, str]):
    task = task_of(tiny, tmp_path, range(1))
    with pytest.raises(ValueError, match=r"^0: 3 processes cannot share 2 workers") as refused:
        run_task(task, Execution(device="cpu", processes=3), never)
    assert len(str(refused.value).splitlines()) == 1
