"""The tape read as a story: updates with the batches that they gathered, epochs, optimizers, loaders, schedules."""

from __future__ import annotations

import math
from array import array
from base64 import b64decode
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from onehour.check.tape import (
    BackwardPass,
    BatchGiven,
    EpochBegan,
    EpochEnded,
    LoaderSeen,
    LossTerm,
    ModelSeen,
    OptimizerSeen,
    OptimizerStep,
    SchedulerCurve,
    SchedulerMade,
    Tape,
)

T = TypeVar("T")


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """c and the relative rest of the best a ≈ c·b; (0, 1) where b is zero.

    >>> ratio([2.0, 4.0], [1.0, 2.0])
    (2.0, 0.0)
    """
    square = math.fsum(y * y for y in b)
    size = math.sqrt(math.fsum(x * x for x in a))
    if square == 0 or len(a) != len(b):
        return 0.0, 1.0
    c = math.fsum(x * y for x, y in zip(a, b, strict=True)) / square
    rest = math.sqrt(math.fsum((x - c * y) ** 2 for x, y in zip(a, b, strict=True)))
    return c, rest / size if size else 0.0


def most_common(values: Iterable[T | None]) -> T | None:
    """The value that occurs most often, the first of equals; None where there is none."""
    counts = Counter(value for value in values if value is not None)
    return counts.most_common(1)[0][0] if counts else None


@dataclass
class MicroBatch:
    """One backward pass, or several over one batch, which came from a loader, or from none; or one over several."""

    loader: int | None
    epoch: int | None
    index: int | None
    samples: int | None
    terms: list[LossTerm]  # the losses that it came through, with the weight of their samples
    backward: BackwardPass  # the first
    batches: int = 1  # whose losses were added before it

    @property
    def term(self) -> LossTerm | None:
        """The last loss of the forward pass, which the backward pass comes to first."""
        return self.terms[0] if self.terms else None

    @property
    def weight(self) -> float | None:
        """Σ of its samples' weights in all its losses: 1 for a mean, 1/a for one of a batches that are gathered."""
        return math.fsum(term.total for term in self.terms) if self.terms else None


@dataclass
class Update:
    """One optimizer step and what it gathered since the optimizer's step before."""

    step: OptimizerStep
    microbatches: list[MicroBatch]

    @property
    def optimizer(self) -> int:
        return self.step.optimizer

    @property
    def rate(self) -> float:
        """The largest of its groups' rates."""
        return max(self.step.rates, default=0.0)

    @property
    def samples(self) -> int | None:
        """How many this process gave it."""
        sizes = [micro.samples for micro in self.microbatches]
        return None if not sizes or None in sizes else sum(filter(None, sizes))

    @property
    def epoch(self) -> int | None:
        return self.microbatches[-1].epoch if self.microbatches else None

    @property
    def local(self) -> list[float] | None:
        """The gradient that its backward passes gave on this process; None where one was not looked at."""
        known = [micro.backward.local.get(str(self.optimizer)) for micro in self.microbatches]
        if not known or None in known:
            return None
        return [math.fsum(column) for column in zip(*filter(None, known), strict=True)]


