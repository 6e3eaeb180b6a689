"""The same from Python: train a run, or the runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.dist.launched import refuse_several
from onehour.dist.watchdog import never
from onehour.entry import asked_for
from onehour.execution import Execution, default_folder
from onehour.recipes import recipe as named
from onehour.rules.arguments import whole_number
from onehour.runs import run
from onehour.study.results import Study, read_study
from onehour.study.spec import spec_of
from onehour.sweeps.sweep import pick_jobs, train_sweep
from onehour.training.record import Run
from onehour.training.task import Sums

__all__ = ["sweep", "train"]


def train(
    recipe: Recipe | str,
    *,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    data: Any = None,
    task: Callable[[Any, Any], Sums] | str | None = None,
    collate: Callable[[list[Any]], Any] | str | None = None,
    trust: bool = False,
    stop_asked: Callable[[], bool] = never,
    **options: Any,
) -> Run:
    """Train a recipe and return its run, or the finished run if the folder already holds it.

    One process, unless torchrun, srun or mpirun started several that all call this.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file.
        model: in place of the recipe's: a torch.nn.Module, a function that returns one, or a name.
        task: what is learned, in place of classification: a function (model, batch) that returns `onehour.Sums`.
        collate: turns a list of a task's samples into a batch.
        data: in place of the recipe's: (train, validation), two map-style data sets of (image, label), or a name; one
            data set, where `validation` says how much of it is validated on.
        trust: import what a .toml file names, without its being named here.
        stop_asked: read at every iteration; saves and stops when it says yes.
        options: fields of `Recipe` (minibatch=256) and of `Execution` (out="runs/mine", fresh=True).

    Returns:
        The run, with `.final_error`, `.metrics`, `.timing` and `.summary`.

    Raises:
        ValueError: for bad input.
        NonFiniteError: when the loss leaves the finite numbers.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train("digits", minibatch=1024, epochs=1, warmup_epochs=1, out=folder)  # doctest: +ELLIPSIS
    ...     len(run.metrics)
    digits: minibatch 1024 = 64 workers × 16 on 1 process, rate 0.2 → 6.4, 1 epoch, 8 iterations, seed 0
    writes ...
    BatchNorm ...
    epoch   1/1 ...
    1
    """
    where = {f.name for f in fields(Execution)}
    places: dict[str, Any] = {key: value for key, value in options.items() if key in where}
    for name in ("out", "continues"):
        if places.get(name) is not None:
            places[name] = Path(places[name])
    execution = Execution(**places)
    changes = {key: value for key, value in options.items() if key not in where}
    given: dict[str, Any] = {"model": model, "task": task, "collate": collate}
    for name, value in given.items():
        if isinstance(value, str):
            changes[name], given[name] = value, None
        elif value is not None:
            changes[name] = f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    if isinstance(data, str):
        changes["data"] = data
    elif data is not None:
        changes["data"] = f"<{type(data[0]).__qualname__}>" if isinstance(data, tuple | list) and data else "<data>"
    chosen = named(recipe, **changes) if isinstance(recipe, str | Path) else recipe.replace(**changes)
    return run(
        asked_for(chosen, trust=trust),
        execution,
        **given,
        data=None if isinstance(data, str) else data,
        stop_asked=stop_asked,
    )


def sweep(
    recipe: Recipe | str,
    *,
    minibatches: Sequence[int] | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    arms: Sequence[str] | str = ("table",),
    arms_at: Sequence[int] | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    processes: int = 1,
    device: str = "auto",
    seeds_together: int | None = None,
    trust: bool = False,
    **changes: Any,
) -> Study:
    """Train a recipe over minibatches, seeds and arms, as `onehour sweep`; what the folder holds is not run again.

    Starts processes that import the calling script, which therefore needs `if __name__ == "__main__":`.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file; model and data by name.
        minibatches: None for 1 … 64 times the base.
        seeds, first_seed: of each cell.
        arms: "warmup=none,constant", "table", "pitfalls".
        arms_at: minibatches of the arms; None for 16 times the base.
        out: the sweep's folder; None is runs/RECIPE-sweep.
        jobs: processes that train; None for cores or GPUs.
        processes, device: of each run.
        seeds_together: seeds trained as one network; None picks.
        trust: import what a .toml file names, without its being named here.
        changes: fields of `Recipe`.

    Returns:
        The folder's study.

    Raises:
        ValueError: for bad input; what has ended stays.

    >>> sweep("digits", seeds=0)
    Traceback (most recent call last):
    ValueError: --seeds is 0; expected at least 1, and 5 for the paper's table
    """
    refuse_several("sweep")
    chosen = named(recipe, **changes) if isinstance(recipe, str | Path) else recipe.replace(**changes)
    completed, _ = complete(asked_for(chosen, trust=trust))
    first_seed, seeds = whole_number("first_seed", first_seed), whole_number("seeds", seeds)
    spec = spec_of(completed, minibatches, range(first_seed, first_seed + seeds), arms, arms_at)
    folder = default_folder(completed, "sweep") if out is None else Path(out)
    jobs, execution = pick_jobs(jobs, processes=processes, device=device)
    for _ in train_sweep(spec, folder, jobs=jobs, execution=execution, together=seeds_together):
        pass
    return read_study([folder])
