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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.lock import FolderLostError
from onehour.messages import say, shown
from onehour.training.record import Run
from onehour.training.state import AveragedWeights, host_copies, load_optimizer, model_state, optimizer_state
from onehour.training.store import FILES, Store, digest_of_recipe


def latest_contents(folder: Path) -> list[bytes] | None:
    """The files of a run's newest checkpoint that verifies, in the order of `FILES`; None without one.

    Newer ones that do not are named on standard error.
    """
    store = Store(folder, recipe=digest_of_recipe(Run(folder).recipe))
    stored = store.newest(lambda text: say(f"onehour: warning: {text}", sys.stderr))
    return stored.contents if stored else None


class SaveInterval:
    """When to save between evaluations: every so many iterations, or minutes; None for never."""

    def __init__(self, iterations: int | None, minutes: float | None) -> None:
        self.iterations, self.minutes = iterations, minutes
        self._since = time.monotonic()

    def over(self, done: int) -> bool:
        """Whether it is time to save after iteration `done`."""
        if self.iterations and done % self.iterations == 0:
            return True
        if self.minutes is None or time.monotonic() - self._since < 60 * self.minutes:
            return False
        self._since = time.monotonic()
        return True


class Checkpoints:
    """Saves and loads a run's checkpoints.

    Args:
        group: only its process 0 touches the disk.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, group: Group, *, warn: Callable[[str], None], inside: Path | None = None
    ) -> None:
        self.store = Store(inside or folder, recipe=digest_of_recipe(recipe), shown=folder)
        self.group, self.warn = group, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copying: Future[Any] | None = None
        self._writing: Future[None] | None = None
        self._failed = False
        self._bytes = 0

    def load(
        self, model: nn.Module, optimizer: Optimizer, *, average: AveragedWeights | None = None
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint that verifies, on every process; its progress, None where there is none."""
        found: list[bytes | None] = [None] * (1 + len(FILES))
        if self.group.rank == 0:
            try:
                stored = self.store.newest(self.warn, resumes=True)
                found[1:] = stored.contents if stored else found[1:]
            except OSError as error:
                found[0] = f"{self.store.shown} cannot be read or written: {error.strerror}".encode()
            except ValueError as error:
                found[0] = str(error).encode()
        refused, *files = [self.group.broadcast(part) for part in found]
        if refused is not None:
            raise ValueError(refused.decode())
        contents = [file for file in files if file is not None]
        if not contents:
            return None
        try:
            model.load_state_dict(load(contents[0]))
            kept = load(contents[1])
            if average is not None:
                average.load(kept)
            load_optimizer(optimizer, model, kept)
        except (SafetensorError, KeyError, RuntimeError) as error:
            said = shown(str(error).splitlines()[-1].strip())
            raise ValueError(f"{self.store.shown} is of another model: {said}") from error
        return json.loads(contents[2])

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        *,
        average: AveragedWeights | None = None,
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
        states[1] |= average.state() if average is not None else {}
        # A forward pass may change buffers before `detach`.
        buffers = dict(model.named_buffers(remove_duplicate=False))
        states[0] |= {name: buffer.clone() for name, buffer in buffers.items() if name in states[0]}
        self._bytes = sum(tensor.nbytes for state in states for tensor in state.values())
        copying = self._thread.submit(lambda: [host_copies(state) for state in states])

        def write() -> None:
            if first is not None:
                first()
            self.store.write(progress["iteration"], [*copying.result(), json.dumps(progress, indent=2).encode()])

        self._copying, self._writing = copying, self._thread.submit(write)

    def detach(self) -> None:
        """Call this before an update: returns once what is being written no longer lies where the update changes it."""
        if self._copying is not None:
            self._copying.result()

    def wait(self) -> bool:
        """Wait until the last `save` is on disk; whether it is."""
        if self._writing is not None:
            error = self._writing.exception()
            self._writing, self._copying = None, None
            if isinstance(error, OSError) and not self._failed:
                self.warn(
                    f"no checkpoint could be written to {self.store.shown}: {error.strerror or error} ({self._bytes:,}"
                    " bytes are needed); training goes on, and what was saved before stays"
                )
            elif not isinstance(error, OSError | FolderLostError | None):  # whoever looks at a lost folder says so
                raise error
            self._failed = error is not None
        return not self._failed

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
