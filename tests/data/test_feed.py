"""How batches are divided among a feed's processes, and put together again."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onehour.data import parts
from onehour.data.dataset import KeyedDataset
from onehour.data.keyed import Part
from onehour.data.loader import Feed
from onehour.data.parts import divided, part_size, whole_batch
from onehour.data.slots import Layout
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")


class Numbers(KeyedDataset):
    """Image i is full of i; remembers nothing."""

    def __init__(self, count: int = 4096, side: int = 2) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        return torch.full((self.side, self.side, 3), index % 251, dtype=torch.uint8).permute(2, 0, 1), index

    __getitem__ = keyed  # type: ignore[assignment]


def feed(loaders: int, per_worker: int = 64, dataset: Any = None) -> Feed:
    dataset = dataset or Numbers()
    stream = SampleStream(samples=len(dataset), minibatch=Minibatch(per_worker, 4), seed=0)
    return Feed(dataset, seed=0, loaders=loaders, device=CPU, stream=stream)


@pytest.mark.parametrize(
    ("samples", "loaders", "part"),
    [(256, 0, 256), (256, 1, 34), (64, 2, 32), (64, 4, 16), (64, 7, 10), (64, 16, 8), (4, 2, 8)],
)
def test_a_batch_is_divided_among_all_loaders(samples: int, loaders: int, part: int):
    assert part_size(samples, loaders=loaders, image_bytes=3 * 224 * 224) == part


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_that_come_in_parts_are_whole(channels_last: bool):
    counts = deque[int]()
    keys = [np.array([[0, i, i] for i in range(count)]) for count in (12, 3)]
    given = list(divided(keys, 5, counts))
    assert [len(part) for part in given] == [5, 5, 2, 3]
    made = (_part(part[:, 1].tolist(), channels_last) for part in given)
    layout = Layout((4, 6, 3) if channels_last else (3, 4, 6), torch.uint8, channels_last)
    for count in (12, 3):
        whole = whole_batch(made, counts, layout, CPU)
        assert whole is not None
        images, labels, skipped = whole
        assert images.is_contiguous()
        assert labels.tolist() == skipped == list(range(count))
        assert torch.equal(images, torch.stack([_image(index) for index in range(count)]))
    assert whole_batch(made, counts, layout, CPU) is None


def test_a_part_is_copied_to_a_device_from_pinned_memory_that_nobody_else_writes_to(monkeypatch: pytest.MonkeyPatch):
    """As far as that can be seen without a GPU: a loader may fill its slot anew while the copy is still under way."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    layout = Layout((4, 6, 3), torch.uint8, True)
    images = torch.stack([_image(index) for index in range(5)]).permute(0, 2, 3, 1)
    rows = torch.empty((5, 4, 6, 3), dtype=torch.uint8, device="meta").permute(0, 3, 1, 2)
    parts._copy(images, rows, layout)
    assert torch.equal(pinned[0], images)
    assert pinned[0].data_ptr() != images.data_ptr()
    room = parts._room(5, layout, torch.device("meta"))
    assert (room.shape, room.is_contiguous(memory_format=torch.channels_last)) == ((5, 3, 4, 6), True)


def _image(index: int) -> Tensor:
    return (torch.arange(72, dtype=torch.uint8).view(3, 4, 6) * 3 + index).to(torch.uint8)


def _part(indices: list[int], channels_last: bool) -> Part:
    images = torch.stack([_image(index) for index in indices])
    return Part(images.permute(0, 2, 3, 1) if channels_last else images, torch.tensor(indices), indices)


@pytest.mark.parametrize("loaders", [0, 2])
def test_labels_and_images_belong_together(loaders: int):
    with closing(feed(loaders)) as given:
        for images, labels in given.passes([range(2), range(2, 4)], start=0, stop=4):
            assert images.shape == (128, 3, 2, 2)
            assert torch.equal(images[:, 0, 0, 0].long(), labels % 251)


class Slow(Numbers):
    """Takes a hundredth of a second a sample."""

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        time.sleep(0.01)
        return super().keyed(index, key)


def test_the_first_batch_is_made_by_all_loaders_together():
    def first(loaders: int) -> float:
        with closing(feed(loaders, dataset=Slow())) as given:
            next(given.passes([range(1)], start=0, stop=1))  # the processes are up
            started = time.perf_counter()
            next(given.passes([range(1)], start=5, stop=6))
            return time.perf_counter() - started

    assert min(first(8) for _ in range(3)) < 0.5 * 64 * 0.01


def test_no_batches_is_no_batch():
    with closing(feed(0)) as given:
        assert list(given.passes([range(4)], start=3, stop=3)) == []
        assert list(given.chunks(range(0))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="is about CUDA itself, and torch sees no GPU here")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("loaders", [0, 2])
def test_batches_on_cuda_are_those_on_the_cpu(loaders: int):
    def batches(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        stream = SampleStream(samples=4096, minibatch=Minibatch(64, 4), seed=0)
        with closing(Feed(Numbers(side=32), seed=0, loaders=loaders, device=device, stream=stream)) as given:
            for images, labels in given.passes([range(2), range(2, 4)], start=0, stop=16):
                torch.cuda._sleep(10**6)  # the device is behind when the next batch is copied
                yield (images.float() * 2).cpu(), labels.cpu()

    for here, there in zip(batches(CPU), batches(torch.device("cuda")), strict=True):
        assert torch.equal(here[0], there[0])
        assert torch.equal(here[1], there[1])
