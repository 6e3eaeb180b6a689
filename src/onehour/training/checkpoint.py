"""A run's checkpoints, written behind its back: weights, velocity, statistics, and where the run stands.

No pickle and no generator states: everything random is keyed. Process 0 alone writes, finds the newest and reads; the
others get its bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.lock import FolderLostError
from onehour.output import shown
from onehour.training.manifest import digest_of_recipe
from onehour.training.record import Run
from onehour.training.snapshot import Snapshot
from onehour.training.state import load_optimizer, model_state, optimizer_state
from onehour.training.store import Store, Stored, Write
from onehour.training.tensorfile import write_bytes, write_tensors

__all__ = ["FILES", "Checkpoints", "SaveInterval", "latest_contents"]

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")


def latest_contents(
    folder: Path, *, warn: Callable[[str], None] = lambda text: print(f"onehour: warning: {text}", file=sys.stderr)
) -> list[bytes] | None:
    """The files of a run's newest checkpoint that verifies, in the order of `FILES`; None without one.

    Args:
        warn: is told of newer ones that do not verify.

    Raises:
        ValueError: if checkpoints exist and none verifies, or the folder is no run's.

    >>> latest_contents(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere is not a run's folder: it has no recipe.toml
    """
    store = Store(folder, recipe=digest_of_recipe(Run(folder).recipe), needs=FILES)
    stored = _newest_of(store, warn)
    return [stored.contents[name] for name in FILES] if stored else None


class SaveInterval:
    """When to save between evaluations.

    Args:
        iterations: every so many; None for never.
        minutes: or every so many; None for never.

    >>> [done for done in range(1, 9) if SaveInterval(3, None).over(done)]
    [3, 6]
    """

    def __init__(self, iterations: int | None, minutes: float | None) -> None:
        self.iterations, self.seconds = iterations, None if minutes is None else 60 * minutes
        self._since = time.monotonic()

    def over(self, done: int) -> bool:
        """Whether it is time to save after iteration `done`.

        >>> SaveInterval(None, None).over(3)
        False
        """
        if self.iterations and done % self.iterations == 0:
            return True
        if self.seconds is None or time.monotonic() - self._since < self.seconds:
            return False
        self._since = time.monotonic()
        return True


def _nothing() -> None:
    """What comes before a save that counts on nothing else."""


class Checkpoints:
    """Saves and loads a run's checkpoints.

    Args:
        folder: the run's.
        recipe: completed.
        group: only its process 0 touches the disk.
        warn: is told what a person should know: a damaged checkpoint, a full disk.
        inside: a path to the very folder that process 0 holds; None for its name.

    >>> Checkpoints(Path("nowhere"), Recipe(), Group(), warn=print).detach()
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        group: Group,
        *,
        warn: Callable[[str], None],
        inside: Path | None = None,
    ) -> None:
        self.store = Store(inside or folder, recipe=digest_of_recipe(recipe), needs=FILES, shown=folder)
        self.group, self.warn = group, warn
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[Path] | None = None
        self._snapshots: list[Snapshot] = []
        self._failed = False
        self._bytes = 0

    def load(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint that verifies, on every process.

        Returns:
            Its progress; None where there is none.

        Raises:
            ValueError: if checkpoints exist and none verifies, or the newest is of another model.
        """
        contents: list[bytes | None] = [None] * len(FILES)
        refused = b""
        if self.group.rank == 0:
            try:
                contents = self._newest()
            except ValueError as error:
                refused = str(error).encode()
        refused = self.group.broadcast(refused)
        if refused:
            raise ValueError(refused.decode())
        model_file, optimizer_file, progress_file = (self.group.broadcast(content) for content in contents)
        if model_file is None or optimizer_file is None or progress_file is None:
            return None
        try:
            model.load_state_dict(load(model_file))
            load_optimizer(optimizer, model, load(optimizer_file))
        except (SafetensorError, KeyError, RuntimeError) as error:
            said = shown(str(error).splitlines()[-1].strip())
            raise ValueError(f"{self.store.shown} is of another model: {said}") from error
        return json.loads(progress_file)

    def _newest(self) -> list[bytes | None]:
        with suppress(OSError):  # what can be read is enough to go on; the next write says what is wrong with the disk
            self.store.clear_leftovers()
        stored = _newest_of(self.store, self.warn)
        if stored is None:
            return [None] * len(FILES)
        _refuse_wrong_progress(stored, self.store.shown)
        self.store.set_aside()
        return [stored.contents[name] for name in FILES]

    def save(
        self, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any], *, first: Callable[[], None] = _nothing
    ) -> None:
        """Write a checkpoint of iteration progress["iteration"], in the background.

        Until `detach`, it is read from where it lies. A disk that refuses is a warning: training goes on.

        Args:
            first: writes what the checkpoint counts on; if the disk refuses that, there will be no checkpoint either.
        """
        if self.group.rank != 0:
            return
        self.wait()
        tensors = [Snapshot(model_state(model, copy=False)), Snapshot(optimizer_state(optimizer, model, copy=False))]
        self._snapshots = tensors
        self._bytes = sum(snapshot.nbytes for snapshot in tensors)
        files = {
            FILES[0]: partial(write_tensors, tensors=tensors[0]),
            FILES[1]: partial(write_tensors, tensors=tensors[1]),
            FILES[2]: partial(write_bytes, content=json.dumps(progress, indent=2).encode()),
        }
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._writer.submit(self._write, progress["iteration"], files, first)

    def _write(self, iteration: int, files: dict[str, Write], first: Callable[[], None]) -> Path:
        first()
        return self.store.write(iteration, files)

    def detach(self) -> None:
        """Call this before an update: what is being written keeps the values before it."""
        for snapshot in self._snapshots:
            snapshot.detach()
        self._snapshots = []

    def wait(self) -> bool:
        """Wait until the last `save` is on disk; whether it is.

        >>> Checkpoints(Path("nowhere"), Recipe(), Group(), warn=print).wait()
        True
        """
        if self._writing is None:
            return not self._failed
        writing, self._writing, self._snapshots = self._writing, None, []
        try:
            writing.result()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.warn(
                    f"no checkpoint could be written to {self.store.shown}: {error.strerror or error} ({self._bytes:,}"
                    " bytes are needed); training goes on, and what was saved before stays"
                )
            self._failed = True
        except FolderLostError:  # whoever looks at the folder says so
            self._failed = True
        return not self._failed

    def close(self) -> None:
        """Wait, and end the writer.

        >>> Checkpoints(Path("nowhere"), Recipe(), Group(), warn=print).close()
        """
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()


def _newest_of(store: Store, warn: Callable[[str], None]) -> Stored | None:
    stored = store.newest()
    if stored is not None:
        for problem in store.problems:
            warn(f"a damaged checkpoint was left out: {problem}; iteration-{stored.iteration:09d} is used in its place")
    return stored


def _refuse_wrong_progress(stored: Stored, folder: Path) -> None:
    """What nobody but a hand can have written: its digest is right."""
    try:
        progress = json.loads(stored.contents[FILES[-1]])
        counts, build = [*progress["totals"], progress["position"], progress.get("skipped", 0)], progress["build"]
        sound = (
            progress["iteration"] == stored.iteration
            and [type(count) for count in counts] == [float, float, int, int]
            and all(0 <= count < 2**63 for count in counts[2:])
            and isinstance(progress.get("evaluated", True), bool)
            and all(isinstance(value, str) and value.isprintable() for value in build.values())
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{folder}: the {FILES[-1]} of iteration {stored.iteration} was written by no run; start over with --fresh"
        )
