"""Which samples an epoch takes, in which order, and how they are divided among processes (§3, Remark 4)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import dropwhile
from operator import not_
from typing import Any

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.gradient import loss_line
from onehour.check.tape import BackwardPass

LARGE = 0.02  # of an epoch; less may be dropped

SHUFFLE = "one permutation of all samples an epoch, divided among the workers"
DIVIDED = (
    "minibatch = onehour.Minibatch(per_worker={n}, workers={p})",
    "sampler = onehour.StreamBatchSampler({samples}, minibatch, seed=0, epochs=epochs)",
    "loader = DataLoader(data, batch_sampler=sampler)",
)


@pitfall(
    "warning",
    "§3, Remark 4",
    why="each epoch has a random permutation of its own",
    remedy="shuffle: shuffle=True, or sampler.set_epoch(epoch) before each epoch",
    write=(
        "loader = DataLoader(data, batch_size={batch}, shuffle=True)",
        "sampler.set_epoch(epoch)  # with a DistributedSampler, before each epoch",
    ),
)
def same_order_every_epoch(case: Case) -> Finding | None:
    loader, story = case.loader, case.story
    if loader is None:
        return _same_inputs(case)
    passes = [(event.where, event.order) for event in story.epochs(loader.loader) if event.order is not None]
    if len(passes) < 2:
        return _same_inputs(case)
    if (loader.batches or 0) < 2 or passes[0][1].count < 2:
        return None
    (where, first), (_, second) = passes[:2]
    carried = any(backward.carried for backward in story.tape.of(BackwardPass))
    if first.digest != second.digest or (first.sequential and carried) or _drawn_anew(case):
        return None
    kind = "the order of the data set" if first.sequential else "one order"
    return same_order_every_epoch.found(
        measured=f"epochs 0 and 1 take their {first.count} samples in {kind} ({loader.sampler})",
        expected="a new permutation each epoch",
        where=loader.where or where,
        batch=loader.batch_size or "batch_size",
    )


def _same_inputs(case: Case) -> Finding | None:
    """The model's inputs come again and again in one order, from no loader, or from none after its first pass."""
    micros = [micro for update in case.story.steps for micro in update.microbatches]
    inputs = [tuple(micro.backward.content or ()) for micro in micros]
    kept = case.loader is not None
    inputs = [*dropwhile(not_, inputs)] if kept else inputs
    period = next((i for i in range(1, len(inputs)) if inputs[i] == inputs[0]), len(inputs))
    again = inputs[period:] == inputs[: len(inputs) - period]
    if not 2 * period <= len(inputs) or not again or not all(inputs) or len({*inputs}) < max(2, 0.5 * period):
        return None
    return same_order_every_epoch.found(
        measured=f"epochs 0 and 1 take their {period} batches in one order"
        f" ({'kept from one pass of the' if kept else 'without a'} DataLoader)",
        expected="a new permutation each epoch",
        where=loss_line(micros[0]),
        remedy="go over the loader anew in each epoch: a list or itertools.cycle keeps the batches of the first"
        if kept
        else "draw a permutation of the samples before each epoch, and take the batches from it",
        write=("for batch in loader:  # in each epoch",)
        if kept
        else (
            "for batch in torch.randperm(len(data)).split({batch}):  # anew in each epoch",
            "    output = model(data[batch])",
        ),
        batch=micros[0].samples or "batch_size",
    )


