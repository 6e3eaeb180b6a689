"""How an epoch's samples are divided among processes (§3, Remark 4), in training and in evaluation (§5.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, found
from onehour.check.tape import Event

__all__ = [
    "dropped_evaluation",
    "overlapping_shards",
    "padded_evaluation",
    "padded_training_data",
    "shuffle_within_shard",
]


class _Shares:
    """The first pass of each process over one loader."""

    def __init__(self, case: Case, loader: int) -> None:
        self.loader = case.story.loaders[loader]
        self.events = [_first(story.epochs(loader)) for story in case.stories]
        self.orders = [story.order(loader, 0) for story in case.stories]
        self.second = [story.order(loader, 1) for story in case.stories]
        self.samples: int | None = self.loader.facts["samples"]
        self.known = self.samples is not None and all(order is not None for order in self.orders)
        probes = [
            story.loaders[loader].facts.get("probe") if loader in story.loaders else None for story in case.stories
        ]
        self.one = len(probes) == 1 or (bool(probes[0]) and all(probe == probes[0] for probe in probes))
        """Whether an index is the same sample on all processes."""
        self.apart = len(probes) > 1 and all(probes) and all(probe != probes[0] for probe in probes[1:])

    @property
    def divided(self) -> dict[str, Any]:
        """What the lines that divide the samples need."""
        return {
            "n": self.loader.facts["batch_size"] or "batch_size",
            "p": len(self.orders),
            "samples": self.samples or "len(data)",
        }

    @property
    def taken(self) -> list[Sequence[int]]:
        return [order for order in self.orders if order is not None]

    @property
    def total(self) -> int:
        """Draws of all processes in a pass."""
        return sum(len(order) for order in self.taken)

    @property
    def repeated(self) -> int:
        """Draws of a sample that was taken before, among the first N of all processes, batch by batch.

        Not among all: a pass of a stream that straddles epochs may be longer than one.
        """
        if self.stream:
            return 0
        size = max((event.facts["largest"] for event in self.events if event is not None), default=1) or 1
        first: list[int] = []
        # Padding stands at the end, and is counted where the pass is an epoch.
        whole = self.total <= (self.samples or 0) + self.padding
        for start in range(0, max(len(order) for order in self.taken), size):
            parts = [order[start : start + size] for order in self.taken]
            if not whole and len(first) + sum(map(len, parts)) > (self.samples or 0):
                break
            for part in parts:
                first += part
        return len(first) - len(set(first))

    @property
    def stream(self) -> bool:
        """Whether the passes go on one after another in a stream of epochs, nothing in it repeated or left out.

        All samples are then drawn equally often up to one, and a second pass does not begin an epoch of its own.
        """
        if any(order is None for order in self.second):
            return False
        first, second = (Counter(i for order in orders for i in order or ()) for orders in (self.orders, self.second))
        both = first + second
        drawn = [[counts[i] for i in range(self.samples or 0)] for counts in (first, both)]
        return len(second) < len(drawn[0]) and all(max(counts) - min(counts) <= 1 for counts in drawn)

    @property
    def padding(self) -> int:
        """Repetitions that come of making shares equal: at most a batch for each process."""
        batch = self.loader.facts["batch_size"] or 1
        return min(len(self.taken) * batch, max((self.samples or 0) // 20, len(self.taken)))


def overlapping_shards(case: Case) -> Finding | None:
    """Processes that take the same samples in one epoch.

    >>> overlapping_shards(Case([]))
    """
    shares = _training(case)
    if shares is None:
        return _same_content(case)
    if not shares.one or shares.loader.facts["replacement"] or shares.repeated <= shares.padding:
        return None
    total = shares.total
    equal = all(list(order) == list(shares.taken[0]) for order in shares.taken)
    how = "in the same order" if equal else "each in an order of its own"
    return found(
        "overlapping-shards",
        measured=f"{case.processes} processes take {total} samples an epoch, {len(set().union(*shares.taken))} of them"
        f" different, {how}",
        expected=f"{shares.samples} samples, each once",
        where=shares.loader.where or case.step_line(),
        **shares.divided,
    )


def _same_content(case: Case) -> Finding | None:
    """Of data without indices: equal batches on all processes."""
    if case.processes < 2 or case.story.training is None:
        return None
    contents = [
        [
            e.facts["content"]
            for e in story.tape.of("batch")
            if e.facts["loader"] == story.training and "content" in e.facts
        ]
        for story in case.stories
    ]
    pairs = list(zip(*contents, strict=False))
    if len(pairs) < 2 or any(any(other != each[0] for other in each) for each in pairs) or not any(pairs[0][0]):
        return None
    return found(
        "overlapping-shards",
        measured=f"all {case.processes} processes get the same batches",
        expected="each its share of the samples",
        where=case.story.loaders[case.story.training].where or case.step_line(),
        **_Shares(case, case.story.training).divided,
    )


def padded_training_data(case: Case) -> Finding | None:
    """Samples taken twice an epoch, to make the processes' shares equal.

    >>> padded_training_data(Case([]))
    """
    shares = _training(case)
    if (
        shares is None
        or not shares.one
        or shares.loader.facts["replacement"]
        or not 0 < shares.repeated <= shares.padding
    ):
        return None
    return found(
        "padded-training-data",
        measured=f"an epoch takes {shares.total} samples, {shares.repeated} of them twice"
        f" ({shares.loader.facts['sampler']})",
        expected=f"{shares.samples} samples, each once",
        where=shares.loader.where or case.step_line(),
        **shares.divided,
    )


def shuffle_within_shard(case: Case) -> Finding | None:
    """Processes that keep their samples and only shuffle among them.

    >>> shuffle_within_shard(Case([]))
    """
    shares = _training(case)
    if shares is None or shares.samples is None or not (shares.one or shares.apart):
        return None
    if shares.one and shares.repeated > shares.padding:
        return None
    for story in case.stories:
        passes = [event.facts for event in story.epochs(story.training or 0) if "members" in event.facts]
        if len(passes) < 2 or passes[0]["count"] < 8 or (shares.one and passes[0]["unique"] > 0.9 * shares.samples):
            return None
        if passes[0]["members"] != passes[1]["members"] or passes[0]["digest"] == passes[1]["digest"]:
            return None
    count = shares.events[0].facts["unique"] if shares.events[0] is not None else 0
    return found(
        "shuffle-within-shard",
        measured=f"each process takes the same {count} samples in epochs 0 and 1"
        + (", from a data set of its own" if shares.apart else f", of {shares.samples}"),
        expected="a new division of all samples each epoch",
        where=shares.loader.where or case.step_line(),
        **shares.divided,
    )


def padded_evaluation(case: Case) -> Finding | None:
    """Validation samples counted twice, to make the processes' shares equal.

    >>> padded_evaluation(Case([]))
    """
    for shares in _evaluations(case):
        whole = all(len(order) == shares.samples for order in shares.taken)
        repeated = shares.total - len(set().union(*shares.taken))
        gathered = any(case.story.tape.of("gathered for metrics"))  # which leaves the repetitions out
        if not whole and repeated and not gathered:
            return found(
                "padded-evaluation",
                measured=f"{shares.total} samples are evaluated, {repeated} of them twice"
                f" ({shares.loader.facts['sampler']})",
                expected=f"{shares.samples} samples, each once",
                where=shares.loader.where,
                **shares.divided,
            )
    return None


def dropped_evaluation(case: Case) -> Finding | None:
    """Validation samples that are left out.

    >>> dropped_evaluation(Case([]))
    """
    for shares in _evaluations(case):
        seen = len(set().union(*shares.taken))
        missing = (shares.samples or 0) - seen
        batch = shares.loader.facts["batch_size"] or 1
        if shares.loader.facts["drop_last"] and 0 < missing < batch * case.processes + case.processes:
            return found(
                "dropped-evaluation",
                measured=f"{seen} of {shares.samples} validation samples are evaluated (drop_last)",
                expected="all, each once",
                where=shares.loader.where,
                batch=batch,
            )
    return None


def _training(case: Case) -> _Shares | None:
    if case.processes < 2 or case.story.training is None:
        return None
    shares = _Shares(case, case.story.training)
    return shares if shares.known else None


def _evaluations(case: Case) -> list[_Shares]:
    """Of the loaders that never train anything, and are evaluated on every process that is here."""
    if not case.stories:
        return []
    story = case.story
    evaluated = {event.facts["loader"] for event in story.tape.of("evaluation")}
    trained = {micro.loader for update in story.updates for micro in update.microbatches}
    shares = [_Shares(case, loader) for loader in sorted(evaluated - trained) if loader in story.loaders]
    return [share for share in shares if share.known and share.one and share.samples]


def _first(events: list[Event]) -> Event | None:
    return events[0] if events else None
