"""Loader processes are killed, stopped and stuck for real: others take their places, and no sample changes."""

import gc
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onehour.data.dataset import KeyedDataset
from onehour.data.loader import Feed
from onehour.data.loader_processes import IGNORED, STRIKES, LoaderProcesses
from onehour.data.samples import Keyed, collate
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
STOP = 24


class Slow(KeyedDataset):
    """Image i is full of numbers of its key, and takes a moment."""

    def __init__(self, happens: Callable[[int], object] = lambda index: None) -> None:
        self.happens = happens

    def __len__(self) -> int:
        return 512

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        time.sleep(0.0002)
        self.happens(index)
        image = torch.empty((6, 4, 3), dtype=torch.uint8)
        return image.random_(generator=torch.Generator().manual_seed(key)).permute(2, 0, 1), index

    __getitem__ = keyed  # type: ignore[assignment]


class Plain(Slow):
    """Of floats, whose shape the first sample says."""

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        image, label = super().keyed(index, key)
        return image.contiguous().float(), label


def feed(dataset: Any, loaders: int, patience: float | None = 30, said: list[str] | None = None) -> Feed:
    stream = SampleStream(samples=len(dataset), minibatch=Minibatch(16, 4), seed=0)
    warn = None if said is None else said.append
    return Feed(dataset, seed=0, loaders=loaders, device=CPU, stream=stream, patience=patience, warn=warn)


def batches(given: Feed) -> Iterator[str]:
    """The digest of every batch."""
    for images, labels in given.passes([range(2), range(2, 4)], start=3, stop=STOP):
        yield hashlib.sha256(images.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(request: pytest.FixtureRequest) -> tuple[type[Slow], list[str]]:
    kind = getattr(request, "param", Slow)
    with closing(feed(kind(), 0)) as given:
        return kind, list(batches(given))


@pytest.mark.parametrize(
    ("undisturbed", "what"),
    [(Slow, signal.SIGKILL), (Plain, signal.SIGKILL), (Slow, signal.SIGSTOP)],
    indirect=["undisturbed"],
)
def test_killed_and_stopped_loaders_are_replaced_and_no_sample_changes(
    undisturbed: tuple[type[Slow], list[str]], what: signal.Signals
):
    """At seeded random moments, one after another and two at once."""
    kind, expected = undisturbed
    said: list[str] = []
    draw, found = random.Random(int(what)), []
    with closing(feed(kind(), 3, patience=1 if what == signal.SIGSTOP else 30, said=said)) as given:
        for number, digest in enumerate(batches(given)):
            found.append(digest)
            if number % (20 if what == signal.SIGSTOP else 6) == 4:
                for pid in draw.sample(given.pids, draw.choice((1, 2))):
                    time.sleep(draw.random() * 0.01)
                    os.kill(pid, what)
        running = given.pids
    assert found == expected
    assert len(said) >= 2
    how = r"was stuck for [\d.]+ s" if what == signal.SIGSTOP else rf"was killed \({what.name}\)"
    ending = r"( at sample \d+)?; another takes its place, and no sample changes"
    assert all(re.fullmatch(f"a process that loads data {how}{ending}", text) for text in said)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in running)


