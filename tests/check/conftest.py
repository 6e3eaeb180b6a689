"""The loops are scripts to be run, not modules with tests; one process has torch imported for all of them."""

from collections.abc import Iterator

import pytest

from onehour.check.runner import Nursery

collect_ignore_glob = ["loops/*"]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts scripts at once."""
    with Nursery() as nursery:
        yield nursery
