"""Remark 4 in torch's DataLoader: an epoch at each `iter`, whole or a process's, from where training was."""

import gc
import re
import warnings
import weakref
from itertools import chain, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.minibatch import Minibatch
from onehour.rules.sampler import StreamBatchSampler, StreamSampler
from onehour.rules.shuffle import SampleStream

MINIBATCH = Minibatch(per_worker=2, workers=4)
LOADERS: list[dict[str, Any]] = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


def of(samples: int = 125, minibatch: Minibatch | int = MINIBATCH, **options: Any) -> StreamBatchSampler:
    """16, 16 and 15 iterations."""
    return StreamBatchSampler(samples, minibatch, **({"seed": 0, "epochs": 3} | options))


def loader_of(sampler: StreamBatchSampler, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(sampler.stream.samples)), batch_sampler=sampler, **options)


def taken(loader: Any) -> list[list[int]]:
    return [indices.tolist() for (indices,) in loader]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, Minibatch, int, int, int]:
    """N, n and k, P, E and a seed."""
    n, hosted, processes = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    minibatch = Minibatch(n, hosted * processes)
    samples = minibatch.size + draw(st.integers(0, 40))
    return samples, minibatch, processes, draw(st.integers(1, 5)), draw(st.integers(0, 2**40))


@settings(max_examples=50)
@given(runs())
def test_all_epochs_together_are_the_stream(run: tuple[int, Minibatch, int, int, int]):
    samples, minibatch, _, epochs, seed = run
    sampler = StreamBatchSampler(samples, minibatch, seed=seed, epochs=epochs)
    stream = SampleStream(samples=samples, minibatch=minibatch, seed=seed)
    given_, lengths = [], []
    for epoch in range(epochs):
        assert sampler.epoch == epoch
        lengths.append(len(sampler))
        given_ += list(sampler)
        assert len(given_) == sum(lengths) == minibatch.iterations(samples, epoch + 1)
        assert len(given_) * minibatch.size >= (epoch + 1) * samples > (len(given_) - 1) * minibatch.size
    assert max(lengths) - min(lengths) <= 1
    assert given_ == [stream.indices(t).tolist() for t in range(minibatch.iterations(samples, epochs))]
    assert all(type(index) is int for batch in given_ for index in batch)


