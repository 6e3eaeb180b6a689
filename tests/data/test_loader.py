"""A process is fed the same samples from any iteration on, by any number of loader processes."""

from collections.abc import Iterator
from contextlib import closing
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from onehour import Minibatch, SampleStream
from onehour.data.dataset import KeyedDataset, in_memory
from onehour.data.loader import CHUNK, Feed

CPU = torch.device("cpu")
STREAM = SampleStream(samples=48, minibatch=Minibatch(per_worker=4, workers=2), seed=3)
PASSES = [range(1), range(1, 2)]


def batches(dataset: Any, *, loaders: int = 0, start: int = 0, stop: int = 8, passes: Any = PASSES, stream=STREAM):
    with closing(Feed(dataset, seed=stream.seed, loaders=loaders, device=CPU, stream=stream)) as feed:
        return list(feed.passes(passes, start=start, stop=stop))


def chunks(dataset: Any, numbers: range, *, loaders: int = 0) -> list[tuple[Tensor, Tensor]]:
    with closing(Feed(dataset, seed=0, loaders=loaders, device=CPU)) as feed:
        return list(feed.chunks(numbers))


def assert_equal(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    assert len(some) == len(others) > 0
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.fixture
def augmented(tiny: ModuleType) -> Any:
    return tiny.Augmented(tiny.data()[0])


@pytest.mark.parametrize("loaders", [1, 2])
def test_random_transforms_do_not_depend_on_loader_processes(augmented: Any, loaders: int):
    torch.manual_seed(loaders)  # nor on what this process drew before
    assert_equal(batches(augmented, loaders=loaders), batches(augmented))


@pytest.mark.parametrize(("loaders", "start"), [(0, 1), (2, 5), (0, 7)])
def test_a_start_anywhere_gives_the_tail_of_the_whole(augmented: Any, loaders: int, start: int):
    assert_equal(batches(augmented, loaders=loaders, start=start), batches(augmented)[2 * start :])


def test_passes_of_several_workers_hold_the_same_samples(augmented: Any):
    """Interleaved: row i·g + j is the i-th sample of worker j."""
    apart, together = batches(augmented), batches(augmented, passes=[range(2)])
    for iteration, (images, labels) in enumerate(together):
        for worker in (0, 1):
            alone = apart[2 * iteration + worker]
            assert torch.equal(images[worker::2], alone[0])
            assert torch.equal(labels[worker::2], alone[1])


def test_larger_passes_of_a_ramp_have_room_in_processes_of_their_own(augmented: Any):
    with closing(Feed(augmented, seed=STREAM.seed, loaders=1, device=CPU, stream=STREAM)) as feed:
        few = list(feed.passes([range(1)], start=0, stop=2))
        before = feed.pids
        assert_equal(list(feed.passes([range(2)], start=2, stop=4)), batches(augmented, passes=[range(2)])[2:4])
        assert feed.pids != before
        assert_equal(few, batches(augmented, passes=[range(1)])[:2])


def test_transforms_are_anew_in_each_epoch_and_keyed_by_the_sample(augmented: Any, tiny: ModuleType):
    plain, loaded = batches(tiny.Listed(tiny.data()[0]), stop=12), batches(augmented, stop=12)
    added = [{}, {}]
    for position, (before, after) in enumerate(zip(plain, loaded, strict=True)):
        for row, old, new in zip(range(4), before[0], after[0], strict=True):
            key = tuple(old.flatten().tolist())
            added[position // 12][key] = (new - old).flatten()[:3]
            assert before[1][row] == after[1][row]
    first, second = added
    assert set(first) == set(second)
    assert len(first) == 48
    assert all(not torch.allclose(first[key], second[key]) for key in first)
    # torch's, numpy's and Python's numbers each differ between any two samples.
    drawn = torch.stack(list(first.values()))
    assert [len(column.round(decimals=4).unique()) for column in drawn.T] == [48, 48, 48]


def test_another_seed_transforms_otherwise(augmented: Any):
    other = SampleStream(samples=48, minibatch=STREAM.minibatch, seed=4)
    images = [torch.cat([batch[0] for batch in batches(augmented, stop=6, stream=s)]) for s in (STREAM, other)]
    assert not torch.allclose(images[0].sum((1, 2, 3)).sort()[0], images[1].sum((1, 2, 3)).sort()[0])


@pytest.mark.parametrize("loaders", [0, 2])
def test_tensors_in_memory_are_gathered_to_the_same_batches(tiny: ModuleType, loaders: int):
    tensors = tiny.data()[0]
    assert in_memory(tensors)
    assert not in_memory(tiny.Listed(tensors))
    assert_equal(batches(tensors), batches(tiny.Listed(tensors), loaders=loaders))


def test_a_subclass_of_tensors_may_do_as_it_likes(tiny: ModuleType):
    class Negated(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            image, label = super().__getitem__(index)
            return -image, label

    tensors = tiny.data()[0]
    negated = batches(Negated(*tensors.tensors))
    assert_equal([(-images, labels) for images, labels in negated], batches(tensors))


@pytest.mark.parametrize("loaders", [0, 2])
def test_an_unreadable_sample_is_one_message_with_its_index(tiny: ModuleType, loaders: int):
    with pytest.raises(ValueError, match=r"^sample 5 of the data cannot be read: OSError: truncated file") as raised:
        batches(tiny.unreadable()[0], loaders=loaders)
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("samples", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("kind", ["tensors", "listed"])
def test_chunks_hold_every_sample_once_in_order(tiny: ModuleType, samples: int, kind: str):
    tensors = TensorDataset(torch.arange(float(samples))[:, None], torch.arange(samples))
    dataset = tensors if kind == "tensors" else tiny.Listed(tensors)
    found = chunks(dataset, range(-(-samples // CHUNK)))
    assert torch.cat([labels for _, labels in found]).tolist() == list(range(samples))
    assert torch.cat([images for images, _ in found]).flatten().tolist() == list(range(samples))
    assert all(len(labels) == CHUNK for _, labels in found[:-1])


def test_a_model_may_write_into_a_chunk(tiny: ModuleType):
    dataset = tiny.tensors(300, 0)
    before = dataset.tensors[0].clone()
    for images, _ in chunks(dataset, range(2)):
        images.zero_()
    assert torch.equal(dataset.tensors[0], before)


@pytest.mark.parametrize("loaders", [0, 2])
def test_chunks_are_the_same_whoever_takes_them(tiny: ModuleType, loaders: int):
    """A validation transform that is random is keyed too, and does not change from one evaluation to the next."""
    dataset = tiny.Augmented(tiny.tensors(600, 0))
    whole = chunks(dataset, range(3))
    for rank in range(2):
        assert_equal(chunks(dataset, range(rank, 3, 2), loaders=loaders), whole[rank::2])


def test_a_process_without_a_chunk_starts_no_loader(tiny: ModuleType):
    with closing(Feed(tiny.listed()[0], seed=0, loaders=2, device=CPU)) as feed:
        assert list(feed.chunks(range(3, 1, 7))) == []
        assert feed.pids == []


def test_no_batches_is_no_batch(augmented: Any):
    assert batches(augmented, start=3, stop=3) == []
    assert chunks(augmented, range(0)) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("loaders", [0, 2])
def test_batches_on_cuda_are_those_on_the_cpu(loaders: int):
    class Numbers(KeyedDataset):
        """Image i is full of i."""

        def __len__(self) -> int:
            return 4096

        def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
            return torch.full((32, 32, 3), index % 251, dtype=torch.uint8).permute(2, 0, 1), index

    def on(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        stream = SampleStream(samples=4096, minibatch=Minibatch(64, 4), seed=0)
        with closing(Feed(Numbers(), seed=0, loaders=loaders, device=device, stream=stream)) as given:
            for images, labels in given.passes([range(2), range(2, 4)], start=0, stop=16):
                torch.cuda._sleep(10**6)  # the device is behind when the next batch is copied
                yield (images.float() * 2).cpu(), labels.cpu()

    assert_equal(list(on(CPU)), list(on(torch.device("cuda"))))
