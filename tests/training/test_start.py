"""A run that starts from other weights: what it takes of them, what it says, and what it refuses."""

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onehour.api import train
from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.entry import asked_for
from onehour.models.load import pretrained_weights
from onehour.training.agreement import refusal
from onehour.training.build import build_model
from onehour.training.record import Run, StoppedError
from onehour.training.weights import Start, read_weights, start_from

CPU = torch.device("cpu")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tiny: ModuleType) -> Data:
    return Data.of(*tiny.data())


@pytest.fixture(scope="module")
def state(tiny: ModuleType) -> State:
    """Weights of the tiny network, from elsewhere."""
    return {name: torch.full_like(tensor, 3) for name, tensor in tiny.net().state_dict().items()}


@pytest.fixture(scope="module")
def run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny.recipe(), out=tmp_path_factory.mktemp("initial") / "run")


def started(tiny: ModuleType, data: Data, init: Any, **changes: Any) -> tuple[Start, State, State]:
    """What a model says that it started from, its weights then, and without."""
    recipe = tiny.recipe(classes=3, init=str(init), **changes)
    model = build_model(recipe, data, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return start_from(recipe, data, model, CPU), model.state_dict(), before


@pytest.mark.parametrize("content", ["{}", "state_dict", "model", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_file_is_loaded_whatever_wrapper_was_saved(
    tiny: ModuleType, data: Data, state: State, tmp_path: Path, content: str
):
    file = tmp_path / "a.pt"
    prefix = content if content.endswith(".") else ""
    saved = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({content: saved, "epoch": 3} if content in ("state_dict", "model") else saved, file)
    start, after, _ = started(tiny, data, file)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert start.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(start) == f"starts from {file}, SHA-256 {start.sha256[:16]}…: 8 of 8 tensors"


def test_what_the_two_have_not_in_common_is_said_and_begins_as_without(
    tiny: ModuleType, data: Data, state: State, tmp_path: Path
):
    other = {name: tensor for name, tensor in state.items() if name not in ("0.bias", "1.num_batches_tracked")}
    other |= {"4.weight": torch.ones(10, 16), "4.bias": torch.ones(10), "aux.weight": torch.ones(2)}
    torch.save(other, tmp_path / "a.pt")
    start, after, before = started(tiny, data, tmp_path / "a.pt")
    assert (start.anew, start.classifier, start.left_out) == (["0.bias"], ["4.weight", "4.bias"], ["aux.weight"])
    assert str(start).endswith(
        ": 5 of 8 tensors; 4.weight, 4.bias are newly initialised, for another number of classes; 0.bias are newly"
        " initialised, since it lacks them; not used: aux.weight"
    )
    for name in (*start.anew, *start.classifier):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["0.weight"], state["0.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"0.weight": torch.ones(4, 1, 5, 5)}, r"0\.weight is \(4, 1, 5, 5\) there, and \(4, 1, 3, 3\) here; a class"),
        ({"4.weight": torch.ones(10, 20), "4.bias": torch.ones(10)}, r"4\.weight is \(10, 20\) there"),
        ({"0.weight": torch.ones(8, 1, 3, 3)}, r"0\.weight is \(8, 1, 3, 3\) there"),
        ({"4.weight": torch.ones(10, 16), "4.bias": torch.ones(9)}, r"4\.weight is \(10, 16\) there"),
        ({"1.weight": torch.tensor([1, 1, 1, math.nan])}, r"1\.weight holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tiny: ModuleType, data: Data, state: State, tmp_path: Path, changes: State, said: str
):
    torch.save(state | changes, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        started(tiny, data, tmp_path / "a.pt")


def test_another_models_file_is_refused(tiny: ModuleType, data: Data, tmp_path: Path):
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"of another model: it has conv1\.weight, the model 0\.weight, 0\.bias, 1\.w"):
        started(tiny, data, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"nowhere\.pt does not exist"):
        started(tiny, data, "nowhere.pt")


class Parts(nn.Module):
    """A head behind networks."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleDict(parts), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.stack([part(images) for part in self.parts.values()]).sum(0))


def test_a_backbone_is_found_by_its_names_within_the_model(tiny: ModuleType, data: Data, state: State, tmp_path: Path):
    file = tmp_path / "a.pt"
    torch.save(state | {"fc.weight": torch.ones(10, 16)}, file)
    recipe = tiny.recipe(classes=3, init=str(file))
    model = build_model(recipe, data, CPU, Parts({"body": tiny.net()}))
    start, after = start_from(recipe, data, model, CPU), model.state_dict()
    assert all(torch.equal(after[f"parts.body.{name}"], state[name]) for name in state)
    assert str(start).endswith(
        ": 8 of 10 tensors, as its parts.body; head.weight, head.bias are newly initialised, since it lacks them; not"
        " used: fc.weight"
    )
    twins = build_model(recipe, data, CPU, Parts({"left": tiny.net(), "right": tiny.net()}))
    with pytest.raises(ValueError, match="is of another model: it has "):
        start_from(recipe, data, twins, CPU)


def test_a_run_and_any_of_its_checkpoints_are_sources(tiny: ModuleType, data: Data, run: Run, tmp_path: Path):
    first, last = sorted((run.folder / "checkpoints").iterdir())
    for source, folder in ((run.folder, last), (first, first), (first / "model.safetensors", first)):
        start, after, _ = started(tiny, data, source)
        file = folder / "model.safetensors"
        assert start.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert all(torch.equal(after[name], tensor) for name, tensor in load_file(file).items())
    copy = shutil.copytree(run.folder, tmp_path / "run") / "checkpoints" / first.name
    (copy / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not a valid checkpoint: model\.safetensors has 1 bytes"):
        read_weights(copy)


def test_a_wrapped_model_of_ones_own_keeps_its_names(tiny: ModuleType, tmp_path: Path):
    """Its run's weights all begin with "module." because it has a module of that name."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny.net()

        def forward(self, images: Tensor) -> Tensor:
            return self.module(images)

    run = train(tiny.recipe(epochs=1), model=Wrapped, out=tmp_path / "run")
    assert "module.0.weight" in read_weights(run.folder)


@pytest.fixture
def library(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """timm and torchvision, as far as they are asked; `fails` is what a download does."""
    found = SimpleNamespace(fails=None, asked=[])

    def pretrained(name: str, **options: Any) -> nn.Module:
        found.asked.append((name, options))
        if found.fails:
            raise found.fails
        torch.manual_seed(7)
        return tiny.net()

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=pretrained))
    models = SimpleNamespace(get_model=pretrained)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    return found


@pytest.mark.parametrize(
    ("spec", "options"),
    [("timm:net", {"pretrained": True}), ("torchvision:net", {"weights": "DEFAULT", "progress": False})],
)
def test_a_librarys_pretrained_weights_come_through_the_library(
    tiny: ModuleType, data: Data, library: SimpleNamespace, spec: str, options: dict[str, Any]
):
    start, after, before = started(tiny, data, spec)
    assert library.asked == [("net", options)]
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert (start.source, len(start.sha256), start.anew) == (spec, 64, [])
    assert start.sha256 == started(tiny, data, spec)[0].sha256


def test_a_missing_network_or_package_is_one_message(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    library.fails = OSError("Name or service not known\nmore of it")
    with pytest.raises(ValueError, match=r"^init timm:net cannot be loaded: OSError: Name or service not") as refused:
        pretrained_weights("timm:net")
    assert "\n" not in str(refused.value)
    assert "check the name and the network connection" in str(refused.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"init timm:net needs a package: pip install 'onehour\[vision\]'"):
        pretrained_weights("timm:net")


@pytest.mark.vision
@pytest.mark.parametrize(
    ("spec", "border"),
    [
        ("torchvision:resnet18", "torchvision.models._api.load_state_dict_from_url"),
        ("timm:resnet18", "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_the_libraries_own_loading_is_used(spec: str, border: str, monkeypatch: pytest.MonkeyPatch):
    """The download is replaced, and nothing else."""
    from onehour.models.load import load_model

    own = load_model(spec, channels=3, classes=1000).state_dict()
    weights = {name: torch.full_like(tensor, 2) for name, tensor in own.items()}
    monkeypatch.setattr(border, lambda *_, **__: dict(weights))
    found = pretrained_weights(spec)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_a_run_records_its_start_and_a_resume_does_not_read_it_again(tiny: ModuleType, run: Run, tmp_path: Path):
    file = shutil.copy(max((run.folder / "checkpoints").iterdir()) / "model.safetensors", tmp_path)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    recipe = tiny.recipe(init=file, seed=1)
    whole = train(recipe, out=tmp_path / "whole")
    assert whole.environment["init_sha256"] == digest
    assert whole.metrics[0]["train_loss"] < run.metrics[0]["train_loss"]
    with pytest.raises(StoppedError):
        train(recipe, out=tmp_path / "stopped", stop_asked=iter([False] * 3 + [True]).__next__)
    Path(file).unlink()
    assert train(recipe, out=tmp_path / "stopped").summary["state_sha256"] == whole.summary["state_sha256"]
    first, second = json.loads((tmp_path / "stopped" / "environment.json").read_text())["sessions"]
    assert first["init_sha256"] == digest
    assert "init_sha256" not in second


def test_processes_that_loaded_another_file_do_not_train_together():
    starts = [Start("a.pt", digest * 64, 1, [], [], []) for digest in "ab"]
    said = [{"host": "h", "failed": None, "facts": start.facts} for start in starts]
    assert "the SHA-256 of init a.pt is aaaa" in refusal(said)[0]
    assert refusal([said[0], said[0]]) == ("", "")


def test_a_bad_start_is_one_message_before_anything_is_written(tiny: ModuleType, alone: Path, refused: Any):
    command = ["train", "digits", *tiny.FLAGS, "--out", "run", "--init"]
    assert refused([*command, "nowhere.pt"]) == "init nowhere.pt does not exist"
    assert list(alone.iterdir()) == []


def test_a_start_that_a_file_names_is_no_code(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('init = "timm:resnet50"\nmodel = "resnet8"\n')
    assert asked_for(Recipe.from_toml(tmp_path / "mine.toml"), trust=False).init == "timm:resnet50"
