"""Where and how a run happens. Nothing that it learns depends on any of this."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onehour.config import Recipe
from onehour.rules.checks import positive, positive_int

__all__ = ["Execution", "default_folder"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Processes, devices, folders and reporting of a run.

    Args:
        processes: p, to host the k workers.
        workers_per_pass: how many workers share a forward pass; None picks.
        loaders: processes that load data for each process; None picks.
        device: "auto", "cpu" or "cuda".
        threads: for each process's computation; None divides the cores.
        out: the run's folder; None is runs/RECIPE-kn-sSEED.
        fresh: start over, and keep the old folder under a numbered name.
        save_every: iterations between checkpoints besides those at evaluations; None for those alone.
        save_minutes: or minutes between them.
        hang_timeout: seconds after which an iteration without progress ends its process, and ten times as many for the
            start; None for no watch.
        log: "tensorboard", "wandb" or package.module:Class.
        profile: how many iterations to trace; 0 for none.
        port: for the processes to meet at; 0 picks a free one.
        allow_different: "versions" trains although processes have other versions of Python or its packages.

    >>> Execution(processes=2).processes
    2
    """

    processes: int = 1
    workers_per_pass: int | None = None
    loaders: int | None = None
    device: str = "auto"
    threads: int | None = None
    out: Path | None = None
    fresh: bool = False
    save_every: int | None = None
    save_minutes: float | None = None
    hang_timeout: float | None = 120.0
    log: str | None = None
    profile: int = 0
    port: int = 0
    allow_different: tuple[str, ...] = ()

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

    def folder(self, recipe: Recipe) -> Path:
        """The run's folder.

        >>> Execution().folder(Recipe(name="digits", minibatch=64))
        PosixPath('runs/digits-64-s0')
        """
        return self.out or default_folder(recipe, f"{recipe.minibatch}-s{recipe.seed}")


def default_folder(recipe: Recipe, what: str) -> Path:
    """runs/NAME-WHAT.

    Raises:
        ValueError: if the recipe's name leads elsewhere.

    >>> default_folder(Recipe(name="../mine"), "sweep")
    Traceback (most recent call last):
    ValueError: the recipe's name '../mine' is no name of a folder; give --out
    """
    if "/" in recipe.name or "\0" in recipe.name:
        raise ValueError(f"the recipe's name {recipe.name!r} is no name of a folder; give --out")
    return Path("runs") / f"{recipe.name}-{what}"
