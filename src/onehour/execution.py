"""Where and how a run happens. Nothing that it learns depends on any of this."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.rules.arguments import positive, positive_int

WHERE = "where it runs (changes nothing that it learns, beyond rounding)"
FOLDER = "its folder"


def _said(default: Any, text: str, **flag: Any) -> Any:
    return field(default=default, metadata={"help": text, "group": WHERE, **flag})


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Processes, devices, folders and reporting of a run; each field carries its help text."""

    processes: int = _said(1, "p, which share the k workers; auto: one per GPU, or 2 on a CPU (1)", metavar="auto|P")
    workers_per_pass: int | None = _said(None, "workers that share a forward pass (auto)", metavar="auto|G")
    loaders: int | None = _said(None, "processes that load data, for each process (auto)", metavar="auto|L")
    device: str = _said("auto", "where to compute (auto)", choices=("auto", "cpu", "cuda"))
    threads: int | None = _said(None, "threads that each process computes with (cores / P)", metavar="T")
    continues: Path | None = None
    """A run's folder to go on from in a new one: its weights, optimizer and position, with another schedule."""
    out: Path | None = _said(None, "the run's folder (runs/RECIPE-kn-sSEED)", metavar="DIR", group=FOLDER)
    fresh: bool = _said(
        False, "start over; keep the old folder under a numbered name", action="store_true", group=FOLDER
    )
    save_every: int | None = _said(
        None, "iterations, or minutes as 5m, between checkpoints (an epoch)", metavar="I|Mm", group=FOLDER
    )
    save_minutes: float | None = None
    """In place of `save_every`, whose flag takes both."""
    hang_timeout: float | None = _said(
        120.0, "seconds an iteration may take; the start, ten times as many (120)", metavar="S"
    )
    log: str | None = _said(
        None, "also log to tensorboard, wandb or package.module:Class", metavar="LOGGER", group=FOLDER
    )
    noise: bool = _said(
        False,
        "measure the gradient noise while the rate is at its peak, for `onehour advise` (under 2 % of the time)",
        action="store_true",
        group=FOLDER,
    )
    profile: int = _said(0, "iterations to trace into trace-RANK.json", metavar="I", group=FOLDER)
    port: int = _said(0, "where the processes meet (a free one)", metavar="PORT")
    allow_different: tuple[str, ...] = _said(
        (), "train even if hosts have different versions of packages", nargs=1, choices=("versions",)
    )

    def __post_init__(self) -> None:
        positive_int("processes", self.processes)
        for name in ("workers_per_pass", "threads", "save_every"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        for name in ("save_minutes", "hang_timeout"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("loaders", "profile"):
            value = getattr(self, name)
            if value is not None and value != 0:
                positive_int(name, value)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu or cuda")
        if set(self.allow_different) - {"versions"}:
            raise ValueError(f"allow_different is {self.allow_different!r}; expected ('versions',)")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in 0 … 65535, got {self.port}")

    def refuse(self, recipe: Recipe) -> None:
        """Refuse a recipe that cannot run so."""
        if recipe.reduce == "canonical" and self.threads not in (None, recipe.canonical_threads):
            raise ValueError(
                f"a canonical run computes with the recipe's canonical_threads {recipe.canonical_threads}, since they"
                f" are part of its bits; leave --threads {self.threads} out, or change canonical_threads"
            )
        alone = {
            "batchnorm keep": (recipe.batchnorm == "keep", "batchnorm ghost"),
            "scaling adascale": (recipe.scaling == "adascale", "another scaling"),
        }
        for one, (asked, several) in alone.items():
            if asked and (self.workers_per_pass or 1) > 1:
                raise ValueError(f"{one} takes one worker a pass: leave --workers-per-pass out, or {several}")
        if recipe.reduce == "canonical" and self.workers_per_pass not in (None, recipe.together):
            raise ValueError(
                f"a canonical run takes canonical_pass = {recipe.together} workers a pass, which is part of its bits:"
                f" leave --workers-per-pass {self.workers_per_pass} out"
            )
        if self.noise and (recipe.ramp or recipe.scaling == "adascale"):
            raise ValueError(
                "--noise is of one minibatch, while the schedule's rate is at its peak; leave ramp and adascale out"
            )
        if self.noise and recipe.bad_images == "skip":
            raise ValueError(
                "--noise reads minibatches ahead, and with bad_images skip each iteration counts the images that it"
                " skips; leave --noise out, or use bad_images error"
            )

    def folder(self, recipe: Recipe) -> Path:
        if self.out is None and self.continues is not None:
            old = self.continues if self.continues.name else self.continues.absolute()
            return old.with_name(f"{old.name}-{recipe.epochs}-epochs")
        return self.out or default_folder(recipe, f"{recipe.minibatch}-s{recipe.seed}")


def default_folder(recipe: Recipe, what: str) -> Path:
    """runs/NAME-WHAT.

    >>> default_folder(Recipe(name="../mine"), "sweep")
    Traceback (most recent call last):
    ValueError: the recipe's name '../mine' cannot name a folder; give --out
    """
    if "/" in recipe.name or "\0" in recipe.name:
        raise ValueError(f"the recipe's name {recipe.name!r} cannot name a folder; give --out")
    return Path("runs") / f"{recipe.name}-{what}"
