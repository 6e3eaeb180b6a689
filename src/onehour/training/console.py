"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere; process 0 only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onehour.config import Recipe
from onehour.messages import encodable

__all__ = ["Console"]


class Console:
    """Prints a run's progress.

    Args:
        recipe: completed.
        quiet: print nothing; for every process but the first.
    """

    def __init__(self, recipe: Recipe, *, quiet: bool) -> None:
        self.recipe = recipe
        self.terminal = Terminal(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.terminal,
            disable=quiet or not self.terminal.is_terminal,
            transient=True,
        )

    def start(self, iteration: int, iterations: int, *, processes: int, folder: Any, rules: str) -> None:
        """Say what runs where."""
        r = self.recipe
        rate = f"rate {r.base_lr:g} → {r.target_lr:g}" if r.warms_up else f"rate {r.target_lr:g}"
        self._say(
            f"{r.name}: minibatch {r.minibatch} = {r.workers.workers} workers × {r.per_worker} on {processes}"
            f" process{'es' * (processes > 1)}, {rate}, {r.epochs} epoch{'s' * (r.epochs > 1)},"
            f" {iterations} iterations, seed {r.seed}"
        )
        where = f" at iteration {iteration}" if iteration else ""
        self._say(f"{'resumes' if iteration else 'writes'} {folder}{where}")
        self._say(rules)
        for remark in r.remarks:
            self.warn(remark)
        with self._unheard():
            self._progress.start()
        self._task = self._progress.add_task("training", total=iterations, completed=iteration)

    def step(self, iteration: int) -> None:
        """An iteration is done."""
        if not self._progress.disable:
            with self._unheard():
                self._progress.update(self._task, completed=iteration)

    def evaluated(self, record: dict[str, Any], images_per_second: float) -> None:
        """An evaluation is done; one that is made up for after a restart follows no image, and has no rate."""
        rate = f"  {images_per_second:8,.0f} images/s" if images_per_second else ""
        self._say(
            f"epoch {record['epoch']:>3}/{self.recipe.epochs}  iteration {record['iteration']:>6}"
            f"  rate {record['lr']:<8.4g} train error {record['train_error']:6.2f} %"
            f"  validation error {record['top1_error']:6.2f} %{rate}"
        )

    def warn(self, text: str) -> None:
        """Something that a person should know, and that stops nothing."""
        self._say(f"warning: {text}")

    def close(self) -> None:
        """Give the terminal back."""
        with self._unheard():
            self._progress.stop()

    def _say(self, line: str) -> None:
        with self._unheard():
            self.terminal.print(encodable(line, self.terminal.encoding), markup=False)

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """A run goes on where its output finds a full disk, or a pipe that nobody reads any more: there rich exits."""
        try:
            yield
        except (OSError, SystemExit):
            self.terminal.begin_capture()
            with suppress(OSError, SystemExit):
                self.terminal.end_capture()  # forgets the line: it would be said again with each other
