"""A snapshot keeps an iteration's values, whoever reads first: its reader or the next update."""

import threading

import pytest
import torch
from torch import Tensor

from onehour.training.snapshot import Snapshot


def whole(snapshot: Snapshot, name: str, size: int = 8) -> Tensor:
    return torch.cat(list(snapshot.pieces(name, size)))


@pytest.mark.parametrize("read_first", [0, 1, 2])
def test_pieces_are_of_the_values_before_the_update_wherever_it_comes(read_first: int):
    weight, other = torch.arange(5.0), torch.ones(3)
    snapshot = Snapshot({"weight": weight, "other": other})
    pieces = snapshot.pieces("weight", size=8)
    read = [next(pieces) for _ in range(read_first)]
    snapshot.detach()
    weight.zero_()
    other.zero_()
    assert torch.cat([*read, *pieces]).tolist() == [0, 1, 2, 3, 4]
    assert whole(snapshot, "other").tolist() == [1, 1, 1]


def test_a_second_detach_copies_nothing():
    snapshot = Snapshot({"a": torch.ones(3)})
    snapshot.detach()
    first = next(snapshot.pieces("a"))
    snapshot.detach()
    assert next(snapshot.pieces("a")).data_ptr() == first.data_ptr()


def test_an_update_does_not_wait_for_whoever_writes_a_piece():
    """As a slow disk would hold it."""
    weight = torch.ones(3)
    snapshot = Snapshot({"weight": weight})
    reading, updated = threading.Event(), threading.Event()
    seen: list[list[float]] = []

    def read() -> None:
        for piece in snapshot.pieces("weight"):
            reading.set()
            assert updated.wait(30)
            seen.append(piece.tolist())

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(30)
    snapshot.detach()
    weight.zero_()
    updated.set()
    reader.join()
    assert seen == [[1, 1, 1]]


def test_shapes_of_every_kind_come_whole():
    state = {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "cube": torch.randn(3, 4, 5)}
    snapshot = Snapshot(state)
    assert snapshot.nbytes == 8 + 240
    assert whole(snapshot, "scalar").tolist() == [7]
    assert list(snapshot.pieces("empty")) == []
    assert torch.equal(whole(snapshot, "cube").view(3, 4, 5), state["cube"])


def test_names_shapes_and_types_are_known_without_memory():
    shapes = Snapshot({"a": torch.zeros(2, 3, dtype=torch.float64)}).shapes
    assert (shapes["a"].shape, shapes["a"].dtype, shapes["a"].device.type) == ((2, 3), torch.float64, "meta")
