"""Remark 4 in torch's DataLoader: batches of one worker's indices, from any iteration."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from onehour.rules.minibatch import Minibatch
from onehour.rules.sampler import StreamSampler
from onehour.rules.shuffle import SampleStream

STREAM = SampleStream(samples=10, minibatch=Minibatch(per_worker=2, workers=3), seed=0)


@settings(deadline=None)
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 4),
    extra=st.integers(0, 20),
    seed=st.integers(),
    start=st.integers(0, 12),
)
def test_a_start_at_any_iteration_is_the_tail_of_the_whole_pass(n, k, extra, seed, start):
    stream = SampleStream(samples=n * k + extra, minibatch=Minibatch(n, k), seed=seed)
    for worker in (0, k - 1, range(k)):
        whole = list(StreamSampler(stream, worker=worker, stop=12))
        assert list(StreamSampler(stream, worker=worker, start=start, stop=12)) == whole[start:]


def test_a_workers_batches_are_its_indices_of_each_iteration():
    batches = list(StreamSampler(STREAM, worker=1, start=3, stop=9))
    assert batches == [STREAM.indices(t, 1).tolist() for t in range(3, 9)]
    assert all(type(index) is int for batch in batches for index in batch)


def test_a_process_of_several_workers_gets_them_interleaved():
    for t, batch in enumerate(StreamSampler(STREAM, worker=range(1, 3), stop=5)):
        alone = [STREAM.indices(t, worker) for worker in (1, 2)]
        assert batch == np.stack(alone, axis=1).reshape(-1).tolist()


def test_an_iterated_sampler_starts_again():
    sampler = StreamSampler(STREAM, worker=0, start=2, stop=4)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 5), (4, 4), (3, 10)])
def test_the_length_is_the_number_of_iterations(start, stop):
    sampler = StreamSampler(STREAM, worker=0, start=start, stop=stop)
    assert len(sampler) == len(list(sampler)) == stop - start


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, -1)])
def test_a_start_after_the_stop_or_below_zero_is_refused(start, stop):
    with pytest.raises(ValueError, match="start and stop must satisfy 0 <= start <= stop"):
        StreamSampler(STREAM, worker=0, start=start, stop=stop)


def test_all_workers_loaders_together_give_every_sample_once_an_epoch():
    stream = SampleStream(samples=12, minibatch=Minibatch(per_worker=2, workers=3), seed=0)
    data: list[torch.Tensor] = list(torch.arange(12))
    loaders = [
        DataLoader(data, batch_sampler=StreamSampler(stream, worker=worker, stop=4))  # type: ignore[arg-type]
        for worker in range(3)
    ]
    passes = [torch.cat(list(loader)).reshape(2, 4) for loader in loaders]
    for epoch in range(2):
        assert torch.cat([one[epoch] for one in passes]).sort().values.tolist() == list(range(12))
