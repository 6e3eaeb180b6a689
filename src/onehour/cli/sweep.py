"""`onehour sweep`: from options to a sweep, and what a person sees while it trains."""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from contextlib import closing
from functools import partial
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import (
    OF_THE_DATA,
    add_device,
    add_margin,
    add_recipe_argument,
    add_recipe_fields,
    add_trust,
    auto,
    recipe_changes,
    size,
    sizes,
)
from onehour.cli.report import print_report
from onehour.dist.launched import refuse_several
from onehour.dist.signals import EXIT_STOPPED, STOPPED, StopSignals
from onehour.entry import asked_for
from onehour.execution import default_folder
from onehour.leaving import before_leaving
from onehour.messages import tell
from onehour.recipes import recipe as named
from onehour.rules.arguments import positive, positive_int
from onehour.study.spec import label_of, spec_of

if TYPE_CHECKING:
    from onehour.sweeps.pool import Event
    from onehour.sweeps.sweep import Work
    from onehour.sweeps.task import Task


def add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="measure error against minibatch over seeds and arms, as in the paper's figure 1",
        description="Train a recipe at several minibatches and seeds, and with one thing changed at some of them.",
    )
    add_recipe_argument(sweep)
    sweep.add_argument("--seeds", type=size, default=5, metavar="N", help="runs of each cell, from --seed on (5)")
    sweep.add_argument(
        "--reference-seeds", type=size, metavar="N", help="runs of the reference, from --seed on (twice --seeds)"
    )
    sweep.add_argument(
        "--arm", action="append", metavar="FIELD=V[,V…]", help="one thing changed, or: table, pitfalls, none (table)"
    )
    sweep.add_argument("--arms-at", type=sizes, metavar="KN[,KN…]", help="minibatches of the arms (16 times base)")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder (runs/RECIPE-sweep)")
    sweep.add_argument("--dry-run", action="store_true", help="print the cells and the time they will take")
    sweep.add_argument("--jobs", type=auto, metavar="auto|J", help="runs at once (cores or GPUs)")
    sweep.add_argument("--processes", type=int, metavar="P", help="processes per run (1)")
    add_device(sweep)
    sweep.add_argument(
        "--seeds-together", type=auto, metavar="auto|S", help="seeds trained as one network; 1 for none (auto)"
    )
    add_margin(sweep)
    add_recipe_fields(sweep, several=("minibatch",), but=OF_THE_DATA)
    add_trust(sweep)
    sweep.set_defaults(command=sweep_command)


def sweep_command(options: argparse.Namespace, arguments: list[str]) -> int:
    refuse_several("sweep")
    # In this folder multiprocessing hands descriptors over; it goes as the interpreter ends, which no signal waits for.
    with before_leaving(partial(shutil.rmtree, get_temp_dir(), ignore_errors=True)):
        return _sweep(options)


def _sweep(options: argparse.Namespace) -> int:
    changes = recipe_changes(options)
    sizes, seed = changes.pop("minibatch", None), changes.pop("seed", 0)
    recipe = asked_for(named(options.recipe, **changes), trust=options.trust)
    if recipe.task is not None and options.margin is None and not options.dry_run:
        raise ValueError(
            f"task {recipe.task} has a metric of its own: say with --margin, in its unit, how much worse still counts"
            " as equal"
        )
    if options.margin is not None:
        positive("margin", options.margin)  # here, not behind the training
    positive_int("looks", options.looks)
    from onehour.data.sources import complete
    from onehour.sweeps.sweep import expected_seconds, pick_jobs, train_sweep, work_of

    jobs, execution = pick_jobs(
        options.jobs, processes=1 if options.processes is None else options.processes, device=options.device
    )
    recipe, _ = complete(recipe)
    seeds = range(seed, seed + options.seeds)
    spec = spec_of(recipe, sizes, seeds, options.arm, options.arms_at, options.reference_seeds)
    folder = options.out or default_folder(recipe, "sweep")
    if options.dry_run:
        work = work_of(spec, folder, jobs=jobs, together=options.seeds_together)
        for line in _rows(work):
            print(line)
        minutes = expected_seconds(work, jobs=jobs, execution=execution) / 60
        print(f"{len(work.cells)} cells, {work.left} left: about {minutes:.0f} minutes in {jobs} processes")
        return 0
    watch = _Watch()
    with StopSignals(text=f"{STOPPED}; the same command goes on in {folder}") as stop, closing(watch):
        try:
            for work, event in train_sweep(
                spec, folder, jobs=jobs, execution=execution, together=options.seeds_together
            ):
                if stop():
                    break
                watch.see(work, event)
        except ValueError:
            if not stop():  # else a process of a run may have obeyed the same signal
                raise
        if stop():
            watch.close()
            tell(stop.text)
            return EXIT_STOPPED
    return print_report([folder], None, options.margin, options.looks)


