"""What was observed, in the order in which it happened: a frozen dataclass for each kind of event.

Events hold plain values, which travel as JSON from process to process. Every event has `where`, file:line of the user's
code. Gradients, weights and statistics are projections (`observe/digests.py`): a few numbers that add as the tensors
do. A field that is None was not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MOST_EVENTS = 200_000
"""Events that a tape holds: some 20 thousand iterations; later ones are dropped, and `full` says so."""

MEANS = ("mean", "batchmean")
"""Reductions of a loss that divide; the second, of kl_div, by the batch."""

Projection = list[float]
Projections = dict[str, Projection]  # by an optimizer's number, as JSON has it, or by a parameter's name


@dataclass(frozen=True, slots=True)
class TapeEvent:
    """One thing that happened, and where in the user's code."""

    where: str | None = None


@dataclass(frozen=True, slots=True)
class Trouble(TapeEvent):
    """An observer failed."""

    observer: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ProcessStarted(TapeEvent):
    """The script started a process of its own."""


@dataclass(frozen=True, slots=True)
class GroupJoined(TapeEvent):
    """The process joined a process group."""


@dataclass(frozen=True, slots=True)
class ModelWrapped(TapeEvent):
    """DistributedDataParallel took a model; whether it overwrites BatchNorm's running statistics by process 0's."""

    broadcast: bool = False


@dataclass(frozen=True, slots=True)
class SyncBatchNormMade(TapeEvent):
    """A SyncBatchNorm layer was made."""


@dataclass(frozen=True, slots=True)
class InitialWeights(TapeEvent):
    """The first elements of some weights before the first update."""

    values: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class WeightsUpdated(TapeEvent):
    """One of the first steps of an optimizer on one of several processes."""

    optimizer: int = 0
    before: Projections = field(default_factory=dict[str, Projection])  # all weights that it may change
    after: Projections = field(default_factory=dict[str, Projection])
    gradients: Projections = field(default_factory=dict[str, Projection])  # those that it took
    parted: list[str] = field(default_factory=list[str])
    """Names of those that look like an expert or a shard, which each process has for itself."""


@dataclass(frozen=True, slots=True)
class RunningStatistics(TapeEvent):
    """The running means of this process after so many updates.

    `when` is "update" (each process has its own, before anyone exchanged them), "evaluation" or "save" (they are used).
    """

    when: str = "update"
    updates: int = 0
    numbers: Projection = field(default_factory=list[float])
    values: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A group of an optimizer, `parameters` in number."""

    weight_decay: float = 0.0
    momentum: float = 0.0
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerSeen(TapeEvent):
    """An optimizer stepped for the first time; `where` it was made. For all but its groups see `character`."""

    optimizer: int = 0
    groups: list[ParameterGroup] = field(default_factory=list[ParameterGroup])
    form: str | None = None
    velocity: list[str] = field(default_factory=list[str])
    adaptive: bool | None = None
    decay: list[list[float]] = field(default_factory=list[list[float]])

    @property
    def weight_decay(self) -> float:
        """The largest of its groups'."""
        return max((group.weight_decay for group in self.groups), default=0.0)


@dataclass(frozen=True, slots=True)
class OptimizerStep(TapeEvent):
    """An optimizer stepped."""

    optimizer: int = 0
    rates: list[float] = field(default_factory=list[float])  # of its groups
    momenta: list[float] = field(default_factory=list[float])  # of its groups
    closure: bool = False  # whether it called one
    with_gradient: int | None = None  # how many of its parameters have a gradient
    parameters: int | None = None  # how many there are
    final: Projection | None = None  # the gradient that it took, before clipping
    left: Projection | None = None  # the gradient that lies there after it
    moved: Projection | None = None  # the weights' change
    kept: dict[str, float] = field(default_factory=dict[str, float])
    """How each state tensor was scaled since the step before; 1 where nobody touched it."""
    off: list[float] | None = None  # the update's relative distance from eq 9 and from eq 10, where the rate changed


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A loss that a backward pass came through, and the weight of its samples in what the pass began with."""

    name: str = ""  # of the function of torch.nn.functional
    where: str | None = None
    reduction: str = "mean"  # "mean", "batchmean", "sum" or "none"
    count: float | None = None  # labels that are not ignored; None where it is not known
    total: float = 0.0  # the sum of all samples' weights
    low: float = 0.0  # the smallest
    high: float = 0.0  # the largest


@dataclass(frozen=True, slots=True)
class BackwardPass(TapeEvent):
    """A backward pass ended."""

    terms: list[LossTerm] = field(default_factory=list[LossTerm])  # the losses that it came through
    samples: int | None = None  # of the model's input; None where it was not seen
    scale: float = 1.0  # of a GradScaler
    before: Projections = field(default_factory=dict[str, Projection])  # the gradients that lay there as it began
    local: Projections = field(default_factory=dict[str, Projection])
    """What it added on this process, before any reduction."""
    content: Projection | None = None  # a projection of the model's input, where no loader gave it
    carried: bool = False  # whether a recurrent network began with another batch's state: they come in a text's order
    direct: bool = True  # whether it was the user's own code that called it
    penalized: int = 0  # parameters whose squares or norms are in the loss
    penalty: float = 0.0  # the largest λ of theirs: λ·w is added to the gradient


@dataclass(frozen=True, slots=True)
class LoaderSeen(TapeEvent):
    """A loader was iterated for the first time; `where` it was made."""

    loader: int = 0
    samples: int | None = None  # None where unknown, as batches may be
    batches: int | None = None
    batch_size: int | None = None
    drop_last: bool = False
    sampler: str = ""  # its class
    replicas: int | None = None  # processes that the sampler divides among
    replacement: bool = False  # whether it may draw a sample twice
    processes: int = 0  # that load data
    probe: list[float] | None = None  # what lies at a few indices, to tell whether processes have one data set


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The samples of an epoch: how many, how many different ones, digests of their order and of their set.

    `sequential` is whether the first are in ascending order, `largest` the largest batch. Of each loader's first two
    passes `indices` holds them all: int64s in base 64.
    """

    count: int = 0
    unique: int = 0
    digest: str = ""
    members: int = 0
    sequential: bool = False
    largest: int = 0
    indices: str | None = None