def _drawn_anew(case: Case) -> bool:
    """Whether an index is another sample each time: what it gives in two epochs is no more alike than two indices are.

    Crops, flips and noise leave a sample like itself; its place among all others by distance tells.
    """
    given = [batch for batch in case.story.given if batch.looks is not None]
    first, second = ({b.index: b.looks or [] for b in given if b.epoch == epoch} for epoch in (0, 1))
    pairs = [pair for i in first.keys() & second.keys() for pair in zip(first[i], second[i], strict=False)]
    if len(pairs) < 2 or all(a == b for a, b in pairs):
        return False
    columns = [*zip(*(row for pair in pairs for row in pair), strict=True)]
    spread = [max(column) - min(column) or 1.0 for column in columns]
    rows, others = ([[x / s for x, s in zip(pair[side], spread, strict=True)] for pair in pairs] for side in (0, 1))
    nearer = [
        sum(math.dist(row, other) < math.dist(row, own) for other in others)
        for row, own in zip(rows, others, strict=True)
    ]
    return sum(nearer) / len(rows) / (len(rows) - 1) > 0.5 - 0.7 / math.sqrt(len(rows))


@pitfall(
    "warning",
    "§3, Remark 4",
    why="an epoch is all samples: a large minibatch must not drop a large rest",
    remedy="use a minibatch that divides the samples, drop_last=False, or onehour.StreamBatchSampler",
    write=DIVIDED,
)
def drop_last_large(case: Case) -> Finding | None:
    """A rest that is dropped each epoch, and is no small share."""
    loader = case.loader
    passes = case.story.epochs(loader.loader) if loader else []
    if loader is None or not loader.drop_last or not loader.samples or not passes or passes[0].order is None:
        return None
    share = loader.samples / (loader.replicas or case.processes)
    dropped = share - passes[0].order.count
    if loader.replacement or dropped <= LARGE * share or dropped >= (loader.batch_size or 0):
        return None
    return drop_last_large.found(
        measured=f"{dropped:.0f} of {share:.0f} samples ({100 * dropped / share:.2g} %) are dropped each epoch",
        expected=f"under {100 * LARGE:g} %, better none",
        where=loader.where or passes[0].where,
        n=loader.batch_size,
        p=case.processes,
        samples=loader.samples,
    )


@pitfall(
    "error",
    "§3, Remark 4",
    why=SHUFFLE,
    remedy="use a DistributedSampler with one seed for all, or onehour.StreamBatchSampler",
    write=DIVIDED,
)
def overlapping_shards(case: Case) -> Finding | None:
    """Processes that take the same samples in one epoch; of data without indices: equal batches on all processes."""
    shares = _training(case)
    if shares is None:
        return None
    where = shares.loader.where or case.step_line()
    if not shares.known:
        if not _same_content(case):
            return None
        return overlapping_shards.found(
            measured=f"all {case.processes} processes get the same batches",
            expected="each its share of the samples",
            where=where,
            **shares.divided,
        )
    if not shares.one or shares.loader.replacement or shares.repeated <= shares.padding:
        return None
    equal = all(list(order) == list(shares.taken[0]) for order in shares.taken)
    how = "in the same order" if equal else "each in an order of its own"
    return overlapping_shards.found(
        measured=f"{case.processes} processes take {shares.total} samples an epoch, {shares.different} of them"
        f" different, {how}",
        expected=f"{shares.samples} samples, each once",
        where=where,
        **shares.divided,
    )


def _same_content(case: Case) -> bool:
    contents = [[batch.content for batch in story.given if batch.content is not None] for story in case.stories]
    pairs = list(zip(*contents, strict=False))
    return len(pairs) > 1 and any(pairs[0][0]) and all(other == each[0] for each in pairs for other in each)


@pitfall(
    "warning",
    "§3, Remark 4",
    why=SHUFFLE,
    remedy="shuffle all samples with one seed first, then take every k-th",
    write=DIVIDED,
)
def shuffle_within_shard(case: Case) -> Finding | None:
    """Processes that keep their samples and only shuffle among them."""
    shares = _training(case)
    if shares is None or not shares.known or shares.samples is None or not (shares.one or shares.apart):
        return None
    if shares.one and shares.repeated > shares.padding:
        return None
    for story in case.stories:
        orders = [event.order for event in story.epochs(shares.number) if event.order is not None]
        if len(orders) < 2 or orders[0].count < 8 or (shares.one and orders[0].unique > 0.9 * shares.samples):
            return None
        if orders[0].members != orders[1].members or orders[0].digest == orders[1].digest:
            return None
    own = case.story.epochs(shares.number)[0].order
    return shuffle_within_shard.found(
        measured=f"each process takes the same {own.unique if own else 0} samples in epochs 0 and 1"
        + (", from a data set of its own" if shares.apart else f", of {shares.samples}"),
        expected="a new division of all samples each epoch",
        where=shares.loader.where or case.step_line(),
        **shares.divided,
    )


