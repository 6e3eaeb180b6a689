"""A run's weights and its network in the files that others read, each read back before it gets its name."""

import errno
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tinytask
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import onehour
from onehour.cli import main
from onehour.training import weights
from onehour.training.evaluate import OpenedWeights
from onehour.training.record import Run
from onehour.training.weights import TOLERANCE, export_program, read_weights, write_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: ModuleType) -> Run:
    return onehour.train(tiny.recipe(), out=tmp_path_factory.mktemp("export") / "run", device="cpu")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def logits(run: Run, images: Tensor) -> Tensor:
    """Of the user's own network, as the module makes it."""
    plain = tinytask.net().eval()
    plain.load_state_dict(read_weights(run.folder))
    with torch.no_grad():
        return plain(images)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_dict_loads_in_the_users_plain_network(run: Run, suffix: str, tmp_path: Path, tiny: ModuleType):
    path = write_weights(read_weights(run.folder), tmp_path / f"model.{suffix}")
    plain = tinytask.net()
    assert type(plain.get_submodule("1")) is nn.BatchNorm2d
    plain.load_state_dict(load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True))
    images, labels = tinytask.data()[1].tensors
    with torch.no_grad():
        loss = F.cross_entropy(plain.eval()(images).double(), labels).item()
    assert abs(loss - run.metrics[-1]["val_loss"]) <= 1e-12
    result = OpenedWeights(path, recipe=tiny.recipe(classes=3), device="cpu").evaluate()
    assert (result.error, result.loss) == (run.metrics[-1]["top1_error"], run.metrics[-1]["val_loss"])


def test_a_pt2_file_is_the_network_for_batches_of_any_size(run: Run, images: Tensor, tmp_path: Path):
    to = tmp_path / "net.pt2"
    shape, difference = export_program(run.folder, to, recipe=tinytask.recipe(classes=3))
    assert shape == (1, 4, 4)
    program = torch.export.load(to).module()
    for batch in (images, images[:1]):
        assert (program(batch) - logits(run, batch)).abs().max() <= TOLERANCE
    assert difference <= TOLERANCE


def test_an_onnx_file_is_the_network_for_batches_of_any_size(
    run: Run, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its packages are part of the development environment: without them this fails."""
    to = tmp_path / "net.onnx"
    capsys.readouterr()
    assert main(["export", str(run.folder), "--to", str(to), "--trust"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"wrote {to}: float32 images (N, 1, 4, 4) as the network takes them, to logits"
    assert said.err == ""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(to), providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (found,) = session.run(None, {"images": batch.numpy()})
        assert (torch.from_numpy(found) - logits(run, batch)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("package", weights.ONNX)
def test_a_missing_package_is_one_message(
    run: Run, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in weights.ONNX:
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    capsys.readouterr()
    assert main(["export", str(run.folder), "--to", str(tmp_path / "x.onnx"), "--trust"]) == 2
    said = capsys.readouterr().err
    assert said == f"onehour: {tmp_path / 'x.onnx'} needs the package {package}: pip install 'onehour[onnx]'\n"
    assert list(tmp_path.iterdir()) == []


class Asking(nn.Module):
    """Looks at its images' values, which no program can."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] * (2 if images.sum() > 0 else 1)


class Growing(nn.Module):
    """Gives other logits for the same images each time."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.flatten(1)[:, :3] * self.calls


class Writing(nn.Module):
    """Into what it is given."""

    def forward(self, images: Tensor) -> Tensor:
        return images.sub_(1).flatten(1)[:, :3] * 2


def test_a_network_that_writes_into_its_images_is_compared_with_the_same_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.save({"unused": torch.zeros(1)}, tmp_path / "weights.pt")
    monkeypatch.setattr(weights, "load_model", lambda *_, **__: Writing())
    monkeypatch.setattr(weights, "fit", lambda *_: None)
    recipe = onehour.Recipe(data="tinytask:data", model="tinytask:net")
    assert export_program(tmp_path / "weights.pt", tmp_path / "x.pt2", recipe=recipe)[1] <= TOLERANCE


@pytest.mark.parametrize(
    ("model", "said"),
    [(Asking, "torch cannot export this network for batches of any size"), (Growing, "its logits differ")],
)
def test_a_network_that_is_no_program_is_one_message_and_the_old_file_stays(
    model: type[nn.Module], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.save({"unused": torch.zeros(1)}, tmp_path / "weights.pt")
    monkeypatch.setattr(weights, "load_model", lambda *_, **__: model())
    monkeypatch.setattr(weights, "fit", lambda *_: None)
    (tmp_path / "x.pt2").write_bytes(b"mine")
    recipe = onehour.Recipe(data="tinytask:data", model="tinytask:net")
    with pytest.raises(ValueError, match=said):
        export_program(tmp_path / "weights.pt", tmp_path / "x.pt2", recipe=recipe)
    assert (tmp_path / "x.pt2").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_holds_other_numbers_when_it_is_opened_again_does_not_get_its_name(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.save({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "in.pt")
    given = read_weights(tmp_path / "in.pt")
    to = write_weights(given, tmp_path / f"nan.{suffix}")  # equal bits, though NaN is no number
    for owner, name in ((weights, "load_safetensors"), (torch, "load")):
        monkeypatch.setattr(owner, name, lambda *_, **__: {"a": torch.tensor([1.0, 2.0])})
    with pytest.raises(ValueError, match="read back, it holds other numbers"):
        write_weights(given, tmp_path / f"out.{suffix}")
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", to.name}


def test_nothing_is_overwritten_unless_forced_and_the_formats_are_known(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "there.pt").write_bytes(b"mine")
    assert main(["export", str(run.folder), "--to", str(tmp_path / "there.pt")]) == 2
    assert (tmp_path / "there.pt").read_bytes() == b"mine"
    assert "there.pt exists; remove it first, choose another name, or give --force" in capsys.readouterr().err
    assert main(["export", str(run.folder), "--to", str(tmp_path / "there.pt"), "--force"]) == 0
    assert len(torch.load(tmp_path / "there.pt", weights_only=True)) == len(read_weights(run.folder))
    assert main(["export", str(run.folder), "--to", str(tmp_path / "model.h5")]) == 2
    assert "must end in .safetensors, .pt, .pth, .pt2 or .onnx" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tied_and_transposed_weights_are_exported_as_they_are(suffix: str, tmp_path: Path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save({"a": weight, "b": weight, "c": weight.T}, tmp_path / "in.pt")
    found = read_weights(write_weights(read_weights(tmp_path / "in.pt"), tmp_path / "new" / f"out.{suffix}"))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a": weight.tolist(),
        "b": weight.tolist(),
        "c": weight.T.tolist(),
    }


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_full_disk_leaves_nothing_and_is_one_message(
    run: Run, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main(["export", str(run.folder), "--to", str(tmp_path / f"x.{suffix}")]) == 2
    said = capsys.readouterr().err
    assert f"x.{suffix} cannot be written: No space left on device" in said
    assert "bytes are needed" in said
    assert list(tmp_path.iterdir()) == []


def test_weights_are_written_behind_a_link(tmp_path: Path):
    (tmp_path / "net.pt").symlink_to("disk/net.pt")
    write_weights({"a": torch.ones(2)}, tmp_path / "net.pt")
    assert (tmp_path / "net.pt").is_symlink()
    assert torch.load(tmp_path / "disk" / "net.pt")["a"].tolist() == [1, 1]
