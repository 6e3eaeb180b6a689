"""Indices and augmented bytes do not depend on loaders, processes, where the files lie, or where a run began."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import images
import pytest
import torch

from onehour.data.images import ImageOptions, image_folder, open_sides
from onehour.data.index import write_index
from onehour.data.loader import Feed
from onehour.data.pack import pack
from onehour.dist.placement import passes, place
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
MINIBATCH = Minibatch(per_worker=3, workers=8)
STOP = 5
"""Iterations of 24 of 72 samples: an epoch and two thirds."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as a folder, by an index, and packed; every eighth cannot be decoded."""
    root = tmp_path_factory.mktemp("same")

    def make(number: int) -> bytes:
        if number % 8 == 5 and number < 72:
            return b"damaged"
        return images.saved(images.picture(number, (24 + number % 9, 20)), ("JPEG", "PNG")[number % 2])

    folder = images.tree(root / "data", train=24, val=4, make=make)
    index = write_index(folder, root / "elsewhere.index", digests=True)
    pack(open_sides(folder, sizes=True), root / "pack", shard_bytes=4000)
    return {"folder": folder, "index": index, "pack": root / "pack"}


def feed(path: Path, loaders: int) -> Feed:
    train, _ = image_folder(path, ImageOptions(bad_images="skip"))
    stream = SampleStream(samples=len(train), minibatch=MINIBATCH, seed=3)
    return Feed(train, seed=3, loaders=loaders, device=CPU, stream=stream)


def digests(path: Path, *, loaders: int = 0, processes: int = 1, start: int = 0, fused: int = 1) -> dict[Any, str]:
    """SHA-256 of each worker's images and labels in each iteration, whoever hosts it."""
    found = {}
    for share in place(MINIBATCH.workers, processes):
        given = feed(path, loaders)
        groups = passes(share, fused)
        batches = given.passes(groups, start=start, stop=STOP)
        for iteration in range(start, STOP):
            for workers in groups:
                images, labels = next(batches)
                for place_in_pass, worker in enumerate(workers):
                    own = images[place_in_pass :: len(workers)].contiguous(), labels[place_in_pass :: len(workers)]
                    sha = hashlib.sha256(own[0].numpy().tobytes() + own[1].contiguous().numpy().tobytes())
                    found[iteration, worker] = sha.hexdigest()
        assert next(batches, None) is None
        given.close()
    return found


@pytest.fixture(scope="module")
def expected(places: dict[str, Path]) -> dict[Any, str]:
    return digests(places["folder"])


def test_they_are_different_samples(expected: dict[Any, str]):
    assert len(expected) == len(set(expected.values())) == STOP * MINIBATCH.workers


@pytest.mark.parametrize(
    ("kind", "processes", "loaders", "fused"),
    [
        *(("index", 1, 0, 1), ("pack", 1, 0, 1), ("folder", 1, 4, 1), ("pack", 1, 2, 1)),
        *(("folder", 2, 0, 1), ("pack", 4, 1, 2), ("folder", 1, 2, 8)),
    ],
)
def test_any_number_of_loaders_and_processes_gives_the_same(
    places: dict[str, Path], expected: dict[Any, str], kind: str, processes: int, loaders: int, fused: int
):
    assert digests(places[kind], processes=processes, loaders=loaders, fused=fused) == expected


@pytest.mark.parametrize(("start", "loaders"), [(1, 0), (2, 4), (4, 1)])
def test_a_start_in_mid_epoch_gives_the_tail(
    places: dict[str, Path], expected: dict[Any, str], start: int, loaders: int
):
    tail = {key: value for key, value in expected.items() if key[0] >= start}
    assert digests(places["index"], loaders=loaders, start=start) == tail


def test_the_processes_stay_from_one_use_to_the_next(places: dict[str, Path]):
    given = feed(places["folder"], loaders=2)

    def used() -> Iterator[str]:
        for batch, _ in given.passes([range(8)], start=0, stop=2):
            yield hashlib.sha256(batch.numpy().tobytes()).hexdigest()

    first, running = list(used()), given.pids
    assert len(running) == 2
    assert list(used()) == first
    assert given.pids == running
    unfinished = given.passes([range(8)], start=0, stop=5)
    next(unfinished)  # and what is left of an interrupted use harms none after it
    assert list(used()) == first
    given.close()


@pytest.mark.parametrize(("kind", "loaders"), [("index", 0), ("pack", 0), ("folder", 2)])
def test_validation_is_the_same_too(places: dict[str, Path], kind: str, loaders: int):
    def validated(path: Path, loaders: int) -> str:
        with closing(Feed(image_folder(path)[1], seed=0, loaders=loaders, device=CPU)) as given:
            ((images, _),) = given.chunks(range(1))
            return hashlib.sha256(images.numpy().tobytes()).hexdigest()

    assert validated(places[kind], loaders) == validated(places["folder"], 0)
