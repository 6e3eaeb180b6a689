"""What is saved is read back to the bit, and whoever wrote it, training was not held."""

import errno
import json
import shutil
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
from onehour.training.checkpoint import FILES, Checkpoints, SaveInterval, latest_contents
from onehour.training.state import digest_of, model_state, optimizer_state
from onehour.training.store import Store, Stored


def progress(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "position": 8 * iteration, "totals": [0.1, 2.0], "build": {"torch": "2"}}


PROGRESS = progress(3)


def checkpoints(folder: Path, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(folder, Recipe(), Group(), warn=(said if said is not None else []).append)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam"])
def test_training_goes_on_with_the_same_bits(tiny: ModuleType, tmp_path: Path, name: str):
    model, optimizer = tiny.trained(name, 3)
    saved = checkpoints(tmp_path)
    saved.save(model, optimizer, PROGRESS)
    saved.close()
    other, others = tiny.trained(name, 0)
    assert checkpoints(tmp_path).load(other, others) == PROGRESS
    for these in ((model, optimizer), (other, others)):
        tiny.advance(*these, 2)
    states = [(model_state(m), optimizer_state(o, m)) for m, o in ((model, optimizer), (other, others))]
    assert digest_of(*states[0]) == digest_of(*states[1])


class Counting(torch.optim.Optimizer):
    """Keeps Python's numbers: of a parameter, and as timm's Lamb does, of a group."""

    def __init__(self, params: Any, kept: Any = None) -> None:
        super().__init__(params, {"lr": 0.1, "seen": False, "kept": kept})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"], group["seen"] = group.get("step", 0) + 1, True
            for weight in group["params"]:
                state = self.state[weight]
                state["scale"], state["count"] = 0.9 * state.get("scale", 1.0), state.get("count", 2**40) + 1
                weight -= weight.grad * (0.1 * state["scale"] / group["step"])
                if group["kept"] is not None:
                    state["kept"] = group["kept"]


def test_an_optimizers_numbers_are_kept_to_the_bit_and_stay_numbers(tiny: ModuleType, tmp_path: Path):
    trained = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        model = tiny.net()
        optimizer = Counting(model.parameters())
        tiny.advance(model, optimizer, 3)
        if folder is not None:
            saved = checkpoints(folder)
            saved.save(model, optimizer, PROGRESS)
            saved.close()
            model = tiny.net()
            optimizer = Counting(model.parameters())
            assert checkpoints(folder).load(model, optimizer) == PROGRESS
        tiny.advance(model, optimizer, 2)
        kept = [*optimizer.state.values(), {**optimizer.param_groups[0], "params": None}]
        numbers = [sorted(numbers.items()) for numbers in kept]
        trained.append((repr(numbers), digest_of(model_state(model), optimizer_state(optimizer, model))))
    assert trained[0] == trained[1]
    assert "('seen', True), ('step', 5)" in trained[0][0]


@pytest.mark.parametrize(("kept", "said"), [([1.0], "keeps a list as 'kept'"), ("text", "keeps a str as 'kept'")])
def test_an_optimizer_that_keeps_something_else_is_refused_when_it_is_saved(
    tiny: ModuleType, tmp_path: Path, kept: Any, said: str
):
    model = tiny.net()
    optimizer = Counting(model.parameters(), kept)
    tiny.advance(model, optimizer, 1)
    with pytest.raises(
        ValueError,
        match=f"optimizer Counting {said}, and a checkpoint holds plain tensors of real numbers and numbers alone",
    ):
        checkpoints(tmp_path).save(model, optimizer, PROGRESS)


def test_an_optimizer_with_a_state_beside_its_parameters_is_refused_when_it_is_saved(tiny: ModuleType, tmp_path: Path):
    model = tiny.net()
    optimizer = Counting(model.parameters())
    optimizer.state["step"] = 1  # type: ignore[index]
    with pytest.raises(ValueError, match="optimizer Counting keeps state that belongs to no parameter"):
        checkpoints(tmp_path).save(model, optimizer, PROGRESS)


def test_an_empty_folder_has_none(tiny: ModuleType, tmp_path: Path):
    assert checkpoints(tmp_path / "nowhere").load(*tiny.trained("sgd", 0)) is None


def test_what_is_written_are_the_values_before_the_update(tiny: ModuleType, tmp_path: Path):
    """However the writer and the next updates meet."""
    for turn in range(20):
        model, optimizer = tiny.trained("sgd", 1)
        before = digest_of(model_state(model), optimizer_state(optimizer, model))
        saved = checkpoints(tmp_path / str(turn))
        saved.save(model, optimizer, PROGRESS)
        saved.detach()
        tiny.advance(model, optimizer, 3)
        saved.close()
        other, others = tiny.trained("sgd", 0)
        checkpoints(tmp_path / str(turn)).load(other, others)
        assert digest_of(model_state(other), optimizer_state(others, other)) == before


def test_a_full_disk_is_one_warning_and_the_one_before_stays(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = tiny.trained("sgd", 1)
    said: list[str] = []
    saved = checkpoints(tmp_path, said)
    saved.save(model, optimizer, progress(1))
    assert saved.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("onehour.training.store.Path.rename", full)
        for iteration in (2, 3):
            saved.save(model, optimizer, progress(iteration))
            assert not saved.wait()
    (warning,) = said
    assert "No space left on device" in warning
    assert str(tmp_path) in warning
    assert "bytes are needed" in warning
    assert checkpoints(tmp_path).load(model, optimizer) == progress(1)
    saved.save(model, optimizer, progress(4))
    assert saved.wait()
    assert checkpoints(tmp_path).load(model, optimizer) == progress(4)


def test_what_a_checkpoint_counts_on_is_written_first_or_there_is_none(tiny: ModuleType, tmp_path: Path):
    model, optimizer = tiny.trained("sgd", 1)
    said: list[str] = []
    saved = checkpoints(tmp_path, said)
    saved.save(model, optimizer, progress(1), first=(tmp_path / "record").touch)
    assert saved.wait()
    assert (tmp_path / "record").exists()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for iteration in (2, 3):
        saved.save(model, optimizer, progress(iteration), first=full)
        assert not saved.wait()
    assert len(said) == 1
    assert checkpoints(tmp_path).load(model, optimizer) == progress(1)


def damaged(tiny: ModuleType, folder: Path) -> None:
    """Two checkpoints, of which the newer one cannot be trusted."""
    saved = checkpoints(folder)
    for iteration in (1, 2):
        model, optimizer = tiny.trained("sgd", iteration)
        saved.save(model, optimizer, progress(iteration))
    saved.close()
    (folder / "checkpoints" / "iteration-000000002" / "progress.json").write_text("{}")
    (folder / "recipe.toml").write_text(Recipe().to_toml())


def test_a_damaged_one_is_named_and_the_one_before_is_used(tiny: ModuleType, tmp_path: Path):
    damaged(tiny, tmp_path)
    said: list[str] = []
    assert checkpoints(tmp_path, said).load(*tiny.trained("sgd", 0)) == progress(1)
    (warning,) = said
    assert "iteration-000000002: progress.json has 2 bytes instead of" in warning
    assert warning.endswith("iteration-000000001 is used in its place")


def test_whoever_reads_a_runs_newest_weights_is_told_too(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damaged(tiny, tmp_path)
    contents = latest_contents(tmp_path)
    assert contents is not None
    assert json.loads(contents[-1]) == progress(1)
    said = capsys.readouterr()
    assert said.err.startswith("onehour: warning: a damaged checkpoint was left out: iteration-000000002: progress")
    assert said.out == ""


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": 2},
        {"iteration": "1"},
        {"totals": [1.0]},
        {"totals": None},
        {"position": 10**30},
        {"position": -1},
        {"skipped": "many"},
        {"evaluated": 0},
        {"build": {"torch": "\x1b[2J"}},
        {"build": []},
    ],
)
def test_progress_that_no_run_wrote_is_refused(tiny: ModuleType, tmp_path: Path, change: dict[str, Any]):
    """Its digest is right: somebody forged it."""
    model, optimizer = tiny.trained("sgd", 1)
    forge(tmp_path, model, optimizer, {FILES[2]: json.dumps(progress(1) | change).encode()})
    assert checkpoints(tmp_path).store.newest() is not None
    with pytest.raises(ValueError, match=r"progress\.json of iteration 1 was not written by a run"):
        checkpoints(tmp_path).load(*tiny.trained("sgd", 0))


def forge(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, changes: dict[str, bytes]) -> None:
    """Checkpoint 1, with other files than a run would write and the digests that they must have."""
    contents = {
        FILES[0]: save(model_state(model)),
        FILES[1]: save(optimizer_state(optimizer, model)),
        FILES[2]: json.dumps(progress(1)).encode(),
    }
    checkpoints(folder).store.write(1, contents | changes)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_is_none(tiny: ModuleType, tmp_path: Path, name: str):
    """And not one to start over from."""
    model, optimizer = tiny.trained("sgd", 1)
    saved = checkpoints(tmp_path)
    saved.store.write(1, {other: b"{}" for other in FILES if other != name})
    with pytest.raises(ValueError, match=f"its manifest has no {name}"):
        checkpoints(tmp_path).load(model, optimizer)


FOREIGN = save({"9.weight/momentum_buffer": torch.zeros(1)})
OURS = save({"group 0/params#": torch.zeros(())})


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", FOREIGN, OURS])
def test_tensors_that_are_none_are_one_message(tiny: ModuleType, tmp_path: Path, name: str, content: bytes):
    model, optimizer = tiny.trained("sgd", 1)
    forge(tmp_path, model, optimizer, {name: content})
    with pytest.raises(ValueError, match="is of another model: ") as raised:
        checkpoints(tmp_path).load(model, optimizer)
    assert len(str(raised.value).splitlines()) == 1


def test_looking_at_old_checkpoints_holds_no_step(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a start, the first save verifies those that this process does not know, beside the training."""
    model, optimizer = tiny.trained("sgd", 1)
    saved = checkpoints(tmp_path)
    for iteration in (1, 2):
        saved.save(model, optimizer, progress(iteration))
    saved.close()
    looking, updated, verified = threading.Event(), threading.Event(), Store.verified

    def slow(self: Store, folder: Path) -> Stored:
        looking.set()
        assert updated.wait(300)
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", slow)
    again = checkpoints(tmp_path)
    again.save(model, optimizer, progress(3))
    assert looking.wait(300)
    again.detach()
    tiny.advance(model, optimizer, 1)
    updated.set()
    assert again.wait()


def test_a_checkpoint_of_another_recipe_is_not_loaded(tiny: ModuleType, tmp_path: Path):
    model, optimizer = tiny.trained("sgd", 1)
    saved = Checkpoints(tmp_path / "a", Recipe(seed=1), Group(), warn=print)
    saved.save(model, optimizer, PROGRESS)
    saved.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="belongs to a run of another recipe"):
        checkpoints(tmp_path / "b").load(model, optimizer)


def test_every_so_many_minutes(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("onehour.training.checkpoint.time.monotonic", lambda: now[0])
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
