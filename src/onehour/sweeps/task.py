"""A piece of a sweep: runs that differ by their seed, trained as one network where that is exact, else one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onehour.config import Recipe
from onehour.dist.launch import ENDS
from onehour.execution import Execution
from onehour.messages import say


@dataclass(frozen=True)
class Task:
    """Runs of completed recipes that are alike but for the seed, each in its folder."""

    recipes: tuple[Recipe, ...]
    folders: tuple[Path, ...]

    @property
    def images(self) -> float:
        """Trained on in all: a measure of the work."""
        return sum(recipe.epochs * (recipe.samples or 0) for recipe in self.recipes)


def run_task(task: Task, execution: Execution, stop_asked: Callable[[], bool]) -> str | None:
    """Train a task's runs to their ends; a run that diverges has come to its end too.

    Returns why its seeds were trained one by one; None where they were one network. A StoppedError when asked to stop.
    """
    reason: str | None = "several processes"
    if execution.processes == 1:
        reason = "one seed" if len(task.recipes) == 1 else _run_together(task, execution, stop_asked)
    if reason is not None:
        train = _run_processes if execution.processes > 1 else _run_alone
        for recipe, folder in zip(task.recipes, task.folders, strict=True):
            train(recipe, folder, execution, stop_asked)
    return reason


def _run_together(task: Task, execution: Execution, stop_asked: Callable[[], bool]) -> str | None:
    import torch

    from onehour.data.sources import complete
    from onehour.dist.devices import out_of_memory, pick_device
    from onehour.dist.group import Group
    from onehour.training.seeds import refuse_joining, train_seeds

    recipe, data = complete(task.recipes[0])
    group = Group(device=torch.device(pick_device(execution.device)))
    try:
        refuse_joining(recipe, data, group)
    except ValueError as error:
        return str(error)
    try:
        recipes = [recipe.replace(seed=other.seed) for other in task.recipes]
        train_seeds(recipes, data, task.folders, group, stop_asked=stop_asked)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "all at once they do not fit into memory"
    return None


def _run_alone(recipe: Recipe, folder: Path, execution: Execution, stop_asked: Callable[[], bool]) -> None:
    from onehour.runs import run
    from onehour.training.record import NonFiniteError

    with suppress(NonFiniteError):  # its summary says so, and the study counts it as chance
        run(recipe, Execution(out=folder, device=execution.device), stop_asked=stop_asked)


def _run_processes(recipe: Recipe, folder: Path, execution: Execution, stop_asked: Callable[[], bool]) -> None:
    from onehour.training.record import StoppedError
    from onehour.training.recorder import take_folder

    take_folder(folder, recipe, warn=say).release()  # writes its recipe
    # What the recipe names was asked for where the sweep was.
    flags = ["--trust", "--out", str(folder), "--processes", str(execution.processes), "--device", execution.device]
    command = [sys.executable, "-P", "-m", "onehour", "train", str(folder / "recipe.toml"), *flags]
    environ, stopping = os.environ | {ENDS: "1"}, False
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=environ) as process:
        try:
            said = None
            while said is None:
                try:
                    said = process.communicate(timeout=1)[1].strip()
                except subprocess.TimeoutExpired:
                    if not stopping and stop_asked():
                        stopping = True  # a second signal would end it before it has saved
                        process.terminate()
        except BaseException:
            if not stopping:
                process.terminate()
            raise
    if process.returncode == 75:
        raise StoppedError(said)
    if process.returncode not in (0, 4):
        said = said.removeprefix("onehour: ") or f"exit code {process.returncode}"
        raise ValueError(f"{folder.name}: {said}")