@dataclass(frozen=True, slots=True)
class EpochBegan(TapeEvent):
    """A pass over a loader began; `planned` is how many its loop would take, `order` None without a sampler."""

    loader: int = 0
    epoch: int = 0
    batches: int | None = None
    planned: int | None = None
    order: SampleOrder | None = None


@dataclass(frozen=True, slots=True)
class BatchGiven(TapeEvent):
    """A batch went to the loop."""

    loader: int = 0
    epoch: int = 0
    index: int = 0  # within its pass
    size: int | None = None  # samples
    random: dict[str, str] | None = None  # digests of the random generators' states before it was made
    drew: list[str] = field(default_factory=list[str])  # the generators that making it drew from
    content: Projection | None = None  # a projection of it
    looks: list[list[float]] | None = None  # of its first samples, see `observe/digests.py`


@dataclass(frozen=True, slots=True)
class EpochEnded(TapeEvent):
    """A pass over a loader ended; `followed` is False where no enumerate noticed its cut.

    If it trained nothing, `counts` has [right, samples] of each batch, and `losses` [mean, count].
    """

    loader: int = 0
    epoch: int = 0
    cut: bool = False
    followed: bool = True
    trained: bool = True
    batches: int | None = None
    samples: int | None = None
    counts: list[list[int]] = field(default_factory=list[list[int]])
    losses: list[list[float]] = field(default_factory=list[list[float]])


@dataclass(frozen=True, slots=True)
class ValueSeen(TapeEvent):
    """A number that the user's code made after an evaluation."""

    loader: int = 0
    epoch: int = 0
    name: str = ""
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class MetricsGathered(TapeEvent):
    """Accelerate left out what its samplers had repeated."""


@dataclass(frozen=True, slots=True)
class SchedulerMade(TapeEvent):
    """A scheduler of an optimizer was made; `parts` are the schedulers that it steps itself."""

    scheduler: int = 0
    name: str = ""
    optimizer: int | None = None
    parts: list[int] = field(default_factory=list[int])
    restarts: bool = False  # whether it, or a part of it, is meant to jump up


@dataclass(frozen=True, slots=True)
class SchedulerStep(TapeEvent):
    """A scheduler stepped."""

    scheduler: int = 0


@dataclass(frozen=True, slots=True)
class SchedulerCurve(TapeEvent):
    """The rates of a copy that was run to the end: [how many steps, rate] pairs."""

    scheduler: int = 0
    rates: list[list[float]] = field(default_factory=list[list[float]])


@dataclass(frozen=True, slots=True)
class ModelSeen(TapeEvent):
    """A model that was trained."""

    affine: int = 0  # γ and β of its BatchNorms in number
    synced: int = 0  # SyncBatchNorm layers
    decayed: list[str] = field(default_factory=list[str])  # γ and β that are decayed
    decay: float = 0.0  # the largest of theirs
    optimizer: int | None = None  # by this one
    unused: list[str] = field(default_factory=list[str])
    """Names of trainable parameters with a gradient that no optimizer holds."""
    parameters: int = 0  # trainable ones


@dataclass(frozen=True, slots=True)
class BatchNormSizes(TapeEvent):
    """Every n that a BatchNorm in training normalised over."""

    sizes: list[int] = field(default_factory=list[int])


E = TypeVar("E", bound=TapeEvent)

EVENTS: dict[str, type[TapeEvent]] = {
    name: kind for name, kind in list(globals().items()) if isinstance(kind, type) and issubclass(kind, TapeEvent)
}
"""Every kind by its name."""


@dataclass
class Tape:
    """Events in order."""

    events: list[TapeEvent] = field(default_factory=list[TapeEvent])
    full: bool = False
    end: dict[str, Any] = field(default_factory=dict[str, Any])  # how the script ended, once it has

    def add(self, event: TapeEvent) -> None:
        if len(self.events) < MOST_EVENTS:
            self.events.append(event)
        else:
            self.full = True

    def of(self, kind: type[E]) -> Iterator[E]:
        return (event for event in self.events if isinstance(event, kind))

    def save(self, path: Path) -> None:
        events = [[type(event).__name__, asdict(event)] for event in self.events]
        content = {"full": self.full, "end": self.end, "events": events}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)  # so that who sees the file sees all of it

    @classmethod
    def load(cls, path: Path) -> Tape:
        content = json.loads(path.read_text(encoding="utf-8"))
        events = [EVENTS[name](**_read(facts)) for name, facts in content["events"]]
        return cls(events, content["full"], content["end"])


def _read(facts: dict[str, Any]) -> dict[str, Any]:
    """An event's fields, with the dataclasses in them that JSON has as objects."""
    many = {"terms": LossTerm, "groups": ParameterGroup}
    facts |= {name: [kind(**each) for each in facts[name]] for name, kind in many.items() if name in facts}
    if facts.get("order"):
        facts["order"] = SampleOrder(**facts["order"])
    return facts