def _rows(work: Work) -> list[str]:
    left = {folder.name for task in work.tasks for folder in task.folders}
    rows: dict[tuple[Any, int], list[str]] = {}
    for cell in work.cells:
        rows.setdefault((cell.arm, cell.recipe.minibatch), []).append(cell.name)
    return [
        f"{minibatch:>7}  {label_of(arm) or 'the recipe':<45} {sum(name not in left for name in names)} of"
        f" {len(names)} done"
        for (arm, minibatch), names in rows.items()
    ]


class _Watch:
    """A bar on a terminal and a line for every task that has ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.terminal = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.terminal,
            disable=not self.terminal.is_terminal,
            transient=True,
        )
        self.ended = self.images = 0
        self.reason: str | None = None
        self.handle: Any = None

    def see(self, work: Work, event: Event) -> None:
        if self.handle is None:
            done = len(work.cells) - work.left
            self._say(f"{len(work.cells)} cells in {work.folder}, {done} done")
            for remark in dict.fromkeys(remark for cell in work.cells for remark in cell.recipe.remarks):
                self._say(f"note: {remark}")
            self.bar.start()
            self.handle = self.bar.add_task("sweep", total=sum(task.images for task in work.tasks) or None)
        if event.task is not None:
            self.ended += len(event.task.recipes)
            self.images += event.task.images
            if event.alone not in (None, "one seed", self.reason):
                self.reason = event.alone
                self._say(f"seeds are trained one by one: {event.alone}")
            self._say(f"[{self.ended}/{work.left}] {_ended(event.task)}")
        if not self.bar.disable:
            part = sum(_progress(task) for task in event.running)
            names = ", ".join(_name(task) for task in event.running)
            self.bar.update(self.handle, completed=self.images + part, description=f"{names:.70}")

    def close(self) -> None:
        self.bar.stop()

    def _say(self, text: str) -> None:
        self.terminal.print(text, markup=False)


def _ended(task: Task) -> str:
    from onehour.training.record import Run

    runs = [Run(folder) for folder in task.folders]
    errors = [run.final_error for run in runs if run.finished and math.isfinite(run.final_error)]
    bad = len(runs) - len(errors)
    parts = []
    if errors:
        metric, digits = runs[0].metric, ".2f" if runs[0].metric.unit == "%" else ".4g"
        spread = f" ± {statistics.stdev(errors):{digits}}" if len(errors) > 1 else ""
        found = f"{statistics.fmean(errors):{digits}}{spread} {metric.unit}".rstrip()
        parts.append(f"{found} ({len(errors)} seed{'s' * (len(errors) > 1)})")
    if bad:
        parts.append(f"{bad} diverged (NaN or infinity)")
    seconds = sum(run.summary.get("seconds_training") or 0.0 for run in runs)
    return f"{_name(task)}: {', '.join(parts)}, {seconds:.0f} s"


def _name(task: Task) -> str:
    return task.folders[0].name.rpartition("-s")[0]


def _progress(task: Task) -> float:
    from onehour.training.record import Run

    images = 0
    for recipe, folder in zip(task.recipes, task.folders, strict=True):
        if (folder / "recipe.toml").is_file():
            metrics = Run(folder).metrics
            images += min(metrics[-1].get("position", 0), recipe.epochs * (recipe.samples or 0)) if metrics else 0
    return images