@pitfall(
    "note",
    "§3, Remark 4",
    why="nothing is repeated to make the workers' shares equal",
    remedy="use onehour.StreamBatchSampler, which straddles epochs instead of padding",
    write=DIVIDED,
)
def padded_training_data(case: Case) -> Finding | None:
    """Samples taken twice an epoch, to make the processes' shares equal."""
    shares = _training(case)
    if shares is None or not (shares.known and shares.one) or shares.loader.replacement:
        return None
    if not 0 < shares.repeated <= shares.padding:
        return None
    return padded_training_data.found(
        measured=f"an epoch takes {shares.total} samples, {shares.repeated} of them twice ({shares.loader.sampler})",
        expected=f"{shares.samples} samples, each once",
        where=shares.loader.where or case.step_line(),
        **shares.divided,
    )


def _training(case: Case) -> Shares | None:
    return Shares(case, case.loader.loader) if case.processes > 1 and case.loader else None


class Shares:
    """The first pass of each process over one loader."""

    def __init__(self, case: Case, loader: int) -> None:
        self.number, self.loader = loader, case.story.loaders[loader]
        orders = [story.order(loader, 0) for story in case.stories]
        self.taken: list[Sequence[int]] = [order for order in orders if order is not None]
        self.samples: int | None = self.loader.samples
        self.known = self.samples is not None and len(self.taken) == len(orders)
        self._second = [story.order(loader, 1) for story in case.stories]
        self._largest = max(
            (passes[0].order.largest for story in case.stories if (passes := story.epochs(loader)) and passes[0].order),
            default=1,
        )
        probes = [story.loaders[loader].probe if loader in story.loaders else None for story in case.stories]
        self.one = len(probes) == 1 or (bool(probes[0]) and all(probe == probes[0] for probe in probes))
        """Whether an index is the same sample on all processes."""
        self.apart = len(probes) > 1 and all(probes) and all(probe != probes[0] for probe in probes[1:])
        self.divided: dict[str, Any] = {
            "n": self.loader.batch_size or "batch_size",
            "p": len(orders),
            "samples": self.samples or "len(data)",
        }
        """What the lines that divide the samples need."""

    @property
    def total(self) -> int:
        """Draws of all processes in a pass."""
        return sum(len(order) for order in self.taken)

    @property
    def different(self) -> int:
        """Samples that are drawn at all."""
        return len(set[int]().union(*self.taken))

    @cached_property
    def repeated(self) -> int:
        """Draws of a sample that was taken before, among the first N of all processes, batch by batch.

        Not among all: a pass of a stream that straddles epochs may be longer than one.
        """
        if self._stream:
            return 0
        size = self._largest or 1
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
    def _stream(self) -> bool:
        """Whether the passes go on one after another in a stream of epochs, nothing in it repeated or left out.

        All samples are then drawn equally often up to one, and a second pass does not begin an epoch of its own.
        """
        if any(order is None for order in self._second):
            return False
        first, second = (Counter(i for order in orders for i in order or ()) for orders in (self.taken, self._second))
        both = first + second
        drawn = [[counts[i] for i in range(self.samples or 0)] for counts in (first, both)]
        return len(second) < len(drawn[0]) and all(max(counts) - min(counts) <= 1 for counts in drawn)

    @property
    def padding(self) -> int:
        """Repetitions that come of making shares equal: at most a batch for each process."""
        batch = self.loader.batch_size or 1
        return min(len(self.taken) * batch, max((self.samples or 0) // 20, len(self.taken)))
