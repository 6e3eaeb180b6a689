"""Tasks on processes of their own: what ends one, and what is left when one is ended."""

import os
from multiprocessing import active_children
from pathlib import Path

import pytest
import sweeptask

from onehour.lock import HeldFolder
from onehour.sweeps.pool import Event, run_tasks
from onehour.sweeps.task import Task
from onehour.training.record import Run

pytestmark = pytest.mark.usefixtures("forked")


def one(folder: Path, model: str, *, seed: int = 0) -> Task:
    """A run of the tiny task with a model of the helpers', whose folder has its name."""
    name = f"{model.rpartition(':')[2]}-{seed}"
    recipe = sweeptask.spec(minibatches=(8,), model=model).recipe.replace(seed=seed)
    return Task((recipe,), (folder / name,))


def locked(folder: Path) -> HeldFolder:
    """As a sweep has it: it does not wait."""
    return HeldFolder(folder, patience=0)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tinytask:failing", "model tinytask:failing failed when called: RuntimeError: no "),
        ("sweeptask:breaking", r"KeyError: 'a bug of my own' \(.*sweeptask\.py:\d+\)"),
    ],
)
def test_bad_input_and_an_error_of_a_model_are_one_message_and_what_has_ended_stays(
    tmp_path: Path, model: str, said: str
):
    tasks = [one(tmp_path, name) for name in ("sweeptask:telling", model, "tinytask:net")]
    seen = []
    with locked(tmp_path) as held:
        events = run_tasks(tasks, places=[{"PLACE": "this place"}], execution=sweeptask.HERE, held=held)
        with pytest.raises(ValueError, match=said) as refused:
            seen.extend(events)
    assert len(str(refused.value).splitlines()) == 1
    assert Event(tasks[0], "one seed") in seen
    assert Run(tmp_path / "telling-0").finished
    assert not (tmp_path / "net-0").exists()
    log = (tmp_path / "log-0.txt").read_text()
    assert "built in this place" in log
    assert "epoch   2/2" in log
    assert "PLACE" not in os.environ
    assert not active_children()
    with locked(tmp_path):  # the process that had it has ended
        pass


def test_whoever_no_longer_wants_the_events_leaves_no_process(tmp_path: Path):
    tasks = [one(tmp_path, "sweeptask:slow", seed=seed) for seed in range(9)]
    with locked(tmp_path) as held:
        events = run_tasks(tasks, places=[{}], execution=sweeptask.HERE, held=held)
        while not (tmp_path / "slow-0" / "metrics.jsonl").exists():
            assert next(events) == Event(running=(tasks[0],))
        assert len(active_children()) == 1
        events.close()  # type: ignore[attr-defined]
    assert not active_children()
    assert Run(tmp_path / "slow-0").summary == {}
    assert len(list(tmp_path.glob("slow-*"))) == 1
    with locked(tmp_path):
        pass
