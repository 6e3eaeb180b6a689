"""Watching a loop that a trainer owns: callbacks for Lightning and the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from onehour.check.case import Base, Case
from onehour.check.formats import Report
from onehour.check.observe import Observers
from onehour.check.observe.recorder import TapeRecorder
from onehour.check.pitfalls import judge, not_judged, not_silenced, refuse_unknown
from onehour.check.story import Story

DEEP_UPDATES, WATCHED_EPOCHS, WATCHED_UPDATES = 4, 2, 1000
"""Updates that are looked at in full; then the passes over the training data, and the updates, that are counted."""


class Watch:
    """Watch a training loop; the report is filled when the block ends.

    The first 4 updates are looked at in full; steps and batches are counted for two epochs; after that nothing is
    left in the loop's way. The loop learns what it would have learned without. On several processes all must enter.
    Where no block can be put around the loop, call `start` and `stop`.

    Args:
        model: that is trained, wrapped or not.
        optimizer: that trains it.
        scheduler: if it was made before the block; one that is made inside is found.
        base_lr, base_minibatch: the recipe that the rate was scaled from; without them it is not judged.
        base_per_worker: n of that recipe, the samples that BatchNorm normalises over.
        base_weight_decay: of that recipe, as it was given to its optimizer.
        only, skip: ids of pitfalls to look for, or to leave out.

    Raises:
        ValueError: for another model or optimizer than torch's, or an unknown id.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, optimizer) as report:
    ...     for _ in range(3):
    ...         nn.functional.mse_loss(model(torch.randn(4, 2)), torch.randn(4, 1)).backward()
    ...         optimizer.step()
    >>> [finding.pitfall for finding in report.findings]
    ['step-without-zero-grad']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: Any = None,
        base_lr: float | None = None,
        base_minibatch: int | None = None,
        base_per_worker: int | None = None,
        base_weight_decay: float | None = None,
        only: Collection[str] = (),
        skip: Collection[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"watch needs the model first, a torch.nn.Module; got {type(model).__name__}")
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise ValueError(f"watch needs the optimizer second, a torch.optim.Optimizer; got {type(inner).__name__}")
        refuse_unknown([*only, *skip])
        self.base, self.only, self.skip = Base(base_lr, base_minibatch, base_per_worker, base_weight_decay), only, skip
        self.report = Report()
        self.recorder = TapeRecorder(deep_updates=DEEP_UPDATES, cut=False)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        self.recorder.on_pass, self.recorder.on_step = self._pass_begins, self._stepped
        self.observers = Observers(self.recorder, model=model, optimizer=inner, scheduler=scheduler)

    def __enter__(self) -> Report:
        self.start()
        return self.report

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.observers.remove()
            self.recorder.finished = True

    def start(self) -> None:
        self.observers.install()

    def _pass_begins(self, loader: int) -> None:
        if self.observers.loaders.trained[loader] >= WATCHED_EPOCHS:
            self._enough()

    def _stepped(self) -> None:
        if self.recorder.updates >= WATCHED_UPDATES:
            self._enough()

    def _enough(self) -> None:
        """All was seen: from here on the loop is alone."""
        if not self.recorder.finished:
            self.observers.conclude()
            self.observers.remove()

    def stop(self) -> Report:
        """End watching and judge; where several processes watch, each gets the findings of all."""
        self._enough()
        case = Case(self._stories(), self.base)
        self.report.findings = not_silenced(judge(case, only=self.only, skip=self.skip))
        self.report.notes = not_judged(case)
        return self.report

    def _stories(self) -> list[Story]:
        everyone: list[Any] = [self.recorder.tape]
        if self.recorder.world > 1 and dist.is_initialized():
            everyone = [None] * self.recorder.world
            dist.all_gather_object(everyone, self.recorder.tape, group=dist.new_group(backend="gloo"))
        return [Story(tape) for tape in everyone]


watch = Watch  # as it is used: `with watch(model, optimizer) as report: …`


class _CallbackWatch:
    """What both trainers' callbacks do as training begins and ends."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.report = options, Report()
        self._watching: Watch | None = None

    def begin(self, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        self._watching = Watch(model, optimizer, scheduler=scheduler, **self.options)
        self._watching.start()

    def end(self, *, first: bool) -> None:
        if self._watching is not None:
            self.report = self._watching.stop()
            if first and self.report.findings:
                print(self.report)


def lightning_callback(**options: Any) -> Any:
    """A callback for Lightning's Trainer; its `report` is filled when the fit ends, and printed by process 0.

    Its options are those of `watch` behind the optimizer. A ValueError if Lightning is not installed.
    """

    class OnehourWatch(_CallbackWatch, _installed("lightning.pytorch", "pytorch_lightning").Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self.begin(pl_module, trainer.optimizers[0], schedulers[0] if len(schedulers) == 1 else None)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.end(first=trainer.is_global_zero)

    return OnehourWatch(options)


def hf_callback(**options: Any) -> Any:
    """A callback for the Hugging Face Trainer; its `report` is filled when training ends, and printed by process 0.

    Its options are those of `watch` behind the optimizer. A ValueError if transformers is not installed.
    """

    class OnehourWatch(_CallbackWatch, _installed("transformers").TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.begin(given["model"], given["optimizer"], given.get("lr_scheduler"))

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.end(first=state.is_world_process_zero)

    return OnehourWatch(options)


def _installed(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ValueError(f"this callback needs {' or '.join(names)}: pip install {names[0].partition('.')[0]}")
