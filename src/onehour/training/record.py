"""A run's folder, read by everything that comes after it: its record, whose it is, how it ended."""

from __future__ import annotations

import json
import math
import os
import statistics
import unicodedata
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.files import sync_folder
from onehour.lock import HeldFolder
from onehour.messages import tell
from onehour.sidefile import (
    COUNT,
    NUMBER,
    NUMBER_OR_NONE,
    PERCENT,
    TEXT,
    TEXT_OR_NONE,
    Kind,
    is_list,
    is_object,
    read_lines,
    read_object,
)
from onehour.training.checkpoint import CHECKPOINTS, Store, checkpoint_folders, digest_of_recipe, read_manifest

MEDIAN_OF = 5
RECIPE = "recipe.toml"
OUTCOME = "outcome.json"
BAD_IMAGES = "bad_images.jsonl"
"""In a run's folder: every image that could not be read, once."""
PARTS = ("data", "compute", "reduction", "update")
"""Of an iteration, whose milliseconds steps_ms has."""


ERRORS: Kind = ("a list of errors in percent", is_list(PERCENT[1]))
OWN_ERRORS: Kind = ("a list of numbers", is_list(NUMBER_OR_NONE[1]))
POINTS: Kind = ("lists of 3 numbers", is_list(is_list(NUMBER[1], 3)))
STEPS: Kind = (f"lists of {len(PARTS)} numbers", is_list(is_list(NUMBER[1], len(PARTS))))
SESSIONS: Kind = ("a list of objects", lambda value: is_list(is_object())(value) and value != [])
CLASS_NAMES: Kind = ("a list of texts", is_list(TEXT[1]))
SEEDS: Kind = ("a whole number of at least 1", lambda value: COUNT[1](value) and value > 0)
SECONDS: Kind = ("a number of seconds", lambda value: value is None or (NUMBER[1](value) and value >= 0))

VALUES: Kind = ("numbers by name", lambda value: is_object(NUMBER_OR_NONE[1])(value) and value != {})
METRICS = {
    "epoch": NUMBER,
    "iteration": COUNT,
    "position": COUNT,
    "train_error": PERCENT,
    "top1_error": PERCENT,
    "noise": POINTS,
}
"""Of a line; its losses may have left the finite numbers."""
OWN_METRICS = {"epoch": NUMBER, "iteration": COUNT, "metrics": VALUES, "higher_is_better": ("names", is_list(TEXT[1]))}
"""Of a line of a task of one's own."""
TIMING = {"images": NUMBER, "seconds": NUMBER, "evaluate_seconds": NUMBER, "steps_ms": STEPS}
SUMMARY = {
    "outcome": TEXT,
    "final_error": NUMBER_OR_NONE,
    "last_errors": ERRORS,
    "images_per_second": NUMBER_OR_NONE,
    "seconds_training": SECONDS,
    "bottleneck": TEXT,
    "seeds_together": SEEDS,
    "parameter_bytes": COUNT,
    "buffer_bytes": COUNT,
}
ENDS = {"outcome": TEXT, "message": TEXT, "job": TEXT_OR_NONE}


