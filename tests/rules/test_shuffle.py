"""Remark 4: one random permutation of all the data an epoch, divided among the workers."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from onehour.dist.placement import place
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream, permutation

SEEDS = st.integers(-(2**63), 2**63)


@st.composite
def streams(draw, fewest: int = 1):
    minibatch = Minibatch(draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    samples = draw(st.integers(max(fewest, minibatch.size), fewest + minibatch.size + 40))
    return SampleStream(samples=samples, minibatch=minibatch, seed=draw(SEEDS))


def whole(stream: SampleStream, epochs: int) -> np.ndarray:
    """The stream of all iterations that `epochs` epochs need, end to end."""
    iterations = stream.minibatch.iterations(stream.samples, epochs)
    return np.concatenate([stream.indices(t) for t in range(iterations)])


# Values of the first release: a change would give every recorded run another order.
@pytest.mark.parametrize(
    ("epoch", "first", "digest"),
    [
        (0, [75, 559, 463, 533, 644, 220, 770, 734], "edcd88f05a5958011d021e38ce192746"),
        (1, [728, 906, 861, 493, 310, 647, 914, 736], "f75d4c973ed71575f7c9c4fb18e4b2f3"),
    ],
)
def test_the_permutations_of_seed_0_are_pinned(epoch, first, digest):
    order = permutation(1000, seed=0, epoch=epoch)
    assert order[:8].tolist() == first
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:32] == digest


@given(samples=st.integers(1, 200), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_a_permutation_holds_each_sample_once_and_is_pure(samples, seed, epoch):
    order = permutation(samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(samples))
    assert order.tolist() == permutation(samples, seed, epoch).tolist()


@given(streams())
def test_each_epoch_of_the_stream_is_its_permutation_with_no_sample_dropped_or_padded(stream):
    passed = whole(stream, epochs=3)
    for epoch in range(3):
        order = passed[epoch * stream.samples : (epoch + 1) * stream.samples]
        assert order.tolist() == permutation(stream.samples, stream.seed, epoch).tolist()


@given(streams(fewest=20))
def test_every_epoch_and_every_seed_has_a_new_order(stream):
    """20 samples have 2e18 orders, so that two alike are a fault and no chance."""
    epochs = whole(stream, epochs=3)[: 3 * stream.samples].reshape(3, stream.samples)
    other = permutation(stream.samples, stream.seed + 1, 0)
    assert len({tuple(order.tolist()) for order in (*epochs, other)}) == 4


@given(stream=streams(), iteration=st.integers(0, 50))
def test_workers_are_disjoint_and_together_take_the_minibatch(stream, iteration):
    n, k = stream.minibatch.per_worker, stream.minibatch.workers
    minibatch = stream.indices(iteration)
    shares = [stream.indices(iteration, np.int64(worker)) for worker in range(k)]  # type: ignore[arg-type]
    assert minibatch.shape == (n * k,)
    assert all(share.tolist() == minibatch[worker::k].tolist() for worker, share in enumerate(shares))
    positions = np.arange(iteration * n * k, (iteration + 1) * n * k)
    owned = [set(positions[worker::k].tolist()) for worker in range(k)]
    assert sorted(itertools.chain(*owned)) == positions.tolist()


@given(stream=streams(), iteration=st.integers(0, 50), data=st.data())
def test_whatever_processes_share_the_workers_each_worker_has_the_same_samples(stream, iteration, data):
    """Row i·g + j of a process's range is the i-th sample of its j-th worker."""
    n, k = stream.minibatch.per_worker, stream.minibatch.workers
    for share in place(k, data.draw(st.integers(1, k))):
        hosted = stream.indices(iteration, share).reshape(n, len(share))
        alone = np.stack([stream.indices(iteration, worker) for worker in share], axis=1)
        assert hosted.tolist() == alone.tolist()


