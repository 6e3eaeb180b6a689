"""Watching a loop that a trainer owns: callbacks for Lightning and the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from typing import Any

from onehour.check.finding import as_table
from onehour.check.watching import Report, Watch

__all__ = ["hf_callback", "lightning_callback"]


def lightning_callback(**options: Any) -> Any:
    """A callback for Lightning's Trainer; its `report` is filled when the fit ends, and printed by process 0.

    Args:
        options: those of `watch` behind the optimizer.

    Raises:
        ValueError: if neither lightning nor pytorch_lightning is installed.
    """
    lightning = _installed("lightning.pytorch", "pytorch_lightning")

    class OnehourWatch(lightning.Callback):
        """Watches `fit`."""

        report = Report()
        _watching: Watch | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scheduler = schedulers[0] if len(schedulers) == 1 else None
            self._watching = Watch(pl_module, trainer.optimizers[0], scheduler=scheduler, **options)
            self._watching.start()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self._watching is not None:
                self.report = self._watching.stop()
                _say(self.report, first=trainer.is_global_zero)

    return OnehourWatch()


def hf_callback(**options: Any) -> Any:
    """A callback for the Hugging Face Trainer; its `report` is filled when training ends, and printed by process 0.

    Args:
        options: those of `watch` behind the optimizer.

    Raises:
        ValueError: if transformers is not installed.
    """
    transformers = _installed("transformers")

    class OnehourWatch(transformers.TrainerCallback):
        """Watches `train`."""

        report = Report()
        _watching: Watch | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._watching = Watch(given["model"], given["optimizer"], scheduler=given.get("lr_scheduler"), **options)
            self._watching.start()

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self._watching is not None:
                self.report = self._watching.stop()
                _say(self.report, first=state.is_world_process_zero)

    return OnehourWatch()


def _say(report: Report, *, first: bool) -> None:
    if first and report.findings:
        print(as_table(report.findings))


def _installed(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ValueError(f"this callback needs {' or '.join(names)}: pip install {names[0].partition('.')[0]}")