@dataclass(frozen=True)
class Metric:
    """What a run's error is: its name, its unit, and which way it is better."""

    name: str
    unit: str = ""
    higher_is_better: bool = False

    @classmethod
    def called(cls, text: str, higher_is_better: Collection[str] = ()) -> Metric:
        """The metric that a task's `onehour.Sums` calls so.

        >>> Metric.called("distance [m]")
        Metric(name='distance', unit='m', higher_is_better=False)
        """
        name, _, unit = text.rpartition(" ")
        if name and (unit == "%" or (unit.startswith("[") and unit.endswith("]"))):
            return cls(name, unit.strip("[]"), text in higher_is_better)
        return cls(text, "", text in higher_is_better)

    @property
    def short(self) -> str:
        """What one line calls it."""
        return "error" if self == TOP1_ERROR else self.name

    @property
    def written(self) -> str:
        """As `called` reads it: distance [m]."""
        unit = self.unit if self.unit in ("", "%") else f"[{self.unit}]"
        return f"{self.name} {unit}".rstrip()

    def __str__(self) -> str:
        return self.written + ", of which more is better," * self.higher_is_better

    @property
    def label(self) -> str:
        """Of an axis: distance, m."""
        return ", ".join(filter(None, (self.name, self.unit)))

    @property
    def short_label(self) -> str:
        """Of a table's column, or a small axis: error, %."""
        return ", ".join(filter(None, (self.short, self.unit)))

    @property
    def title(self) -> str:
        """At the beginning of a heading."""
        return self.short[:1].upper() + self.short[1:]

    @property
    def points(self) -> str:
        """What its differences are counted in."""
        return "points" if self.unit == "%" else self.unit

    def amount(self, difference: str) -> str:
        """A difference with what it is counted in."""
        return f"{difference} {self.points}".rstrip()

    @property
    def ends(self) -> tuple[float, float]:
        """Between which its costs lie."""
        return (0.0, 100.0) if self == TOP1_ERROR else (-math.inf, math.inf)

    def cost(self, value: float) -> float:
        """A value so that lower is better, and back: −value where higher is better."""
        return -value if self.higher_is_better else value

    def digits(self, margin: float) -> int:
        """How many decimals show two digits of a margin; 2 of percent."""
        return 2 if self.unit == "%" else max(0, 1 - math.floor(math.log10(margin)))

    def of(self, value: float | None) -> str:
        """A value with its unit.

        >>> Metric.called("pixel error %").of(3.14159), Metric("perplexity").of(12.3456)
        ('3.14 %', '12.35')
        """
        number = "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
        return f"{value:.2f} %" if self.unit == "%" and number != "not finite" else f"{number} {self.unit}".rstrip()


TOP1_ERROR = Metric("top-1 error", "%")


class NonFiniteError(ArithmeticError):
    """The loss or a gradient was not finite, though every sample was; the weights before it are kept."""

    @classmethod
    def at(cls, done: int, epoch: float, rate: float, folder: Path) -> NonFiniteError:
        """Of iteration `done`."""
        return cls(
            f"the loss or a gradient was not finite at iteration {done} (epoch {epoch:.2f}, rate {rate:g}); checkpoints"
            f" before it are kept in {folder}. Use a lower base_lr, more warmup_epochs or a smaller minibatch"
        )


class StoppedError(Exception):
    """A process was asked to stop; the run is saved and the same command goes on with it."""


DELIBERATE: dict[str, type[Exception]] = {"stopped": StoppedError, "non-finite": NonFiniteError}
"""Ends that a launcher's restart must not undo, by the name that outcome.json has for them."""


def final_error(errors: list[float]) -> float:
    """A run's error: the median of its last five epochs' (paper §5.1)."""
    return statistics.median(errors[-MEDIAN_OF:])


