"""One seam of three methods for anyone's experiment tracker; one that fails never stops a run."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from onehour.entry import is_entry, resolve
from onehour.messages import blame, nearest

__all__ = ["Logger", "Loggers", "load_logger"]


class Logger(Protocol):
    """What `--log package.module:Class` must have; it is built without arguments, on process 0."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        """A run begins or resumes."""

    def log(self, record: dict[str, Any]) -> None:
        """An evaluation: the line of metrics.jsonl."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run ends: summary.json."""


class TensorBoard:
    """Writes event files under the run's folder, for `tensorboard --logdir`."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, record["iteration"])
        self.writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()


class WandB:
    """Sends to Weights & Biases under the run's folder name."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(project="onehour", name=folder.name, dir=str(folder), config=recipe, resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        self.run.log(record, step=record["iteration"])

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


NAMED = {"tensorboard": TensorBoard, "wandb": WandB}


def load_logger(spec: str | None) -> Logger | None:
    """The logger of `--log`.

    Raises:
        ValueError: for an unknown name, a missing package (with the command that installs it), or a class that lacks
            one of the three methods.

    >>> load_logger(None) is None
    True
    """
    if spec is None:
        return None
    if spec in NAMED:
        try:
            __import__(spec)
        except ImportError as error:
            raise ValueError(f"--log {spec} needs a package: pip install 'onehour[{spec}]'") from error
        return NAMED[spec]()
    if not is_entry(spec):
        raise ValueError(f"no logger is called {spec!r}; expected {nearest(spec, NAMED)}, or package.module:Class")
    try:
        logger = resolve("logger", spec)()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"logger {spec} failed when called: {blame(error)}") from error
    missing = [name for name in ("start", "log", "finish") if not callable(getattr(logger, name, None))]
    if missing:
        raise ValueError(f"logger {spec} has no method {missing[0]}; expected start, log and finish")
    return logger


class Loggers:
    """Calls a logger until it fails, once says so, and goes on without it.

    >>> Loggers(None).log({"iteration": 1})
    """

    def __init__(self, logger: Logger | None) -> None:
        self.logger = logger

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        self._call("start", recipe, folder)

    def log(self, record: dict[str, Any]) -> None:
        self._call("log", record)

    def finish(self, summary: dict[str, Any]) -> None:
        self._call("finish", summary)

    def _call(self, method: str, *arguments: Any) -> None:
        if self.logger is None:
            return
        try:
            getattr(self.logger, method)(*arguments)
        except Exception as error:
            name = type(self.logger).__name__
            with suppress(OSError):  # nor does an output that cannot be written
                print(f"warning: {name}.{method} failed ({error}); the run goes on without it", file=sys.stderr)
            self.logger = None
