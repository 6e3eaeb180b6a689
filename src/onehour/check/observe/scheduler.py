"""Schedulers: every step of theirs, and where they lead, run to the end on a copy (§2.2, §5.1)."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LRScheduler, ReduceLROnPlateau

from onehour.check.observe.internals import as_if_stepped, parts_of
from onehour.check.observe.optimizer import Optimizers
from onehour.check.observe.recorder import Numbering, Patches, TapeRecorder, quiet
from onehour.check.observe.source import maker_line, user_line
from onehour.check.tape import SchedulerCurve, SchedulerMade, SchedulerStep
from onehour.rules.probe import unwrapped

STEPS = 1_000_000  # of a copy that is run to the end
RESTARTS = (CosineAnnealingWarmRestarts, CyclicLR)  # schedules that are meant to jump up


class Schedulers:
    """Watches every scheduler that follows torch's `LRScheduler`, and the `only` one that was made before."""

    def __init__(self, recorder: TapeRecorder, optimizers: Optimizers, only: Any = None) -> None:
        self.recorder, self.optimizers, self.only = recorder, optimizers, only
        self.numbers = Numbering()
        self.copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self.depth = 0
        self.parts: set[int] = set()  # schedulers that another one steps

    def install(self, patches: Patches) -> None:
        """Stand before the constructors and steps of all classes, those to come too."""
        for kind in {LRScheduler, *_subclasses(LRScheduler)}:
            self._stand_before(kind)

        def subclassed(kind: type[LRScheduler], **options: Any) -> None:
            super(LRScheduler, kind).__init_subclass__(**options)
            self._stand_before(kind)

        patches.put(LRScheduler, "__init_subclass__", classmethod(subclassed))
        if self.only is not None:
            self._made(self.only, None)

    def _stand_before(self, kind: type) -> None:
        for name, observer in (("step", self._step), ("__init__", self._init)):
            if name in vars(kind):
                self.recorder.patches.around(kind, name, observer)

    def _init(self, original: Any, scheduler: Any, *arguments: Any, **options: Any) -> None:
        self.depth += 1  # its own first step is none of the loop's
        try:
            original(scheduler, *arguments, **options)
        finally:
            self.depth -= 1
        if self.depth == 0:
            self._made(scheduler, maker_line(scheduler))

    @quiet
    def _made(self, scheduler: Any, place: str | None) -> None:
        parts = parts_of(scheduler)
        self.parts |= {self.numbers.of(part) for part in parts}
        optimizer = _optimizer_of(scheduler)
        number = None if optimizer is None else self.optimizers.numbers.of(optimizer)
        numbers = [self.numbers.of(part) for part in parts]
        restarts = any(isinstance(part, RESTARTS) for part in [scheduler, *parts])
        self.recorder.tape.add(
            SchedulerMade(place, self.numbers.of(scheduler), type(scheduler).__name__, number, numbers, restarts)
        )
        if not isinstance(scheduler, ReduceLROnPlateau) and optimizer is not None:
            self.copies[scheduler] = _copied(scheduler, optimizer)

    def _step(self, original: Any, scheduler: Any, *arguments: Any, **options: Any) -> Any:
        self.depth += 1
        try:
            return original(scheduler, *arguments, **options)
        finally:
            self.depth -= 1
            if self.depth == 0:
                self._stepped(scheduler)

    @quiet
    def _stepped(self, scheduler: Any) -> None:
        self.recorder.tape.add(SchedulerStep(user_line(), self.numbers.of(scheduler)))

    def run_to_the_end(self, steps: dict[int, int]) -> None:
        """Write down the whole curve of each scheduler that was copied; a run takes so many steps of each number."""
        for scheduler, copied in list(self.copies.items()):
            number = self.numbers.of(scheduler)
            if number in steps and number not in self.parts:
                self._run(number, copied, steps[number])

    @quiet
    def _run(self, number: int, copied: Any, steps: int) -> None:
        self.depth += 1  # a copy's steps are none of the loop's
        rates = curve(copied, min(steps, STEPS))
        self.depth -= 1
        self.recorder.tape.add(SchedulerCurve(scheduler=number, rates=runs_of(rates)))


def curve(scheduler: Any, steps: int) -> list[float]:
    """The rates of a copied scheduler before its first step and after each; ends early where it refuses to go on."""
    optimizer = _optimizer_of(scheduler)
    assert optimizer is not None
    group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
    rates = [float(group["lr"])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            try:
                scheduler.step()
                rates.append(float(group["lr"]))
            except Exception:  # OneCycleLR raises at its end; beyond it a power of a negative number is complex
                break
    return rates


def runs_of(rates: list[float]) -> list[list[float]]:
    """Equal neighbours as one pair of how many and what; long curves thinned in the middle."""
    pairs: list[list[float]] = [[sum(1 for _ in same), rate] for rate, same in itertools.groupby(rates)]
    head, middle, tail = pairs[:1000], pairs[1000:-1000], pairs[1000:][-1000:]
    every = -(-len(middle) // 2000) or 1
    thin = [[sum(n for n, _ in middle[i : i + every]), middle[i][1]] for i in range(0, len(middle), every)]
    return head + thin + tail


def _copied(scheduler: Any, optimizer: Optimizer) -> Any:
    """A copy with an optimizer of its own that has the same groups and no weights."""
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    stand_in.param_groups = [
        {
            key: [torch.zeros(1)] if key == "params" else value.clone() if torch.is_tensor(value) else value
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    stand_in.defaults = dict(optimizer.defaults)
    as_if_stepped(stand_in)
    functions = getattr(scheduler, "lr_lambdas", [])  # methods of a large object, perhaps
    memo = {id(function): function for function in functions} | {id(optimizer): stand_in}
    for part in [scheduler, *parts_of(scheduler)]:
        memo[id(getattr(part, "optimizer", None))] = stand_in  # what wraps it, too
    memo.pop(id(None), None)
    return copy.deepcopy(scheduler, memo)


def _optimizer_of(scheduler: Any) -> Optimizer | None:
    optimizer = getattr(scheduler, "optimizer", None)
    if optimizer is None and parts_of(scheduler):
        optimizer = _optimizer_of(parts_of(scheduler)[0])
    inner = unwrapped(optimizer) if optimizer is not None else None  # Accelerate's wraps it
    return inner if isinstance(inner, Optimizer) else None


def _subclasses(kind: type) -> set[type]:
    return {below for child in kind.__subclasses__() for below in ({child} | _subclasses(child))}
