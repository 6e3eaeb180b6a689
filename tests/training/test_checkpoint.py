"""What is saved is read back to the bit, and whoever wrote it, training was not held."""

import errno
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from onehour import Recipe
from onehour.dist.group import Group
from onehour.training.checkpoint import FILES, Checkpoints, SaveInterval, Store, Stored
from onehour.training.state import Network, digest_of, model_state, optimizer_state


def progress(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "position": 8 * iteration, "totals": [0.1, 2.0], "build": {"torch": "2"}}


PROGRESS = progress(3)


def checkpoints(folder: Path, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(folder, Recipe(), Group(), warn=(said if said is not None else []).append)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam"])
def test_training_goes_on_with_the_same_bits(tiny: ModuleType, tmp_path: Path, name: str):
    model, optimizer = tiny.trained(name, 3)
    saved = checkpoints(tmp_path)
    saved.save(Network(model, optimizer), PROGRESS)
    saved.close()
    other, others = tiny.trained(name, 0)
    assert checkpoints(tmp_path).load(Network(other, others)) == PROGRESS
    for these in ((model, optimizer), (other, others)):
        tiny.advance(*these, 2)
    states = [(model_state(m), optimizer_state(o, m)) for m, o in ((model, optimizer), (other, others))]
    assert digest_of(*states[0]) == digest_of(*states[1])


class Counting(torch.optim.Optimizer):
    """Keeps Python's numbers: of a parameter, and as timm's Lamb does, of a group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "seen": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"], group["seen"] = group.get("step", 0) + 1, True
            for weight in group["params"]:
                state = self.state[weight]
                state["scale"], state["count"] = 0.9 * state.get("scale", 1.0), state.get("count", 2**40) + 1
                weight -= weight.grad * (0.1 * state["scale"] / group["step"])


def test_an_optimizers_numbers_are_kept_to_the_bit_and_stay_numbers(tiny: ModuleType, tmp_path: Path):
    trained = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        model = tiny.net()
        optimizer = Counting(model.parameters())
        tiny.advance(model, optimizer, 3)
        if folder is not None:
            saved = checkpoints(folder)
            saved.save(Network(model, optimizer), PROGRESS)
            saved.close()
            model = tiny.net()
            optimizer = Counting(model.parameters())
            assert checkpoints(folder).load(Network(model, optimizer)) == PROGRESS
        tiny.advance(model, optimizer, 2)
        kept = [*optimizer.state.values(), {**optimizer.param_groups[0], "params": None}]
        numbers = [sorted(numbers.items()) for numbers in kept]
        trained.append((repr(numbers), digest_of(model_state(model), optimizer_state(optimizer, model))))
    assert trained[0] == trained[1]
    assert "('seen', True), ('step', 5)" in trained[0][0]


@pytest.mark.parametrize(
    ("key", "kept", "said"),
    [
        ("weight", {"kept": [1.0]}, "keeps a list as 'kept', and a checkpoint holds plain tensors of real numbers and"),
        ("weight", {"kept": "text"}, "keeps a str as 'kept', and a checkpoint holds plain tensors of real numbers and"),
        ("weight", {"kept": torch.zeros(1, dtype=torch.complex64)}, r"keeps a torch\.complex64 tensor as 'kept'"),
        ("step", 1, "keeps state that belongs to no parameter"),
    ],
)
def test_an_optimizer_that_keeps_something_else_is_refused_when_it_is_saved(
    tiny: ModuleType, tmp_path: Path, key: str, kept: Any, said: str
):
    model = tiny.net()
    optimizer = Counting(model.parameters())
    optimizer.state[model[0].weight if key == "weight" else key] = kept  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"optimizer Counting {said}"):
        checkpoints(tmp_path).save(Network(model, optimizer), PROGRESS)


def test_an_empty_folder_has_none(tiny: ModuleType, tmp_path: Path):
    assert checkpoints(tmp_path / "nowhere").load(Network(*tiny.trained("sgd", 0))) is None


def test_what_is_written_are_the_values_before_the_update(tiny: ModuleType, tmp_path: Path):
    """However the writer, the next forward pass, which moves statistics, and the next updates meet."""
    for turn in range(8):
        model, optimizer = tiny.trained("sgd", 1)
        before = digest_of(model_state(model), optimizer_state(optimizer, model))
        saved = checkpoints(tmp_path / str(turn))
        network = Network(model, optimizer)
        saved.save(network, PROGRESS)
        model(torch.randn(8, 1, 4, 4))
        network.finish_copy()
        tiny.advance(model, optimizer, 3)
        saved.close()
        other, others = tiny.trained("sgd", 0)
        checkpoints(tmp_path / str(turn)).load(Network(other, others))
        assert digest_of(model_state(other), optimizer_state(others, other)) == before


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("refused", ["the checkpoint", "what it counts on"])
def test_a_full_disk_is_one_warning_and_the_one_before_stays(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
):
    model, optimizer = tiny.trained("sgd", 1)
    said: list[str] = []
    saved = checkpoints(tmp_path, said)
    saved.save(Network(model, optimizer), progress(1), first=(tmp_path / "record").touch)
    assert saved.wait()
    assert (tmp_path / "record").exists()
    with monkeypatch.context() as patched:
        if refused == "the checkpoint":
            patched.setattr("onehour.training.checkpoint.Path.rename", full)
        for iteration in (2, 3):
            saved.save(
                Network(model, optimizer), progress(iteration), first=full if refused == "what it counts on" else None
            )
            assert not saved.wait()
    (warning,) = said
    assert "No space left on device" in warning
    assert str(tmp_path) in warning
    assert "bytes are needed" in warning
    assert checkpoints(tmp_path).load(Network(model, optimizer)) == progress(1)
    saved.save(Network(model, optimizer), progress(4))
    assert saved.wait()
    assert checkpoints(tmp_path).load(Network(model, optimizer)) == progress(4)


FOREIGN = save({"9.weight/momentum_buffer": torch.zeros(1)})
OURS = save({"group 0/params#": torch.zeros(())})


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", FOREIGN, OURS])
def test_tensors_that_are_none_are_one_message(tiny: ModuleType, tmp_path: Path, name: str, content: bytes):
    model, optimizer = tiny.trained("sgd", 1)
    files = {FILES[0]: save(model_state(model)), FILES[1]: save(optimizer_state(optimizer, model)), name: content}
    checkpoints(tmp_path).store.write(1, [*files.values(), json.dumps(progress(1)).encode()])
    with pytest.raises(ValueError, match="is of another model: ") as raised:
        checkpoints(tmp_path).load(Network(model, optimizer))
    assert len(str(raised.value).splitlines()) == 1


def test_looking_at_old_checkpoints_holds_no_step(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a start, the first save verifies those that this process does not know, beside the training."""
    model, optimizer = tiny.trained("sgd", 1)
    saved = checkpoints(tmp_path)
    for iteration in (1, 2):
        saved.save(Network(model, optimizer), progress(iteration))
    saved.close()
    looking, updated, verified = threading.Event(), threading.Event(), Store.verified

    def slow(self: Store, folder: Path) -> Stored:
        looking.set()
        assert updated.wait(300)
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", slow)
    again = checkpoints(tmp_path)
    network = Network(model, optimizer)
    again.save(network, progress(3))
    assert looking.wait(300)
    network.finish_copy()
    tiny.advance(model, optimizer, 1)
    updated.set()
    assert again.wait()


def test_a_folder_that_cannot_be_listed_is_one_message(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "checkpoints").mkdir()

    def refuses(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", refuses)
    with pytest.raises(ValueError, match="checkpoints cannot be read or written: Input/output error"):
        checkpoints(tmp_path).load(Network(*tiny.trained("sgd", 1)))


def test_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("onehour.training.checkpoint.time.monotonic", lambda: now[0])
    interval = SaveInterval(None, 0.5)
    over = []
    for done in range(1, 8):
        now[0] = 12.0 * done
        over.append(interval.is_over(done, ends_epoch=False, last=False))
    assert over == [False, False, True, False, False, True, False]


def test_tied_weights_are_saved_under_both_names(tmp_path: Path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = checkpoints(tmp_path)
    saved.save(Network(model, optimizer), PROGRESS)
    saved.close()
    state = model_state(model)
    with torch.no_grad():
        first.weight.zero_()
    assert checkpoints(tmp_path).load(Network(model, optimizer)) == PROGRESS
    assert torch.equal(first.weight, state["1.weight"])
    assert float(first.weight.detach().abs().sum()) > 0
