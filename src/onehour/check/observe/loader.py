"""Loaders and samplers: which samples an epoch takes, in full and without loading them."""

from __future__ import annotations

import itertools
import operator
import sys
import weakref
from array import array
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from onehour.check.observe.digests import first_tensor, looks, projections, random_states, seeded
from onehour.check.observe.evaluation import Evaluations
from onehour.check.observe.internals import hand_over, renew, without_processes
from onehour.check.observe.passes import EnumeratedSampler, Pass, enumerated, length_of
from onehour.check.observe.recorder import Patches, TapeRecorder, quiet
from onehour.check.observe.source import (
    by_hand,
    called_directly,
    maker_line,
    planned_epochs,
    trainer_epochs,
    user_frames,
    user_line,
    walked_by_hand,
)
from onehour.check.tape import BatchGiven, EpochBegan, EpochEnded, LoaderSeen, SampleOrder

END_BATCHES = 16  # at the ends of epochs whose losses are recorded in a loop that is only watched
RANDOM_BATCHES = 4  # before which the generators' states are compared between processes
LOOKED_AT = 4  # batches of the first two epochs whose samples are compared


class Loaders:
    """Watches every DataLoader; `evaluations` are told of each batch of an evaluation, and of its end."""

    def __init__(self, recorder: TapeRecorder, evaluations: Evaluations) -> None:
        self.recorder, self.evaluations = recorder, evaluations
        self.numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.kinds: list[tuple[Any, Any, Callable[[], Any]]] = []
        """By number: how the loader was made, what its data set is like, and the data set itself while it is there."""
        self.made: WeakKeyDictionary[DataLoader, str | None] = WeakKeyDictionary()
        self.first: dict[int, tuple[Callable[[], Any], str | None]] = {}
        """Each data set, by its id, and where its first loader was made."""
        self.clones: WeakKeyDictionary[DataLoader, DataLoader] = WeakKeyDictionary()
        self.passes: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
        self.trained: Counter[int] = Counter()  # passes over each loader that trained something
        self.open: list[Pass] = []  # passes that are under way; an evaluation may come in the middle of an epoch

    def install(self, patches: Patches) -> None:
        patches.beside(DataLoader, "__init__", after=self._was_made)
        patches.around(DataLoader, "__iter__", self._iter)
        patches.around(DistributedSampler, "__iter__", self._walk)
        patches.callback(self._hand_over)

    def _hand_over(self) -> None:
        for loader, clone in self.clones.items():
            hand_over(clone, loader)

    @quiet
    def _was_made(self, loader: DataLoader, *arguments: Any, **options: Any) -> None:
        self.made[loader] = place = maker_line(loader)
        if self.recorder.cut:
            # Libraries make loaders of the user's: the first of a data set's is the user's own.
            if loader.dataset is not self.first.get(id(loader.dataset), (object,))[0]():
                self.first[id(loader.dataset)] = _weakly(loader.dataset), place
            self.made[loader] = place if called_directly() else self.first[id(loader.dataset)][1]
        self.recorder.on_made()

    def _iter(self, original: Any, loader: DataLoader) -> Any:
        if self.recorder.finished or loader in self.clones.values():
            return original(loader)
        opened = self._open(loader)
        if opened is None or self.recorder.finished:
            return original(loader)
        iterator = _Iterator(self, opened, original(opened.clone))
        opened.iterator = weakref.ref(iterator)
        return iterator

    @quiet
    def _open(self, loader: DataLoader) -> Pass:
        self.settle()
        for dropped in [other for other in self.open if other.dropped]:
            self._close(dropped)
        number = self._number(loader)
        if number not in self.passes:
            self._describe(loader, number)
        self.recorder.on_pass(number)
        self.evaluations.begins()
        opened = Pass(self.recorder, number, next(self.passes[number]), length_of(loader), self._clone(loader))
        opened.planned = trainer_epochs(sys._getframe()) or planned_epochs(user_frames())
        if isinstance(opened.sampler, EnumeratedSampler):
            opened.sampler.drawn = lambda order: self._began(opened, order)
            opened.sampler.choose = opened.choose
        else:
            self._began(opened, None)
        return opened

    def _number(self, loader: DataLoader) -> int:
        """A loader that is made anew for each epoch is one: of the same line, for the same data, or for data that are
        like those of the one before, which are gone."""
        if loader not in self.numbers:
            data, place = loader.dataset, self.made.get(loader)
            made = place, type(loader.sampler), type(loader.batch_sampler), loader.batch_size, loader.drop_last
            like = type(data), length_of(data)
            under_way = {opened.loader for opened in self.open if not (opened.done or opened.dropped)}
            same = [
                number
                for number, (known, alike, held) in enumerate(self.kinds)
                if place is not None and known == made and number not in under_way
                if held() is data or (alike == like and (held() is None or isinstance(data, list | tuple)))
            ]
            self.numbers[loader] = same[0] if same else len(self.kinds)
            if not same:
                self.kinds.append((made, like, _weakly(data)))
        return self.numbers[loader]

    def _walk(self, original: Any, sampler: DistributedSampler[Any]) -> Iterator[int]:
        indices = original(sampler)
        if not self.recorder.finished and walked_by_hand(sys._getframe(2)):
            indices = iter(order := list(indices))
            self._walked(sampler, order)
        return indices

    @quiet
    def _walked(self, sampler: DistributedSampler[Any], order: list[int]) -> None:
        """The user's own code takes the indices, and loads the samples itself."""
        self.settle()
        walked: DataLoader[Any] = DataLoader(sampler.dataset, sampler=sampler)  # type: ignore[arg-type]
        if sampler not in self.numbers:
            self.numbers[sampler] = len(self.kinds)
            self.kinds.append((None, None, _weakly(sampler)))
            self._describe(walked, self.numbers[sampler])
        number = self.numbers[sampler]
        opened = Pass(self.recorder, number, next(self.passes[number]), None, walked)
        opened.ended = True
        self._began(opened, order)

    def _clone(self, loader: DataLoader) -> DataLoader:
        """One copy for all passes, so that processes that persist do."""
        fresh = enumerated(loader)
        if loader in self.clones:
            renew(self.clones[loader], fresh)
        else:
            self.clones[loader] = fresh
        if self.recorder.cut:
            without_processes(self.clones[loader])
        return self.clones[loader]

    def _describe(self, loader: DataLoader, number: int) -> None:
        samples = None if isinstance(loader.dataset, IterableDataset) else length_of(loader.dataset)
        sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
        self.recorder.tape.add(
            LoaderSeen(
                self.made.get(loader),
                number,
                samples=samples,
                batches=length_of(loader),
                batch_size=_whole(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)),
                drop_last=bool(loader.drop_last or getattr(loader.batch_sampler, "drop_last", False)),
                sampler=type(sampler).__name__ if sampler is not None else type(loader.batch_sampler).__name__,
                replicas=_whole(getattr(sampler, "num_replicas", None)),
                replacement=bool(getattr(sampler, "replacement", False)),
                processes=loader.num_workers,
                probe=self._probe(loader.dataset, samples) if self.recorder.world > 1 and samples else None,
            )
        )

    @quiet
    def _probe(self, dataset: Any, samples: int) -> list[float]:
        numbers: list[float] = []
        with seeded(17):
            for index in sorted({0, samples // 3, samples // 2, samples - 1}):
                item = dataset[index]
                tensor = torch.tensor(item) if isinstance(item, int | float) else first_tensor(item)
                numbers += projections([tensor.double()]) if tensor is not None else []
        return numbers

    @quiet
    def _began(self, opened: Pass, order: list[Any] | None) -> None:
        known = self._order(opened, order) if order is not None else None
        self.open.append(opened)
        place = user_line()
        self.recorder.tape.add(EpochBegan(place, opened.loader, opened.number, opened.batches, opened.planned, known))

    def _order(self, opened: Pass, order: list[Any]) -> SampleOrder:
        flat = array("q", [int(i) for batch in order for i in (batch if isinstance(batch, list | tuple) else [batch])])
        unique = set(flat)
        kept = opened.number < 2 and (self.recorder.cut or self.recorder.world > 1)
        return SampleOrder(
            count=len(flat),
            unique=len(unique),
            digest=blake2b(flat.tobytes(), digest_size=16).hexdigest(),
            members=hash(frozenset(unique)),  # of integers: the same in every process
            sequential=list(flat[:64]) == sorted(flat[:64]),
            largest=max((len(batch) if isinstance(batch, list | tuple) else 1 for batch in order), default=0),
            indices=b64encode(flat.tobytes()).decode() if kept else None,
        )

    @quiet
    def random_before(self, opened: Pass) -> dict[str, str] | None:
        """The generators' states before one of the first batches is made, where there are several processes."""
        few = self.recorder.world > 1 and opened.number == 0 and opened.taken < RANDOM_BATCHES
        return random_states() if few else None

    @quiet
    def gave(self, opened: Pass, batch: Any, before: dict[str, str] | None = None) -> None:
        """A batch goes to the loop."""
        self._gone_on(opened)
        near = opened.batches is not None and opened.next_index >= opened.batches - END_BATCHES
        self.recorder.near_an_end = near or (opened.number > 0 and opened.next_index < END_BATCHES)
        tensor = first_tensor(batch)
        size = tensor.shape[0] if tensor is not None and tensor.ndim else None
        index, opened.next_index = opened.next_index, opened.next_index + 1
        opened.taken += 1
        given = BatchGiven(None, opened.loader, opened.number, index, size)
        if opened.number < 2 and index < LOOKED_AT and tensor is not None and tensor.ndim:
            given = replace(given, looks=looks(tensor))
        if before is not None:
            after = random_states()
            drew = [name for name, state in before.items() if after[name] != state]
            indexed = isinstance(opened.sampler, EnumeratedSampler)
            content = projections([tensor.double()]) if tensor is not None and not indexed else None
            given = replace(given, random=before, drew=drew, content=content)
        self.recorder.tape.add(given)
        if not opened.trains:
            self.evaluations.batch(batch)
            if opened.next_index == opened.batches:
                self.evaluations.last(opened.loader, opened.number)

    @quiet
    def ended(self, opened: Pass) -> None:
        """A pass has no more batches; the loop may still hold the last one."""
        self._gone_on(opened)
        opened.ended = True
        if not opened.trains:
            self.evaluations.last(opened.loader, opened.number)

    @quiet
    def settle(self) -> None:
        """Another pass begins, or nothing more: those whose batches were all taken are over."""
        for opened in [opened for opened in self.open if opened.done]:
            self._finish(opened)
        for opened in self.open:
            opened.look()

    @quiet
    def trains_on(self) -> None:
        """A backward pass begins: a pass whose batches a model only evaluated is over, and this is none of its own."""
        if self.evaluations.used:
            for opened in [opened for opened in self.open if opened.ended and not opened.trains]:
                self._finish(opened)

    @property
    def loading(self) -> bool:
        """Whether some pass still has batches to give."""
        return any(not opened.done for opened in self.open)

    def _gone_on(self, opened: Pass) -> None:
        """The loop asks for a batch of one pass: those that gave their last are over, whatever is trained from here."""
        for other in [other for other in self.open if other.told and other is not opened]:
            self._finish(other)

    def _close(self, opened: Pass) -> None:
        """Forget a pass: its loader and data set, which may be made anew for each epoch, would live on in a circle."""
        self.open.remove(opened)
        opened.clone = opened.sampler = None

    def _finish(self, opened: Pass) -> None:
        self._close(opened)
        opened.look()
        trained = opened.trains
        self.trained[opened.loader] += trained
        counts, losses = ([], []) if trained else self.evaluations.outcome()
        facts = opened.cut, opened.followed is not False, trained, opened.batches, opened.samples
        self.recorder.tape.add(EpochEnded(None, opened.loader, opened.number, *facts, counts, losses))


def _whole(value: Any) -> int | None:
    """What someone's own sampler says, if it is a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _weakly(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:  # a list, say
        return lambda: thing


class _Iterator:
    """What a DataLoader's iterator becomes: the same batches, or some of them."""

    def __init__(self, loaders: Loaders, opened: Pass, iterator: Any) -> None:
        self._loaders, self._opened, self._iterator = loaders, opened, iterator
        self._done = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        opened = self._opened
        if self._loaders.recorder.cut and not opened.by_hand:
            opened.by_hand = by_hand(sys._getframe(1))
        try:
            if self._done or opened.over():
                raise StopIteration
            before = self._loaders.random_before(opened)
            batch = next(self._iterator)
        except StopIteration:
            if not self._done:
                self._done = True
                self._loaders.ended(opened)
            raise
        self._loaders.gave(opened, batch, before)
        return batch

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)