def await_end(pid: int) -> None:
    """Of a child of this process; whoever started it learns of it too."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("between", [signal.SIGKILL, signal.SIGSTOP])
def test_all_killed_at_once_and_while_nobody_waits(undisturbed: tuple[type[Slow], list[str]], between: signal.Signals):
    kind, expected = undisturbed
    said: list[str] = []
    with closing(feed(kind(), 4, said=said)) as given:
        running = batches(given)
        found = [next(running)]
        for pid in given.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in given.pids:
            await_end(pid)
        assert found + list(running) == expected
        assert len(said) == 4
        for pid in given.pids:  # between two uses
            os.kill(pid, between)
        assert list(batches(given)) == expected


def die(index: int) -> None:
    if index == 77:
        os.kill(os.getpid(), signal.SIGKILL)


def leave(index: int) -> None:
    if index == 77:
        os._exit(9)


def hang(index: int) -> None:
    if index == 77:
        time.sleep(60)


@pytest.mark.parametrize(
    ("happens", "how"),
    [(die, r"was killed \(SIGKILL\)"), (leave, "exited with code 9"), (hang, r"was stuck for [\d.]+ s")],
)
def test_one_that_ends_at_the_same_sample_again_and_again_is_one_message_with_its_name(
    happens: Callable[[int], None], how: str
):
    said: list[str] = []
    expected = (
        f"^{STRIKES} processes that load data ended at the same samples, one after another: it {how} at sample 77"
        rf"(, {how} at sample 77)*; look at these files, or use fewer --loaders if memory runs out$"
    )
    with closing(feed(Slow(happens), 2, patience=1, said=said)) as given:
        with pytest.raises(ValueError, match=expected):
            list(batches(given))
        assert given.pids == []
    assert len(said) == STRIKES - 1


def test_what_a_data_set_calls_its_sample_is_in_the_message():
    class Named(Slow):
        def name(self, index: int) -> str:
            return f"files/{index}.jpg"

    with (
        closing(feed(Named(die), 1, said=[])) as given,
        pytest.raises(ValueError, match=r"was killed \(SIGKILL\) at sample 77 \(files/77\.jpg\); look at these files"),
    ):
        list(batches(given))


def test_a_slow_sample_is_not_stuck_where_nobody_asks_for_patience():
    def slow(index: int) -> None:
        time.sleep(1.5 if index == 77 else 0)

    said: list[str] = []
    with closing(feed(Slow(slow), 2, patience=None, said=said)) as given:
        found = torch.cat([labels for _, labels in given.passes([range(4)], start=0, stop=8)])
    assert sorted(found.tolist()) == list(range(512))
    assert said == []


def test_loaders_leave_signals_to_the_process_that_trains(undisturbed: tuple[type[Slow], list[str]]):
    kind, expected = undisturbed
    said: list[str] = []
    with closing(feed(kind(), 2, said=said)) as given:
        running = batches(given)
        found = [next(running)]
        for number in IGNORED:
            for pid in given.pids:
                os.kill(pid, number)
        assert found + list(running) == expected
    assert said == []


def test_a_bug_of_the_data_set_is_one_message():
    class Wrong(Slow):
        def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
            return super().keyed(index, key)[0], "five" if index == 77 else 5  # type: ignore[return-value]

    with closing(feed(Wrong(), 2, said=[])) as given, pytest.raises(ValueError, match="'five'") as raised:
        list(batches(given))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("other", [torch.zeros(3, 6, 5), torch.zeros(3, 6, 4, dtype=torch.float64)])
@pytest.mark.parametrize("loaders", [0, 2])
def test_images_that_are_not_alike_are_one_message(other: Tensor, loaders: int):
    class Mixed(Plain):
        def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
            return (other, 5) if index == 77 else super().keyed(index, key)

    said = (
        r"images of the data differ in (shape \(\(3, 6, 4\) and \(3, 6, 5\)\)|type \(torch\.float32 and torch\.float64)"
    )
    with closing(feed(Mixed(), loaders)) as given, pytest.raises(ValueError, match=said):
        list(batches(given))


@pytest.mark.parametrize("how", ["killed", "left"])
def test_loaders_end_with_the_process_that_trains(how: str):
    here, there = os.pipe()
    if (trains := os.fork()) == 0:
        try:
            given = feed(Slow(), 2)
            running = batches(given)
            next(running)
            os.write(there, " ".join(map(str, given.pids)).encode())
            time.sleep(60 if how == "killed" else 0)
        finally:
            os._exit(0)
    pids = [int(pid) for pid in os.read(here, 100).split()]
    os.close(here)
    os.close(there)
    assert len(pids) == 2
    if how == "killed":
        os.kill(trains, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(trains, 0)[1]) == (-signal.SIGKILL if how == "killed" else 0)
    until = time.monotonic() + 300
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_forked_from_the_process_that_trains_does_not_end_its_loaders(
    undisturbed: tuple[type[Slow], list[str]],
):
    kind, expected = undisturbed
    said: list[str] = []
    with closing(feed(kind(), 2, said=said)) as given:
        running = batches(given)
        found = [next(running)]
        if (child := os.fork()) == 0:
            given.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert found + list(running) == expected
    assert said == []


def test_nothing_is_left_open(undisturbed: tuple[type[Slow], list[str]]):
    kind, _ = undisturbed
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with closing(feed(kind(), 3, said=[])) as given:
            running = batches(given)
            next(running)
            os.kill(given.pids[1], signal.SIGKILL)
            next(running)
    until = time.monotonic() + 300
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
        gc.collect()  # DataLoader's threads, which end by themselves, hold some
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("size", [10, 100_000])
def test_trees_come_through_whatever_their_size(size: int):
    """Larger than the memory that was set aside for a batch too."""

    class Trees(Keyed):
        def batch(self, keys: Any, *, empty: Any = None, begun: Any = None) -> tuple[Any, list[int]]:
            trees = [{"x": torch.full((size,), index), "name": f"{index}"} for _, index, _ in keys]
            return collate(trees, empty), [5]

    processes = LoaderProcesses(Trees(range(9), seed=0), loaders=2, batch_bytes=1024)
    with closing(processes):
        keys = [np.array([[0, index, 0], [0, index + 1, 0]]) for index in range(8)]
        for index, (tree, skipped) in enumerate(processes.batches(keys)):
            assert torch.equal(tree["x"], torch.tensor([[index], [index + 1]]).expand(2, size))
            assert (tree["name"], skipped) == ([f"{index}", f"{index + 1}"], [5])


def test_neither_this_process_nor_its_generators_notice():
    """DataLoader alone would draw a number, and have the death of any of its processes end whatever runs here."""
    before, state = signal.getsignal(signal.SIGCHLD), torch.get_rng_state()
    with closing(feed(Slow(), 2, said=[])) as given:
        running = batches(given)
        next(running)
        os.kill(given.pids[0], signal.SIGKILL)
        await_end(given.pids[0])
        assert signal.getsignal(signal.SIGCHLD) == before
    assert torch.equal(torch.get_rng_state(), state)


OWN = "list(DataLoader(list(range(8)), num_workers=1))\n"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("first", [True, False])
def test_a_dataloader_of_ones_own_hears_of_its_own_processes_alone(first: bool):
    """Its handler raises where one that it knows of is killed, at any point from the kill on: ours it does not know."""
    code = (
        "import os, signal, time, torch; from torch.utils.data import DataLoader\n"
        "from onehour.data.loader import Feed\n"
        "def kill(pid): os.kill(pid, signal.SIGKILL); os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        + (OWN if first else "")
        + "feed = Feed([(torch.zeros(3, 2, 2), 1)] * 2000, seed=0, loaders=2, device=torch.device('cpu'))\n"
        "chunks = feed.chunks(range(7)); next(chunks)\n"
        "kill(feed.pids[0])\n"
        "print(sum(len(labels) for _, labels in chunks))\n"
        "feed.close()\n" + OWN + "own = iter(DataLoader(list(range(8)), num_workers=1)); next(own)\n"
        "try: kill(own._workers[0].pid); time.sleep(60)\n"
        "except RuntimeError as error: print('DataLoader worker' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [str(6 * 256), "True"], done.stderr


def test_a_program_that_forgets_to_close_ends_too():
    code = (
        "import torch; from onehour.data.loader import Feed\n"
        "feed = Feed([(torch.zeros(3, 2, 2), 1)] * 300, seed=0, loaders=2, device=torch.device('cpu'))\n"
        "print(len(next(feed.chunks(range(2)))[1]), *feed.pids)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    count, *pids = done.stdout.split()
    assert (count, len(pids), done.stderr) == ("256", 2, "")
    assert not any(_runs(int(pid)) for pid in pids)
