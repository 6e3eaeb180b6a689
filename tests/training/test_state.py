"""A run's state as tensors by name, and its digest."""

from types import ModuleType

import pytest
import torch

from onehour.training.state import Network, digest_of, host_copies


def test_states_are_copies_that_training_does_not_change(tiny: ModuleType):
    model, optimizer = tiny.trained("sgd", 1)
    states = [host_copies(state) for state in Network(model, optimizer).state()]
    before = digest_of(*states)
    tiny.advance(model, optimizer, 1)
    assert digest_of(*states) == before


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 3.0])},
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)},
    ],
)
def test_a_digest_covers_names_types_shapes_and_values(other: dict[str, torch.Tensor]):
    state = {"a": torch.tensor([1.0, 2.0])}
    assert digest_of(other) != digest_of(state)


def test_a_digest_knows_no_order_and_no_layout():
    a, b = torch.randn(2, 3, 4, 5), torch.tensor(7)
    swapped = {"b": b, "a": a.contiguous(memory_format=torch.channels_last)}
    assert digest_of({"a": a, "b": b}) == digest_of(swapped)
