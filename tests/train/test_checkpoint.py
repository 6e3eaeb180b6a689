"""A checkpoint is complete under its name or not there, and holds all that the next iteration depends on."""

import hashlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from onehour.dist.group import Group
from onehour.train.build import build_optimizer
from onehour.train.checkpoint import (
    digest_of,
    load_latest,
    model_state,
    optimizer_state,
    save_checkpoint,
)


def trained(tiny: ModuleType, optimizer: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = tiny.net()
    made = build_optimizer(tiny.recipe(optimizer=optimizer), model)
    advance(model, made, steps)
    return model, made


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam"])
def test_training_goes_on_with_the_same_bits(tiny: ModuleType, tmp_path: Path, name: str):
    model, optimizer = trained(tiny, name, 3)
    save_checkpoint(tmp_path, model, optimizer, {"iteration": 3, "totals": [0.1, 2.0]})
    other, others = trained(tiny, name, 0)
    assert load_latest(tmp_path, other, others, Group()) == {"iteration": 3, "totals": [0.1, 2.0]}
    for these in ((model, optimizer), (other, others)):
        advance(*these, 2)
    states = [(model_state(m), optimizer_state(o, m)) for m, o in ((model, optimizer), (other, others))]
    assert digest_of(*states[0]) == digest_of(*states[1])


def test_an_empty_folder_has_none(tiny: ModuleType, tmp_path: Path):
    assert load_latest(tmp_path / "nowhere", *trained(tiny, "sgd", 0), Group()) is None


def test_the_manifest_holds_the_digest_of_every_file(tiny: ModuleType, tmp_path: Path):
    folder = save_checkpoint(tmp_path, *trained(tiny, "sgd", 1), {"iteration": 1})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, known in manifest.items():
        content = (folder / name).read_bytes()
        assert known == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_crash_while_writing_leaves_the_one_before(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = trained(tiny, "sgd", 1)
    save_checkpoint(tmp_path, model, optimizer, {"iteration": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("onehour.train.checkpoint.write_tensors", "pathlib.Path.rename"):
        with monkeypatch.context() as patched:
            patched.setattr(name, full)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(tmp_path, model, optimizer, {"iteration": 2})
        assert load_latest(tmp_path, model, optimizer, Group()) == {"iteration": 1}
    save_checkpoint(tmp_path, model, optimizer, {"iteration": 2})  # what the crash left is in nobody's way
    assert load_latest(tmp_path, model, optimizer, Group()) == {"iteration": 2}


def test_states_are_copies_that_training_does_not_change(tiny: ModuleType):
    model, optimizer = trained(tiny, "sgd", 1)
    states = model_state(model), optimizer_state(optimizer, model)
    before = digest_of(*states)
    advance(model, optimizer, 1)
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


def test_tied_weights_are_saved_under_both_names(tmp_path: Path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(tmp_path, model, optimizer, {"iteration": 1, "totals": [0.0, 0.0]})
    state = model_state(model)
    with torch.no_grad():
        first.weight.zero_()
    assert load_latest(tmp_path, model, optimizer, Group()) == {"iteration": 1, "totals": [0.0, 0.0]}
    assert torch.equal(first.weight, state["1.weight"])
    assert float(first.weight.detach().abs().sum()) > 0
