"""What is saved is read back to the bit, and whoever wrote it, training was not held."""

import errno
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from onehour import Recipe
from onehour.dist.group import Group
from onehour.train.build import build_optimizer
from onehour.train.checkpoint import Checkpoints, SaveInterval
from onehour.train.state import digest_of, model_state, optimizer_state

PROGRESS = {"iteration": 3, "totals": [0.1, 2.0]}


def checkpoints(folder: Path, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(folder, Recipe(), Group(), warn=(said if said is not None else []).append)


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
    saved = checkpoints(tmp_path)
    saved.save(model, optimizer, PROGRESS)
    saved.close()
    other, others = trained(tiny, name, 0)
    assert checkpoints(tmp_path).load(other, others) == PROGRESS
    for these in ((model, optimizer), (other, others)):
        advance(*these, 2)
    states = [(model_state(m), optimizer_state(o, m)) for m, o in ((model, optimizer), (other, others))]
    assert digest_of(*states[0]) == digest_of(*states[1])


def test_an_empty_folder_has_none(tiny: ModuleType, tmp_path: Path):
    assert checkpoints(tmp_path / "nowhere").load(*trained(tiny, "sgd", 0)) is None


def test_what_is_written_are_the_values_before_the_update(tiny: ModuleType, tmp_path: Path):
    """However the writer and the next updates meet."""
    for turn in range(20):
        model, optimizer = trained(tiny, "sgd", 1)
        before = digest_of(model_state(model), optimizer_state(optimizer, model))
        saved = checkpoints(tmp_path / str(turn))
        saved.save(model, optimizer, PROGRESS)
        saved.detach()
        advance(model, optimizer, 3)
        saved.close()
        other, others = trained(tiny, "sgd", 0)
        checkpoints(tmp_path / str(turn)).load(other, others)
        assert digest_of(model_state(other), optimizer_state(others, other)) == before


def test_a_full_disk_is_one_warning_and_the_one_before_stays(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = trained(tiny, "sgd", 1)
    said: list[str] = []
    saved = checkpoints(tmp_path, said)
    saved.save(model, optimizer, {"iteration": 1})
    assert saved.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("onehour.train.store.Path.rename", full)
        for iteration in (2, 3):
            saved.save(model, optimizer, {"iteration": iteration})
            assert not saved.wait()
    (warning,) = said
    assert "No space left on device" in warning
    assert str(tmp_path) in warning
    assert "bytes are needed" in warning
    assert checkpoints(tmp_path).load(model, optimizer) == {"iteration": 1}
    saved.save(model, optimizer, {"iteration": 4})
    assert saved.wait()
    assert checkpoints(tmp_path).load(model, optimizer) == {"iteration": 4}


def test_a_damaged_one_is_named_and_the_one_before_is_used(tiny: ModuleType, tmp_path: Path):
    model, optimizer = trained(tiny, "sgd", 1)
    saved = checkpoints(tmp_path)
    for iteration in (1, 2):
        saved.save(model, optimizer, {"iteration": iteration})
    saved.close()
    (tmp_path / "checkpoints" / "iteration-000000002" / "progress.json").write_text("{}")
    said: list[str] = []
    assert checkpoints(tmp_path, said).load(model, optimizer) == {"iteration": 1}
    (warning,) = said
    assert "iteration-000000002: progress.json has 2 bytes instead of" in warning


def test_a_checkpoint_of_another_recipe_is_not_loaded(tiny: ModuleType, tmp_path: Path):
    model, optimizer = trained(tiny, "sgd", 1)
    saved = Checkpoints(tmp_path / "a", Recipe(seed=1), Group(), warn=print)
    saved.save(model, optimizer, PROGRESS)
    saved.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="belongs to a run of another recipe"):
        checkpoints(tmp_path / "b").load(model, optimizer)


def test_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("onehour.train.checkpoint.time.monotonic", lambda: now[0])
    interval = SaveInterval(None, 0.5)
    over = []
    for done in range(1, 8):
        now[0] = 12.0 * done
        over.append(interval.over(done))
    assert over == [False, False, True, False, False, True, False]


def test_tied_weights_are_saved_under_both_names(tmp_path: Path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = checkpoints(tmp_path)
    saved.save(model, optimizer, PROGRESS)
    saved.close()
    state = model_state(model)
    with torch.no_grad():
        first.weight.zero_()
    assert checkpoints(tmp_path).load(model, optimizer) == PROGRESS
    assert torch.equal(first.weight, state["1.weight"])
    assert float(first.weight.detach().abs().sum()) > 0