class Story:
    """One process's run, read from its tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.optimizers: dict[int | None, OptimizerSeen] = {e.optimizer: e for e in tape.of(OptimizerSeen)}
        self.loaders: dict[int | None, LoaderSeen] = {e.loader: e for e in tape.of(LoaderSeen)}
        self.schedulers: dict[int | None, SchedulerMade] = {e.scheduler: e for e in tape.of(SchedulerMade)}
        self.curves = {event.scheduler: event.rates for event in tape.of(SchedulerCurve)}
        self.models = list(tape.of(ModelSeen))
        self.updates: list[Update] = []
        self._passes: list[tuple[list[MicroBatch], MicroBatch]] = []
        """Over the batch that is read: each with the window that it lies in."""
        self._place: tuple[int | None, int | None, int | None] = None, None, None
        self._whole: int | None = None
        self._added = _added(tape)
        self._given: Counter[int] = Counter()  # batches of the pass over each loader
        self.unmatched: set[int | None] = set()
        """Loaders most of whose batches seem to be in no backward pass: how many each takes is not known."""
        self._read()

    def _read(self) -> None:
        waiting: list[MicroBatch] = []
        given: dict[int, deque[BatchGiven]] = {}
        loader: int | None = None
        for event in self.tape.events:
            if isinstance(event, EpochBegan) or (isinstance(event, EpochEnded) and not event.trained):
                if isinstance(event, EpochBegan):
                    self._left(event.loader, given.get(event.loader))
                given.pop(event.loader, None)
                self._given[event.loader] = 0
            elif isinstance(event, BatchGiven):
                # Some loops take the next batches before they come to the one that they have.
                given.setdefault(event.loader, deque()).append(event)
                self._given[event.loader] += 1
                loader = event.loader
            elif isinstance(event, BackwardPass):
                self._gather(waiting, given.get(loader) if loader is not None else None, event)
            elif isinstance(event, OptimizerStep):
                self.updates.append(Update(event, waiting))
                waiting = []
        self._settle()
        for number, queue in given.items():
            self._left(number, queue)
        for micro in (micro for update in self.updates for micro in update.microbatches):
            micro.samples = None if micro.loader in self.unmatched else micro.samples

    def _left(self, loader: int, queue: deque[BatchGiven] | None) -> None:
        """What waits when a pass over a loader is over. Loops that take batches ahead leave one or two."""
        left, all_given = len(queue or ()), self._given[loader]
        if left > 2 and all_given / 2 <= left < all_given:
            self.unmatched.add(loader)

    def _gather(self, waiting: list[MicroBatch], queue: deque[BatchGiven] | None, backward: BackwardPass) -> None:
        samples, terms = backward.samples, backward.terms
        again = bool(waiting and backward.content) and backward.content == waiting[-1].backward.content
        if queue:
            self._settle()
            batches = [queue.popleft() for _ in range(min(self._added[queue[0].loader], len(queue)))]
            sizes, last = [batch.size for batch in batches], batches[-1]
            size = None if None in sizes else sum(filter(None, sizes))
            self._place, self._whole = (last.loader, last.epoch, last.index), size
            # A loop that splits its batches shows in the samples of each pass; one that makes them longer does not.
            split = samples is not None and (size is None or samples < size) and len(batches) == 1
            own = samples if split else size
            waiting.append(MicroBatch(*self._place, own, list(terms), backward, len(batches)))
        elif queue is None and not again:
            waiting.append(MicroBatch(None, None, None, samples, list(terms), backward))
            return
        elif again or (waiting and not (samples is not None and self._whole is not None and samples < self._whole)):
            waiting[-1].terms += terms  # a second loss over the same batch
            return
        else:
            waiting.append(MicroBatch(*self._place, samples, list(terms), backward))
        self._passes.append((waiting, waiting[-1]))

    def _settle(self) -> None:
        """What looked like parts of the batch before are whole, if the model's first dimension is not the samples'."""
        passes, whole, self._passes = self._passes, self._whole, []
        sized = [micro for _, micro in passes if micro.samples]
        short = [id(micro) for micro in sized if whole is not None and (micro.samples or 0) < whole]
        if not short or whole is None or (len(short) == len(sized) and _parts(sized, whole)):
            return
        previous: tuple[list[MicroBatch], MicroBatch] | None = None
        for window, micro in passes:
            if id(micro) in short and previous is not None and previous[0] is window:
                previous[1].terms += micro.terms
                window[:] = [other for other in window if other is not micro]
                continue
            micro.samples = whole if id(micro) in short else micro.samples
            previous = window, micro

    @property
    def main(self) -> int | None:
        """The optimizer that steps most often."""
        return most_common(update.optimizer for update in self.updates)

    @property
    def main_optimizer(self) -> OptimizerSeen | None:
        return self.optimizers.get(self.main)

    @property
    def steps(self) -> list[Update]:
        return [update for update in self.updates if update.optimizer == self.main]

    @property
    def one_optimizer(self) -> bool:
        """Whether one optimizer does all steps, so that what lies between two of them belongs to the second."""
        return len({update.optimizer for update in self.updates}) == 1

    @property
    def training(self) -> int | None:
        """The loader that the updates' batches come from."""
        return most_common(micro.loader for update in self.updates for micro in update.microbatches)

    @property
    def given(self) -> list[BatchGiven]:
        """The batches of that loader."""
        return [event for event in self.tape.of(BatchGiven) if event.loader == self.training]

    def order(self, loader: int, epoch: int) -> Sequence[int] | None:
        """The samples of a pass over a loader, in their order; None where they are not known."""
        known = [event.order for event in self.epochs(loader)[epoch : epoch + 1] if event.order is not None]
        return array("q", b64decode(known[0].indices)) if known and known[0].indices is not None else None

    def epochs(self, loader: int | None) -> list[EpochBegan]:
        """The passes over a loader, without those that only look at a batch, as `next(iter(loader))`.

        Of one that trains, those that only evaluate are left out too.
        """
        passes = [event for event in self.tape.of(EpochBegan) if event.loader == loader]
        trained = {event.epoch: event.trained for event in self.ends(loader)}
        if any(trained.values()):
            passes = [event for event in passes if trained.get(event.epoch, True)]
        given = Counter(event.epoch for event in self.tape.of(BatchGiven) if event.loader == loader)
        used = {micro.epoch for update in self.updates for micro in update.microbatches if micro.loader == loader}
        used |= {event.epoch for event in self.ends(loader)}
        return [event for event in passes if event is passes[-1] or event.epoch in used or given[event.epoch] > 1]

    def ends(self, loader: int | None) -> list[EpochEnded]:
        return [event for event in self.tape.of(EpochEnded) if event.loader == loader]

    def trained(self) -> list[EpochEnded]:
        """The ends of the passes over the training loader that trained something."""
        return [event for event in self.ends(self.training) if event.trained]

    @property
    def planned(self) -> int | None:
        """How many epochs the run would take, where its loop says so."""
        plans = {event.planned for event in self.epochs(self.training)}
        (plan,) = plans if len(plans) == 1 else (None,)
        return plan if plan is not None and plan >= len(self.epochs(self.training)) else None

    @property
    def window(self) -> int:
        """Batches that an update gathers, most often."""
        return most_common(sum(m.batches for m in update.microbatches) or None for update in self.updates) or 1

    @property
    def updates_an_epoch(self) -> int | None:
        """Of the training loader, in an epoch that is not cut: as they were counted in one, else by its batches."""
        passes, ended = self.epochs(self.training), {event.epoch: event for event in self.ends(self.training)}
        if not passes or passes[0].batches is None or self.training in self.unmatched:
            return None
        for number, event in enumerate(passes):
            # One that a later one follows has ended without a word: the loop has left it.
            end, left = ended.get(event.epoch), number + 1 < len(passes)
            steps = sum(update.epoch == event.epoch for update in self.steps)
            if steps and (not end.cut if end is not None else left):
                return steps
        return max(passes[0].batches // self.window, 1)

    def median_samples(self) -> int | None:
        """Samples of an update on this process, most often."""
        return most_common(update.samples for update in self.updates)


def _added(tape: Tape) -> defaultdict[int, int]:
    """Of how many batches of a loader the losses are added before each backward pass: as many come before each."""
    seen: dict[int, list[tuple[int, int]]] = {}
    since: Counter[int] = Counter()
    loader: int | None = None
    for event in tape.events:
        if isinstance(event, EpochEnded) and not event.trained:
            since[event.loader] = 0
        elif isinstance(event, BatchGiven):
            loader = event.loader
            since[loader] += 1
        elif isinstance(event, BackwardPass):
            losses = Counter((term.name, term.where) for term in event.terms)
            if losses and loader is not None:
                seen.setdefault(loader, []).append((since[loader], max(losses.values())))
            since.clear()
    added = defaultdict[int, int](lambda: 1)
    for number, passes in seen.items():
        # The first may come after batches that were taken ahead.
        batches, losses = most_common(passes[1:]) or (1, 1)
        if batches > 1 and losses % batches == 0:
            added[number] = batches
    return added


def _parts(microbatches: list[MicroBatch], whole: int) -> bool:
    """Whether passes over a batch that seem to take less than the whole do: they add up to it, or their losses agree.

    The first dimension of a model's input may be time.
    """
    counts = [[term.count for term in micro.terms if term.count] for micro in microbatches]
    if any(whole in own for own in counts):
        return False
    samples = [micro.samples or 0 for micro in microbatches]
    return sum(samples) % whole == 0 or all(
        any(count % size == 0 and count % whole for count in own) for size, own in zip(samples, counts, strict=True)
    )


def losses(gathered: list[MicroBatch]) -> list[list[LossTerm]]:
    """Each loss that all batches have: its terms, one of each batch. What the forward pass computes first comes first.

    Losses of one function whose weights vary from batch to batch are one more together: mixup divides a batch's weight.
    """
    keyed = [_keyed(micro) for micro in gathered]
    found: list[list[LossTerm]] = []
    for name in dict.fromkeys(name for terms in keyed for name, *_ in terms):
        own = [[term for term in terms.values() if term.name == name] for terms in keyed]
        shared = [key for key in keyed[0] if key[0] == name and all(key in terms for terms in keyed)]
        apart = [[terms[key] for terms in keyed] for key in shared]
        steady = all(alike([term.total for term in loss]) for loss in apart)
        found += apart
        parts = not steady or any(len(each) != len(shared) for each in own)
        if parts and all(len({(term.count, term.reduction) for term in each}) == 1 for each in own):
            found.append([_together(each) for each in own])
    return found


def _keyed(micro: MicroBatch) -> dict[tuple[str, str | None, int], LossTerm]:
    """A batch's losses by function, line, and which of the line's it is; hooks see the last one first."""
    lines: Counter[tuple[str, str | None]] = Counter()
    keyed: dict[tuple[str, str | None, int], LossTerm] = {}
    for term in reversed(micro.terms):
        line = term.name, term.where
        keyed[*line, lines[line]] = term
        lines[line] += 1
    return keyed


def _together(terms: list[LossTerm]) -> LossTerm:
    total, low, high = (math.fsum(numbers) for numbers in zip(*[(t.total, t.low, t.high) for t in terms], strict=True))
    return replace(terms[0], total=total, low=low, high=high)


def is_mean(loss: list[LossTerm]) -> bool:
    """Whether its weights are 1 if nothing is multiplied: a distillation's batchmean has a temperature in it."""
    return all(term.reduction == "mean" for term in loss)


def alike(numbers: list[float], tolerance: float = 1e-3) -> bool:
    """Whether numbers are one number.

    >>> alike([1.0, 1.0005]), alike([1.0, 1.01])
    (True, False)
    """
    return max(numbers) - min(numbers) <= tolerance * max(map(abs, numbers))


def first_of(shares: tuple[float, ...], weights: list[list[float]], tolerance: float = 1e-3) -> float | None:
    """Which of the shares a mean loss's weights are; of several losses the first that is one: an auxiliary has any."""
    said = (share for each in weights for share in shares if all(abs(w / share - 1) < tolerance for w in each))
    return next(said, None)
