"""Tasks on processes of their own: what ends one, and what is left when one is ended."""

import importlib
import os
from multiprocessing import active_children
from pathlib import Path
from types import ModuleType

import pytest

from onehour.lock import HeldFolder
from onehour.sweeps.pool import Event, run_tasks
from onehour.sweeps.task import Task
from onehour.training.record import Run

# Where processes are started that import torch: seconds on a machine that others use too.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def task() -> ModuleType:
    """tests/helpers/sweeptask.py."""
    return importlib.import_module("sweeptask")


def one(task: ModuleType, folder: Path, model: str, *, seed: int = 0) -> Task:
    """A run of the tiny task with a model of the helpers', whose folder has its name."""
    name = f"{model.rpartition(':')[2]}-{seed}"
    recipe = task.spec(minibatches=(8,), model=model).recipe.replace(seed=seed)
    return Task((recipe,), (folder / name,))


def locked(folder: Path) -> HeldFolder:
    """As a sweep has it: it does not wait."""
    return HeldFolder(folder, patience=0)


def test_no_tasks_need_no_process(task: ModuleType, tmp_path: Path):
    with locked(tmp_path) as held:
        events = run_tasks([], places=[{}, {}], execution=task.HERE, held=held)
        assert list(events) == []
    assert not list(tmp_path.glob("log*"))


def test_a_task_with_bad_input_is_one_message_and_what_has_ended_stays(task: ModuleType, tmp_path: Path):
    models = ("sweeptask:telling", "tinytask:failing", "tinytask:net")
    tasks, places = [one(task, tmp_path, model) for model in models], [{"PLACE": "this place"}]
    seen = []
    with locked(tmp_path) as held:
        events = run_tasks(tasks, places=places, execution=task.HERE, held=held)
        with pytest.raises(ValueError, match="model tinytask:failing failed when called: RuntimeError: no ") as refused:
            seen.extend(events)
    assert len(str(refused.value).splitlines()) == 1
    assert Event(tasks[0], "one seed") in seen
    assert Run(tmp_path / "telling-0").finished
    assert not (tmp_path / "net-0").exists()
    said = (tmp_path / "log-0.txt").read_text()
    assert "built in this place" in said
    assert "epoch   2/2" in said
    assert "PLACE" not in os.environ
    assert not active_children()
    with locked(tmp_path):  # the process that had it has ended
        pass


def test_an_error_of_a_model_is_one_message_with_its_line(task: ModuleType, tmp_path: Path):
    tasks = [one(task, tmp_path, "sweeptask:breaking")]
    with locked(tmp_path) as held:
        events = run_tasks(tasks, places=[{}], execution=task.HERE, held=held)
        with pytest.raises(ValueError, match=r"KeyError: 'a bug of my own' \(.*sweeptask\.py:\d+\)") as failed:
            list(events)
    assert len(str(failed.value).splitlines()) == 1
    assert not active_children()


def test_whoever_no_longer_wants_the_events_leaves_no_process(task: ModuleType, tmp_path: Path):
    tasks = [one(task, tmp_path, "sweeptask:slow", seed=seed) for seed in range(9)]
    with locked(tmp_path) as held:
        events = run_tasks(tasks, places=[{}], execution=task.HERE, held=held)
        while not (tmp_path / "slow-0" / "metrics.jsonl").exists():
            assert next(events) == Event(running=(tasks[0],))
        assert len(active_children()) == 1
        events.close()  # type: ignore[attr-defined]
    assert not active_children()
    assert Run(tmp_path / "slow-0").summary == {}
    assert len(list(tmp_path.glob("slow-*"))) == 1
    with locked(tmp_path):
        pass