class Run:
    """A run's folder, read.

    Args:
        folder: with recipe.toml, metrics.jsonl and, once it ended, summary.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / RECIPE).is_file():
            raise ValueError(_name_rest(self.folder))

    def __repr__(self) -> str:
        state = f"final {self.metric.short} {self.metric.of(self.final_error)}" if self.finished else "unfinished"
        return f"Run({str(self.folder)!r}: {state})"

    @cached_property
    def recipe(self) -> Recipe:
        """What was run; Adam's kind scaled the rate alone where the file is older than `scale_betas`."""
        path = self.folder / RECIPE
        older = Recipe.from_toml(path, unless_given={"scale_betas": False})
        return older if older.adam is not None and older.scaling == "sqrt" else Recipe.from_toml(path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for each evaluation: epoch, iteration, lr, train_loss, train_error, val_loss, top1_error …

        Of a task of one's own `metrics` and `train_metrics` by name; `top1_error` and `train_error` are the first of
        them, and where it is not finite the worst that there is: infinite, or −infinite where more is better.
        """
        return [line for line in self._lines if line.get("iteration") != 0]

    @cached_property
    def metric(self) -> Metric:
        if self.recipe.task is None or self.untrained is None:
            return TOP1_ERROR
        return Metric.called(next(iter(self.untrained["metrics"])), self.untrained.get("higher_is_better", ()))

    @property
    def untrained(self) -> dict[str, Any] | None:
        """The record of the network before its first update; only where the task is one's own."""
        return next((line for line in self._lines if line.get("iteration") == 0), None)

    @property
    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if self.recipe.task is None:
            return read_lines(path, METRICS, ("epoch", "train_error", "top1_error"), head=["recipe"])[1:]
        lines = read_lines(path, OWN_METRICS, ("epoch", "iteration", "metrics"), head=["recipe"])[1:]
        first = next(iter(lines[0]["metrics"])) if lines else ""
        worst = -math.inf if lines and first in lines[0].get("higher_is_better", ()) else math.inf
        for line in lines:
            found = {"train_error": line.get("train_metrics", {}).get(first), "top1_error": line["metrics"].get(first)}
            if "ema_top1_error" in line:
                found["ema_top1_error"] = line["ema_top1_error"]
            line |= {short: worst if value is None else value for short, value in found.items()}
        return lines

    @property
    def noise(self) -> list[list[float]]:
        """(iteration, tr Σ, |G|²) of every point of its gradient noise; none of a run without --noise."""
        return [point for line in self.metrics for point in line.get("noise", [])]

    @property
    def timing(self) -> list[dict[str, Any]]:
        """Images, seconds and the steps' milliseconds in each part, up to each evaluation."""
        return read_lines(self.folder / "timing.jsonl", TIMING)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty while the run has not ended."""
        path = self.folder / "summary.json"
        kinds = SUMMARY if self.recipe.task is None else SUMMARY | {"last_errors": OWN_ERRORS}
        return read_object(path, kinds) if path.is_file() else {}

    @property
    def environment(self) -> dict[str, Any]:
        """What it last ran on: versions, machine, processes; empty before it began."""
        path = self.folder / "environment.json"
        return sessions_of(path)[-1] if path.is_file() else {}

    @property
    def class_names(self) -> list[str]:
        """Of the classes, by their labels, where its data had names for them; else empty."""
        names, holds = self.environment.get("class_names", []), CLASS_NAMES[1]
        if not holds(names):
            raise ValueError(f"{self.folder / 'environment.json'} is damaged: class_names is not {CLASS_NAMES[0]}")
        return names

    @property
    def finished(self) -> bool:
        return self.summary.get("outcome") == "finished"

    @property
    def final_error(self) -> float:
        """Median of `metric` over the last five epochs evaluated so far: of the top-1 error in percent."""
        errors = [record["top1_error"] for record in self.metrics]
        if not errors:
            raise ValueError(f"{self.folder} has no evaluation yet")
        return final_error(errors)


def run_of(source: Path) -> Run | None:
    """The run that a folder is, or is a checkpoint of; None for anything else."""
    whole = source.absolute()
    folder = whole.parents[1] if whole.is_dir() and whole.parent.name == CHECKPOINTS else source
    return Run(folder) if (folder / RECIPE).is_file() else None


def refuse_other_classes(run: Run, names: Sequence[str]) -> None:
    """Refuse data whose labels mean other classes than those that a run was trained on, as far as both have names."""
    known = run.class_names
    if not (known and names):
        return
    for label, (old, new) in enumerate(zip_longest(known, names)):
        # Disks differ in how they spell a letter.
        if old is None or new is None or unicodedata.normalize("NFC", old) != unicodedata.normalize("NFC", new):
            was, now = (f"{name!r}" if name is not None else "none" for name in (old, new))
            raise ValueError(
                f"class {label} of {run.folder} was {was} when it was trained, and in the data it is {now}, so that"
                " labels mean other classes; give the data the classes that it had, under the same names"
            )


def latest_contents(folder: Path) -> list[bytes] | None:
    """The files of a run's newest checkpoint that verifies, in the order of `FILES`; None without one.

    Newer ones that do not are named on standard error.
    """
    store = Store(folder, recipe=digest_of_recipe(Run(folder).recipe))
    stored = store.newest(lambda text: tell(f"warning: {text}"))
    return stored.contents if stored else None


def finished_run(folder: Path, recipe: Recipe) -> Run | None:
    """The run that `folder` holds, if it is of this recipe and has come to its end."""
    links = sorted(path for path in folder.iterdir() if path.is_symlink()) if folder.is_dir() else []
    if links:
        raise ValueError(f"{links[0]} is a link, and a run writes only into its own folder; remove it")
    if not (folder / RECIPE).is_file():
        _refuse_rest(folder, recipe)
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
    """What a recipe changes of another, a field each."""
    values = [(field.name, getattr(old, field.name), getattr(new, field.name)) for field in fields(Recipe)]
    return [f"{name}: {before} → {after}" for name, before, after in values if before != after]


def ended_on_purpose(folder: Path, job: str | None) -> tuple[str, str] | None:
    """(outcome, message) of a job that was stopped, or left the finite numbers; None if it was another job, or none.

    Args:
        job: the launcher's name for it, the same in all its restarts.
    """
    path = folder / OUTCOME
    if job is None or not path.is_file():
        return None
    content = read_object(path, ENDS, ("outcome", "message"))
    return (content["outcome"], content["message"]) if content.get("job") == job else None


def first_began(folder: Path) -> float:
    """When training began in a folder, in seconds since 1970; 0 if it has not, or the folder does not tell."""
    try:
        return float(sessions_of(folder / "environment.json")[0]["began"])
    except (ValueError, TypeError, LookupError):
        return 0.0


def move_aside(folder: Path) -> Path | None:
    """Keep an old folder under the next free numbered name; None where there is none.

    Of a link the folder behind it: an empty one takes its place there, on that disk.
    """
    if not folder.exists():
        return None
    real = folder.resolve() if folder.is_symlink() else folder
    with HeldFolder(folder) if folder.is_dir() else nullcontext():
        number = 1
        while os.path.lexists(kept := real.with_name(f"{real.name}.{number}")):
            number += 1
        real.rename(kept)
        if real != folder:
            real.mkdir()
        sync_folder(real.parent)
    return kept


def sessions_of(path: Path) -> list[dict[str, Any]]:
    """What environment.json holds: an object for each time that the run began or went on."""
    return read_object(path, {"sessions": SESSIONS}, ["sessions"])["sessions"]


def _name_rest(folder: Path) -> str:
    """What a folder without recipe.toml is."""
    if left := checkpoint_folders(folder):
        return (
            f"{folder} is a run's folder that has lost its {RECIPE}, with checkpoints up to {left[-1].name}; put it"
            " back, or give the train command that began it: it goes on from there"
        )
    return f"{folder} is not a run's folder: it has no {RECIPE}"


def _refuse_rest(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder without recipe.toml, unless it is empty, or what is left in it is of the very same recipe."""
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    found: set[str] = set()
    for checkpoint in checkpoint_folders(folder):
        with suppress(ValueError):  # damaged, which is for who loads it to say
            found.add(read_manifest(checkpoint)["recipe"])
    if digest_of_recipe(recipe) in found:
        return
    if found:
        raise ValueError(f"{folder} holds checkpoints of another recipe, and no {RECIPE}; choose another --out")
    with suppress(ValueError, OSError):  # no record, or a damaged one
        head = (folder / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0]
        if json.loads(head) == json.loads(json.dumps({"recipe": recipe.as_dict()})):
            return
    raise ValueError(f"{folder} holds other files and no {RECIPE}; choose another --out")
