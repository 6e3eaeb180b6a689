"""A snapshot keeps an iteration's values, whoever reads first: its reader or the next update."""

import threading

import torch

from onehour.train.snapshot import Snapshot


def test_what_was_not_read_is_copied_before_it_changes():
    a, b = torch.ones(3), torch.ones(3)
    snapshot = Snapshot({"a": a, "b": b})
    with snapshot.reading("a") as read:
        assert read.data_ptr() == a.data_ptr()  # in place
    snapshot.detach()
    a.zero_()
    b.zero_()
    with snapshot.reading("b") as read:
        assert read.tolist() == [1, 1, 1]


def test_detach_waits_for_the_tensor_that_is_being_read_even_if_it_is_the_last():
    weight = torch.ones(3)
    snapshot = Snapshot({"weight": weight})
    reading, done = threading.Event(), threading.Event()
    seen: list[list[float]] = []

    def read() -> None:
        with snapshot.reading("weight") as tensor:
            reading.set()
            assert not done.wait(0.3)  # the update must not come meanwhile
            seen.append(tensor.tolist())

    reader = threading.Thread(target=read)
    reader.start()
    reading.wait()
    snapshot.detach()
    weight.zero_()
    done.set()
    reader.join()
    assert seen == [[1, 1, 1]]


def test_names_shapes_and_types_are_known_without_memory():
    shapes = Snapshot({"a": torch.zeros(2, 3, dtype=torch.float64)}).shapes
    assert (shapes["a"].shape, shapes["a"].dtype, shapes["a"].device.type) == ((2, 3), torch.float64, "meta")
