"""Which process hosts which of the k workers, and in which passes it takes them. Nothing a run learns depends on it."""

from __future__ import annotations

from itertools import pairwise

from onehour.rules.aggregate import halve


def place(workers: int, processes: int, *, together: int = 1) -> list[range]:
    """Divide k workers among p processes in consecutive ranges whose sizes differ by one at most.

    Args:
        together: how many consecutive workers must be of one process; they divide k, and count as one.

    >>> place(5, 2)
    [range(0, 2), range(2, 5)]
    """
    most = workers // together
    if not 1 <= processes <= most:
        each, smaller = ("", "") if together == 1 else (f", {together} a pass", " or canonical_pass")
        raise ValueError(
            f"{processes} processes cannot share {workers} workers (k = kn / n{each}); use at most {most} processes,"
            f" a larger minibatch or a smaller per_worker{smaller}"
        )
    edges = [together * (most * rank // processes) for rank in range(processes + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def place_by_halving(workers: int, processes: int, *, together: int = 1) -> list[range]:
    """Divide k workers among p processes by halving both together, so that each hosts one node of the canonical tree.

    Args:
        together: of how many workers each leaf of the tree is, as for `place`.

    >>> place_by_halving(5, 3)
    [range(0, 2), range(2, 3), range(3, 5)]
    """
    place(workers, processes, together=together)

    def divide(hosted: range, hosts: range) -> list[range]:
        if len(hosts) == 1:
            return [range(together * hosted.start, together * hosted.stop)]
        (few, many), (first, second) = halve(hosted), halve(hosts)
        return divide(few, first) + divide(many, second)

    return divide(range(workers // together), range(processes))


def passes(share: range, together: int) -> list[range]:
    """Cut a process's workers into passes of at most `together` workers.

    >>> passes(range(2, 7), together=2)
    [range(2, 4), range(4, 6), range(6, 7)]
    """
    assert together >= 1
    return [range(a, min(a + together, share.stop)) for a in range(share.start, share.stop, together)]
