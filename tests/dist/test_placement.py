"""k workers on p processes: each worker has one home, and the homes are as equal as can be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehour.dist.placement import passes, place, place_by_halving

WORKERS_AND_PROCESSES = st.integers(1, 2048).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, k)))


@given(WORKERS_AND_PROCESSES)
def test_the_processes_shares_are_consecutive_cover_every_worker_once_and_are_as_equal_as_can_be(sizes):
    workers, processes = sizes
    shares = place(workers, processes)
    lengths = [len(share) for share in shares]
    assert len(shares) == processes
    assert list(itertools.chain(*shares)) == list(range(workers))
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


ANY_K_ON_FEW = st.tuples(st.integers(4, 2048), st.integers(0, 2))
EVEN_K_ON_MANY = st.tuples(st.integers(1, 8), st.integers(3, 8)).map(lambda drawn: (drawn[0] * 2 ** drawn[1], drawn[1]))


@given(ANY_K_ON_FEW | EVEN_K_ON_MANY)
def test_a_power_of_two_processes_are_the_halves_of_halves(sizes):
    """So that the sum over processes can follow the tree that halves [0, k)."""
    workers, levels = sizes

    def halved(share: range, depth: int) -> list[range]:
        middle = (share.start + share.stop) // 2
        if depth == 0:
            return [share]
        return halved(range(share.start, middle), depth - 1) + halved(range(middle, share.stop), depth - 1)

    assert place(workers, 2**levels) == halved(range(workers), levels)


@pytest.mark.parametrize(("workers", "processes"), [(4, 5), (1, 2), (4, 0), (4, -1)])
def test_more_processes_than_workers_or_none_are_refused_with_both_numbers(workers, processes):
    with pytest.raises(ValueError, match=f"^{processes} processes cannot share {workers} workers .* at most {workers}"):
        place(workers, processes)


@given(WORKERS_AND_PROCESSES, st.integers(1, 5))
def test_workers_that_share_a_pass_are_of_one_process_placed_as_one_worker_would_be(sizes, together):
    blocks, processes = sizes
    for division in (place, place_by_halving):
        shares = division(blocks * together, processes, together=together)
        expected = division(blocks, processes)
        assert shares == [range(together * share.start, together * share.stop) for share in expected]


def test_more_processes_than_passes_are_refused_by_the_name_of_the_setting():
    with pytest.raises(ValueError, match=r"3 processes cannot share 8 workers \(k = kn / n, 4 a pass\); use at most 2"):
        place_by_halving(8, 3, together=4)


@given(start=st.integers(0, 100), size=st.integers(1, 100), together=st.integers(1, 120))
def test_passes_cover_a_share_in_order_with_only_the_last_one_short(start, size, together):
    cut = passes(range(start, start + size), together)
    assert list(itertools.chain(*cut)) == list(range(start, start + size))
    assert all(len(one) == together for one in cut[:-1])
    assert 1 <= len(cut[-1]) <= together
