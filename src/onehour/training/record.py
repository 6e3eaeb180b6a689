"""A run's folder: written while it trains, read by everything that comes after."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.data.bad_images import BAD_IMAGES
from onehour.files import append_whole, remove, replace_whole, sync_folder, to_json
from onehour.lock import FolderLostError, HeldFolder
from onehour.sidefile import read_lines, read_object
from onehour.training import kinds
from onehour.training.rest import RECIPE, name_rest, refuse_rest
from onehour.training.store import checkpoint_folders

__all__ = [
    "JOB",
    "Recorder",
    "Run",
    "differences",
    "ended_on_purpose",
    "final_error",
    "finished_run",
    "first_began",
    "move_aside",
]

MEDIAN_OF = 5
OUTCOME = "outcome.json"
JOB = "TORCHELASTIC_RUN_ID"


def final_error(errors: list[float]) -> float:
    """A run's error: the median of its last five epochs' (paper §5.1).

    >>> final_error([9.0, 4.0, 5.0, 3.0, 4.5, 4.2])
    4.2
    """
    return statistics.median(errors[-MEDIAN_OF:])


class Run:
    """A run's folder, read.

    Args:
        folder: with recipe.toml, metrics.jsonl and, once it ended, summary.json.

    Raises:
        ValueError: if it is no run's folder.

    >>> Run(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere is not a run's folder: it has no recipe.toml
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / RECIPE).is_file():
            raise ValueError(name_rest(self.folder))

    def __repr__(self) -> str:
        state = f"final error {self.final_error:.2f} %" if self.finished else "unfinished"
        return f"Run({str(self.folder)!r}: {state})"

    @cached_property
    def recipe(self) -> Recipe:
        """What was run."""
        return Recipe.from_toml(self.folder / RECIPE)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for each evaluation: epoch, iteration, lr, train_loss, train_error, val_loss, top1_error …"""
        path = self.folder / "metrics.jsonl"
        return read_lines(path, kinds.METRICS, ("epoch", "train_error", "top1_error"), head=["recipe"])[1:]

    @property
    def timing(self) -> list[dict[str, Any]]:
        """Images, seconds and the steps' milliseconds in each part, up to each evaluation."""
        return read_lines(self.folder / "timing.jsonl", kinds.TIMING)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run has not ended."""
        path = self.folder / "summary.json"
        return read_object(path, kinds.SUMMARY) if path.is_file() else {}

    @property
    def environment(self) -> dict[str, Any]:
        """What it last ran on: versions, machine, processes; empty before it began."""
        path = self.folder / "environment.json"
        return _sessions(path)[-1] if path.is_file() else {}

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary.get("outcome") == "finished"

    @property
    def final_error(self) -> float:
        """Median top-1 error, in percent, of the last five epochs evaluated so far."""
        errors = [record["top1_error"] for record in self.metrics]
        if not errors:
            raise ValueError(f"{self.folder} has no evaluation yet")
        return final_error(errors)


class Recorder:
    """Writes a run's folder; only process 0 has one.

    All goes `inside` the folder whose lock was taken, whatever has its name by then.

    Args:
        folder: new, empty, or of the same recipe.
        recipe: completed.

    Raises:
        ValueError: if the folder is another recipe's (differences listed) or something else's, if another process
            writes it, or has just trained it to its end.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        before = finished_run(folder, recipe)  # refuses what is not this recipe's
        self._held = HeldFolder(folder)
        self.inside = self._held.inside
        self.notes: list[str] = []
        """What a person should know of what was found there."""
        try:
            if finished_run(folder, recipe) is not None and before is None:  # who had the lock may have changed it
                raise ValueError(f"another process has just trained {folder} to its end; the same command shows how")
            if checkpoint_folders(self.inside) and not (self.inside / RECIPE).is_file():
                self.notes.append(
                    f"{folder} had lost its {RECIPE}: written again, as its checkpoints are of this recipe"
                )
            replace_whole(self.inside, RECIPE, recipe.to_toml())
        except BaseException:
            self._held.release()
            raise
        self._late = {"metrics.jsonl": "", "timing.jsonl": ""}

    def close(self) -> None:
        """Let others write the folder."""
        self._held.release()

    def check(self) -> None:
        """See whether the folder is this run's still, before it is written.

        Raises:
            FolderLostError: if it was moved, or removed, or part of it.
        """
        self._held.check()
        if not (self.inside / RECIPE).exists():
            text = f"{self.folder / RECIPE} was removed while the run wrote its folder"
            raise FolderLostError(text, "the same command goes on from the checkpoints that are left")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.check()  # which has more to say
            raise

    def note(self, outcome: str, message: str) -> None:
        """Write outcome.json: this job's processes ended on purpose."""
        content = {"outcome": outcome, "message": message, "job": os.environ.get(JOB)}
        replace_whole(self.inside, OUTCOME, to_json(content) + "\n")

    def begin(self, iteration: int, environment: dict[str, Any], *, known: int | None = None) -> None:
        """Note where the run goes on, and cut the record to what the checkpoint there knows.

        Args:
            iteration: that the run goes on from.
            known: the last iteration whose evaluation the checkpoint knows; None for the same.

        Raises:
            FolderLostError: if the folder is gone.
        """
        last = iteration if known is None else known
        first = to_json({"recipe": self.recipe.as_dict()})
        files: dict[str, str] = {}
        for name, head in (("metrics.jsonl", [first]), ("timing.jsonl", [])):
            lines = read_lines(self.folder / name, {"iteration": kinds.METRICS["iteration"]})
            kept = [to_json(line) for line in lines if line.get("iteration", last + 1) <= last]
            files[name] = "".join(line + "\n" for line in [*head, *kept])
        path = self.folder / "environment.json"
        sessions = _sessions(path) if path.is_file() else []
        sessions.append({"from_iteration": iteration, "began": time.time(), **environment})
        files[path.name] = json.dumps({"sessions": sessions}, indent=2)
        with self._writing():
            self.check()  # what was read by the folder's name is this folder's
            for name, text in files.items():
                replace_whole(self.inside, name, text)
            for name in ("summary.json", OUTCOME):
                remove(self.inside, name)
            sync_folder(self.inside)

    def add(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """Append an evaluation; what the disk refuses is kept, to be written before the next checkpoint is."""
        for name, record in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
            self._late[name] += to_json(record) + "\n"
        with suppress(OSError, FolderLostError):
            self._write_late()

    def catch_up(self) -> None:
        """Write what the disk has refused, and bring the record to disk: a checkpoint is about to count on it.

        Raises:
            OSError: if it still does; no line is half written then.
            FolderLostError: if the folder is no longer the run's.
        """
        self._write_late()
        for name in (*self._late, BAD_IMAGES, "."):
            with suppress(FileNotFoundError):  # there is none, or somebody removed it: nothing counts on it any more
                sync_folder(self.inside / name)

    def _write_late(self) -> None:
        try:
            self.check()
        except FolderLostError as error:
            if error.now is None:
                raise
        for name, text in self._late.items():
            if text:
                append_whole(self.inside, name, text.encode())
                self._late[name] = ""

    def end(self, summary: dict[str, Any]) -> None:
        """Write the summary, whole or not at all.

        Raises:
            FolderLostError: if the folder is gone.
        """
        with self._writing():
            replace_whole(self.inside, "summary.json", to_json(summary, indent=2) + "\n")


def finished_run(folder: Path, recipe: Recipe) -> Run | None:
    """The run that `folder` holds, if it is of this recipe and has come to its end.

    Raises:
        ValueError: if it is a run of another recipe, with the differences, or holds something else.

    >>> finished_run(Path("nowhere"), Recipe()) is None
    True
    """
    links = sorted(path for path in folder.iterdir() if path.is_symlink()) if folder.is_dir() else []
    if links:
        raise ValueError(f"{links[0]} is a link, and a run writes into its own folder alone; remove it")
    if not (folder / RECIPE).is_file():
        refuse_rest(folder, recipe)
        return None
    run = Run(folder)
    changed = differences(run.recipe, recipe)
    if changed:
        raise ValueError(
            f"{folder} is a run of another recipe ({'; '.join(changed)}); choose another --out, or give --fresh"
            " to start over and keep that run under a numbered name"
        )
    return run if run.finished else None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What a recipe changes of another, a field each.

    >>> differences(Recipe(), Recipe(seed=1))
    ['seed: 0 → 1']
    """
    before, after = old.as_dict(), new.as_dict()
    return [
        f"{key}: {before.get(key)} → {after.get(key)}" for key in after | before if before.get(key) != after.get(key)
    ]


def ended_on_purpose(folder: Path, job: str | None) -> tuple[str, str] | None:
    """(outcome, message) of a job that was stopped, or left the finite numbers; None if it was another job, or none.

    Args:
        job: the launcher's name for it, the same in all its restarts.

    >>> ended_on_purpose(Path("nowhere"), "17") is None
    True
    """
    path = folder / OUTCOME
    if job is None or not path.is_file():
        return None
    content = read_object(path, kinds.OUTCOME, ("outcome", "message"))
    return (content["outcome"], content["message"]) if content.get("job") == job else None


def first_began(folder: Path) -> float:
    """When training began in a folder, in seconds since 1970; 0 if it has not, or the folder does not tell.

    >>> first_began(Path("nowhere"))
    0.0
    """
    try:
        return float(_sessions(folder / "environment.json")[0]["began"])
    except (ValueError, TypeError, LookupError):
        return 0.0


def move_aside(folder: Path) -> Path | None:
    """Keep an old folder under the next free numbered name; None where there is none.

    Raises:
        ValueError: if a process writes it still.

    >>> move_aside(Path("nowhere")) is None
    True
    """
    if not folder.exists():
        return None
    held = HeldFolder(folder) if folder.is_dir() else None
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        folder.rename(kept)
        sync_folder(folder.parent)
    finally:
        if held is not None:
            held.release()
    return kept


def _sessions(path: Path) -> list[dict[str, Any]]:
    return read_object(path, kinds.ENVIRONMENT, ["sessions"])["sessions"]