@settings(max_examples=50)
@given(runs())
def test_the_processes_together_have_each_whole_minibatch(run: tuple[int, Minibatch, int, int, int]):
    samples, minibatch, processes, epochs, seed = run
    stream, hosted = SampleStream(samples=samples, minibatch=minibatch, seed=seed), minibatch.workers // processes
    parts = [
        StreamBatchSampler(samples, minibatch, seed=seed, epochs=epochs, process=process, processes=processes)
        for process in range(processes)
    ]
    assert {part.batch_size for part in parts} == {minibatch.size // processes}
    shares = [[batch for _ in range(epochs) for batch in part] for part in parts]
    for t, batches in enumerate(zip(*shares, strict=True)):
        assert sorted(chain(*batches)) == sorted(stream.indices(t))
        for process, batch in enumerate(batches):
            for j in range(hosted):
                assert batch[j::hosted] == stream.indices(t, process * hosted + j).tolist()


@settings(max_examples=50)
@given(runs(), st.data())
def test_a_run_goes_on_from_any_iteration_that_was_trained(
    run: tuple[int, Minibatch, int, int, int], data: st.DataObject
):
    samples, minibatch, processes, epochs, seed = run
    place = {"process": processes - 1, "processes": processes}
    whole = StreamBatchSampler(samples, minibatch, seed=seed, epochs=epochs, **place)
    by_epoch = [list(whole) for _ in range(epochs)]
    trained = data.draw(st.integers(0, minibatch.iterations(samples, epochs)))
    for says in (trained, lambda: trained):
        rest = StreamBatchSampler(samples, minibatch, seed=seed, epochs=epochs, trained=says, **place)
        first = rest.epoch
        before = sum(map(len, by_epoch[:first]))
        assert first == epochs or before <= trained < before + len(by_epoch[first])
        remaining = by_epoch[first][trained - before :] if first < epochs else []
        assert len(rest) == len(remaining)
        assert list(rest) == remaining
    counted = StreamBatchSampler(samples, minibatch, seed=seed, epochs=epochs, trained=trained, **place)
    given_ = [batch for _ in range(counted.epoch, epochs) for batch in counted]
    assert given_ == list(chain(*by_epoch))[trained:]


@pytest.mark.parametrize("options", LOADERS)
@pytest.mark.parametrize("trained", [0, 5, 40])
def test_a_loader_gives_an_epoch_at_a_time_whatever_it_reads_ahead(options: dict[str, Any], trained: int):
    """With loaders, torch's DataLoader calls `iter` twice for the first epoch."""
    sampler = of(trained=trained)
    loader, done = loader_of(sampler, **options), trained
    for epoch in range(sampler.epoch, 3):
        batches = len(loader)
        assert taken(loader) == [sampler.stream.indices(t).tolist() for t in range(done, done + batches)]
        done += batches
        assert done == [16, 32, 47][epoch]


def test_a_function_says_what_was_trained_at_each_epoch():
    """Read ahead, cut short, iterated twice: the next epoch begins where training is."""
    count = 5
    sampler = of(trained=lambda: count)
    whole = [sampler.stream.indices(t).tolist() for t in range(47)]
    iter(sampler)
    assert list(islice(sampler, 4)) == whole[5:9]
    count = 6
    assert list(sampler) == whole[6:16]
    count = 16
    assert taken(loader_of(sampler)) == whole[16:32]
    count = 10  # an older checkpoint was loaded
    assert list(sampler) == whole[10:16]


def test_a_function_that_says_that_all_is_trained_leaves_nothing():
    count = 40
    sampler = of(trained=lambda: count)
    assert len(list(sampler)) == 7
    count = 47
    assert (sampler.epoch, len(sampler), list(sampler)) == (3, 0, [])


def test_set_epoch_chooses_the_next_epoch():
    sampler = of()
    whole = [list(sampler) for _ in range(3)]
    for epoch in (1, 1, 0, 2):
        sampler.set_epoch(epoch)
        assert (sampler.epoch, len(sampler)) == (epoch, len(whole[epoch]))
        assert list(sampler) == whole[epoch]


def test_set_epoch_of_a_resumed_run_keeps_the_rest_of_its_epoch():
    sampler = of(trained=20)
    sampler.set_epoch(1)
    assert len(list(sampler)) == 12
    sampler.set_epoch(1)
    assert len(list(sampler)) == 16


@pytest.mark.parametrize("trained", [20, lambda: 20])
def test_a_loop_that_counts_from_0_again_after_a_resume_is_refused(trained: Any):
    with pytest.raises(ValueError, match=r"set_epoch\(0\), but 20 iterations are trained, and the next is of epoch 1;"):
        of(trained=trained).set_epoch(0)


def test_the_length_after_the_last_epoch_is_that_of_the_last():
    sampler = of()
    assert [(len(sampler), len(list(sampler))) for _ in range(3)] == [(16, 16), (16, 16), (15, 15)]
    assert len(sampler) == 15


@pytest.mark.parametrize("counts", [False, True])
def test_the_length_is_that_of_an_epoch_while_it_is_given(counts: bool):
    """As in `if step + 1 == len(loader)`, where an epoch of 16 goes before one of 15."""
    count = 16
    sampler = of(trained=(lambda: count) if counts else 16)
    for _ in sampler:
        assert len(sampler) == 16
        count += 1
    assert (count, len(sampler)) == (32, 15)


def test_more_epochs_than_there_are_is_an_error_and_not_an_empty_epoch():
    sampler = of()
    for _ in range(3):
        list(sampler)
    with pytest.raises(ValueError, match=r"all 3 epochs \(47 iterations\) of StreamBatchSampler are given; set_epoch"):
        list(sampler)


def test_a_run_that_is_trained_to_its_end_has_nothing_left():
    sampler = of(trained=47)
    assert (sampler.epoch, len(sampler), list(sampler)) == (3, 0, [])


def test_an_epoch_that_was_left_is_named_when_the_next_begins():
    sampler = of()
    assert len(next(iter(sampler))) == 8
    with pytest.warns(UserWarning, match=r"of the iterations 0 … 15 only 1 were taken; set_epoch\(0\)"):
        assert len(list(sampler)) == 16
    sampler.set_epoch(0)
    assert len(list(sampler)) == 16


@pytest.mark.parametrize("counted", [8, 32])
def test_a_count_of_something_else_than_the_batches_is_refused(counted: int):
    """Of updates with two passes each, or of the steps of two optimizers."""
    count = 0
    sampler = of(trained=lambda: count)
    list(sampler)
    count = counted
    with pytest.raises(ValueError, match=rf"0 … 15 were given, and then `trained` says that {counted} are trained"):
        list(sampler)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 7}, "minibatch 8 is larger than the data set of 7 samples"),
        ({"samples": 0}, "samples must be above zero"),
        ({"epochs": 0}, "epochs must be above zero"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"process": 2, "processes": 2}, "process must lie in 0 … 1 (processes=2), got 2"),
        ({"process": -1, "processes": 2}, "process must lie in 0 … 1 (processes=2), got -1"),
        ({"process": "0", "processes": 2}, "process must be a whole number, got '0'"),
        ({"process": 0, "processes": 0}, "processes must be above zero"),
        ({"process": 1}, "process and processes belong together, got process=1 and processes=None"),
        ({"processes": 2}, "process and processes belong together, got process=None and processes=2"),
        ({"process": 0, "processes": 3}, "3 processes cannot host the same number of 4 workers each"),
        ({"process": 0, "processes": 8}, "8 processes cannot host the same number of 4 workers each"),
        ({"minibatch": 8, "process": 0, "processes": 2}, "the minibatch is 1 × 8: give Minibatch(per_worker, workers)"),
        (
            {"trained": 48},
            "trained must lie in 0 … 47, the iterations of 3 epochs of 125 samples at minibatch 8, got 48",
        ),
        ({"trained": -1}, "trained must lie in 0 … 47"),
        ({"trained": 2.0}, "trained must be a whole number, got 2.0"),
        ({"trained": True}, "trained must be a whole number, got True"),
        ({"trained": None}, "trained must be a whole number, got None"),
    ],
)
def test_what_cannot_be_is_refused_in_words(options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        of(**options)


@pytest.mark.parametrize("epoch", [-1, 3])
def test_an_epoch_that_there_is_not_is_refused(epoch: int):
    with pytest.raises(ValueError, match=f"epoch must lie in 0 … 2, got {epoch}"):
        of().set_epoch(epoch)


def test_a_function_that_says_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"trained must lie in 0 … 47, .* got 48"):
        list(of(trained=lambda: 48))


