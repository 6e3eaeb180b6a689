"""All observers of one run, put in place together and taken away together."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from onehour.check.case import planned_steps
from onehour.check.observe.backward import Backwards
from onehour.check.observe.evaluation import Evaluations
from onehour.check.observe.forward import Forwards
from onehour.check.observe.group import Groups
from onehour.check.observe.loader import Loaders
from onehour.check.observe.optimizer import Optimizers
from onehour.check.observe.recorder import TapeRecorder
from onehour.check.observe.scheduler import Schedulers
from onehour.check.story import Story


class Observers:
    """Everything that watches a run: this model, optimizer and scheduler, or all where they are None."""

    def __init__(
        self,
        recorder: TapeRecorder,
        *,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
    ) -> None:
        self.recorder = recorder
        self.optimizers = Optimizers(recorder, optimizer)
        self.evaluations = Evaluations(recorder)
        self.loaders = Loaders(recorder, self.evaluations)
        self.backwards = Backwards(recorder, self.optimizers, self.loaders)
        self.forwards = Forwards(recorder, self.backwards, model)
        self.groups = Groups(recorder, self.forwards)
        self.schedulers = Schedulers(recorder, self.optimizers, scheduler)

    def install(self) -> None:
        self.forwards.on_evaluation = lambda: self.groups.look("evaluation")
        self.optimizers.on_before = self.groups.steps
        self.optimizers.on_step = self.groups.stepped
        watching = (self.optimizers, self.backwards, self.forwards, self.loaders, self.schedulers, self.groups)
        for observer in watching:
            observer.install(self.recorder.patches)

    def remove(self) -> None:
        self.recorder.patches.close()

    def conclude(self) -> None:
        """Write down what can only be said at the end: the models, and where the schedules lead."""
        self.evaluations.tracer.stop()
        self.loaders.settle()
        self.forwards.describe()
        self.schedulers.run_to_the_end(planned_steps(Story(self.recorder.tape)))
        self.recorder.finished = True
