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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.lock import FolderLostError
from onehour.messages import shown
from onehour.training.record import Run
from onehour.training.state import host_copies, load_optimizer, model_state, optimizer_state
from onehour.training.store import Store, Stored, digest_of_recipe

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
    """
    stored = _newest(Store(folder, recipe=digest_of_recipe(Run(folder).recipe), needs=FILES), warn)
    return [stored.contents[name] for name in FILES] if stored else None


class SaveInterval:
    """When to save between evaluations: every so many iterations, or minutes; None for never."""

    def __init__(self, iterations: int | None, minutes: float | None) -> None:
        self.iterations, self.seconds = iterations, None if minutes is None else 60 * minutes
        self._since = time.monotonic()

    def over(self, done: int) -> bool:
        """Whether it is time to save after iteration `done`."""
        if self.iterations and done % self.iterations == 0:
            return True
        if self.seconds is None or time.monotonic() - self._since < self.seconds:
            return False
        self._since = time.monotonic()
        return True


class Checkpoints:
    """Saves and loads a run's checkpoints.

    Args:
        folder: the run's.
        recipe: completed.
        group: only its process 0 touches the disk.
        warn: is told what a person should know: a damaged checkpoint, a full disk.
        inside: a path to the very folder that process 0 holds; None for its name.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, group: Group, *, warn: Callable[[str], None], inside: Path | None = None
    ) -> None:
        self.store = Store(inside or folder, recipe=digest_of_recipe(recipe), needs=FILES, shown=folder)
        self.group, self.warn = group, warn
        self._writer: ThreadPoolExecutor | None = None
        self._copying: Future[Any] | None = None
        self._writing: Future[None] | None = None
        self._failed = False
        self._bytes = 0

    def load(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint that verifies, on every process; its progress, None where there is none.

        Raises:
            ValueError: if checkpoints exist and none verifies, or the newest is of another model.
        """
        found: list[bytes | None] = [None] * (1 + len(FILES))
        if self.group.rank == 0:
            try:
                found[1:] = self._found() or found[1:]
            except ValueError as error:
                found[0] = str(error).encode()
        refused, model_file, optimizer_file, progress_file = [self.group.broadcast(part) for part in found]
        if refused is not None:
            raise ValueError(refused.decode())
        if model_file is None or optimizer_file is None or progress_file is None:
            return None
        try:
            model.load_state_dict(load(model_file))
            load_optimizer(optimizer, model, load(optimizer_file))
        except (SafetensorError, KeyError, RuntimeError) as error:
            said = shown(str(error).splitlines()[-1].strip())
            raise ValueError(f"{self.store.shown} is of another model: {said}") from error
        return json.loads(progress_file)

    def _found(self) -> list[bytes] | None:
        with suppress(OSError):  # what can be read is enough to go on; the next write says what is wrong with the disk
            self.store.clear_leftovers()
        stored = _newest(self.store, self.warn)
        if stored is None:
            return None
        _refuse_wrong_progress(stored, self.store.shown)
        self.store.set_aside()
        return [stored.contents[name] for name in FILES]

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        *,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Write a checkpoint of iteration progress["iteration"], in the background.

        Until `detach`, weights and velocity are copied from where they lie. A disk that refuses is a warning: training
        goes on.

        Args:
            first: writes what the checkpoint counts on; if the disk refuses that, there will be no checkpoint either.
        """
        if self.group.rank != 0:
            return
        self.wait()
        states = [model_state(model, copy=False), optimizer_state(optimizer, model, copy=False)]
        self._bytes = sum(tensor.nbytes for state in states for tensor in state.values())
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        copying = self._writer.submit(lambda: [host_copies(state) for state in states])

        def write() -> None:
            if first is not None:
                first()
            contents = [*copying.result(), json.dumps(progress, indent=2).encode()]
            self.store.write(progress["iteration"], dict(zip(FILES, contents, strict=True)))

        self._copying, self._writing = copying, self._writer.submit(write)

    def detach(self) -> None:
        """Call this before an update: returns once what is being written no longer lies where the update changes it."""
        if self._copying is not None:
            self._copying.result()

    def wait(self) -> bool:
        """Wait until the last `save` is on disk; whether it is."""
        if self._writing is None:
            return not self._failed
        writing, self._writing, self._copying = self._writing, None, None
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
        """Wait, and end the writer."""
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()


def _newest(store: Store, warn: Callable[[str], None]) -> Stored | None:
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
            f"{folder}: the {FILES[-1]} of iteration {stored.iteration} was not written by a run; start over with"
            " --fresh"
        )