def test_processes_that_have_not_joined_yet_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"2 processes were started \(WORLD_SIZE\), but torch.distributed does not run"
    ):
        list(of())
    assert len(list(of(process=1, processes=2))) == 16
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert len(list(of())) == 16


def test_the_rows_are_those_that_ghost_batchnorm_normalises_together():
    """Two processes of two workers each, with one BatchNorm, and four plain workers: the same outputs."""
    images = torch.randn(125, 3, 4, 4)
    for process in range(2):
        (first, *_) = of(process=process, processes=2)
        ghost = convert_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), per_worker=2)
        together = ghost(images[first])
        for j in range(2):
            mine = of().stream.indices(0, 2 * process + j)
            assert first[j::2] == mine.tolist()
            assert torch.allclose(together[j::2], torch.nn.BatchNorm2d(3)(images[mine]), atol=1e-5)


STREAM = SampleStream(samples=10, minibatch=Minibatch(per_worker=2, workers=3), seed=0)


def test_the_old_name_warns_with_what_to_write():
    with pytest.warns(DeprecationWarning, match="write StreamBatchSampler\\(samples, minibatch, seed=…, epochs=…"):
        StreamSampler(STREAM, worker=0, stop=2)


@pytest.mark.parametrize("worker", [1, range(1, 3)])
def test_the_old_name_gives_what_it_gave(worker: int | range):
    with warnings.catch_warnings(action="ignore"):
        sampler = StreamSampler(STREAM, worker=worker, start=3, stop=9)
    assert list(sampler) == list(sampler) == [STREAM.indices(t, worker).tolist() for t in range(3, 9)]
    assert len(sampler) == 6


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, -1)])
def test_the_old_name_refuses_a_start_after_the_stop_or_below_zero(start: int, stop: int):
    with (
        pytest.warns(DeprecationWarning, match="StreamBatchSampler"),
        pytest.raises(ValueError, match="start and stop must satisfy 0 <= start <= stop"),
    ):
        StreamSampler(STREAM, worker=0, start=start, stop=stop)


def test_whoever_asks_is_not_kept():
    """A loader that is kept until the garbage is collected waits ten seconds for its processes."""
    loader = loader_of(of(), num_workers=1, persistent_workers=True)
    assert [len(taken(loader)) for _ in range(3)] == [16, 16, 15]
    seen = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert seen() is None
    finally:
        gc.enable()