@given(stream=streams(), iterations=st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_any_iteration_may_be_asked_for_at_any_time(stream, iterations):
    fresh = [
        SampleStream(samples=stream.samples, minibatch=stream.minibatch, seed=stream.seed).indices(t)
        for t in iterations
    ]
    asked = [stream.indices(t) for t in iterations]
    assert [a.tolist() for a in asked] == [f.tolist() for f in fresh]


@given(stream=streams(), iteration=st.integers(0, 50), data=st.data())
def test_every_sample_comes_with_the_epoch_that_it_belongs_to(stream, iteration, data):
    worker = data.draw(st.integers(0, stream.minibatch.workers - 1))
    epochs, indices = stream.epochs_and_indices(iteration, worker)
    k, kn = stream.minibatch.workers, stream.minibatch.size
    for row, (epoch, index) in enumerate(zip(epochs, indices, strict=True)):
        position = iteration * kn + row * k + worker
        assert epoch == position // stream.samples
        assert index == permutation(stream.samples, stream.seed, int(epoch))[position % stream.samples]


def test_what_a_caller_does_to_its_indices_does_not_reach_the_stream():
    stream = SampleStream(samples=8, minibatch=8, seed=0)
    before = stream.indices(0).tolist()
    stream.indices(0)[:] = -1
    assert stream.indices(0).tolist() == before


def test_positions_are_uniform_over_samples():
    """Each of 3 samples in 4,000 epochs of 25: its positions' chi-square has p above 0.001 (seed fixed)."""
    orders = np.stack([permutation(25, seed=0, epoch=epoch) for epoch in range(4000)])
    for sample in (0, 12, 24):
        counts = (orders == sample).sum(0)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_all_orders_of_five_samples_are_equally_likely():
    """Uniform positions alone would let rotations pass; 120 orders over 6,000 epochs do not (seed fixed)."""
    orders = [tuple(permutation(5, seed=1, epoch=epoch).tolist()) for epoch in range(6000)]
    counts = [orders.count(order) for order in itertools.permutations(range(5))]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_epochs_are_independent_of_each_other():
    """The rank correlation of successive epochs has standard deviation 1/√(N−1) (seed fixed)."""
    orders = [permutation(2000, seed=0, epoch=epoch) for epoch in range(10)]
    for before, after in itertools.pairwise(orders):
        assert abs(np.corrcoef(np.argsort(before), np.argsort(after))[0, 1]) < 4 / 1999**0.5


def test_independent_shuffles_per_worker_neither_cover_the_data_nor_stay_disjoint():
    """The wrong variant: each of 4 workers takes its quarter of an epoch from a shuffle of its own."""
    stream = SampleStream(samples=64, minibatch=Minibatch(4, 4), seed=0)
    ours = np.concatenate([stream.indices(t) for t in range(4)])
    wrong = np.concatenate([permutation(64, seed=worker, epoch=0)[:16] for worker in range(4)])
    assert len(set(ours.tolist())) == 64
    assert len(set(wrong.tolist())) < 64


def test_a_minibatch_larger_than_the_data_is_refused_with_the_largest_possible():
    with pytest.raises(ValueError, match=r"minibatch 8 is larger than .* of 7 samples; .* at most 7"):
        SampleStream(samples=7, minibatch=Minibatch(2, 4), seed=0)


@pytest.mark.parametrize(
    "worker", [-1, 3, range(0), range(2, 2), range(-1, 2), range(4), range(0, 3, 2), range(2, -1, -1)]
)
def test_a_worker_outside_of_the_k_is_refused(worker):
    stream = SampleStream(samples=6, minibatch=Minibatch(2, 3), seed=0)
    with pytest.raises(ValueError, match=r"worker must lie in 0 … 2 \(k = 3 workers\)"):
        stream.indices(0, worker)


def test_an_iteration_below_zero_is_refused():
    with pytest.raises(ValueError, match="iteration must not be below zero, got -1"):
        SampleStream(samples=6, minibatch=3, seed=0).indices(-1)
