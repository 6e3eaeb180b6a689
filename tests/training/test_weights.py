"""Weights outside their run: read, evaluated, refused."""

import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.data.digits import digits
from onehour.models.load import load_model
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.evaluate import OpenedWeights
from onehour.training.record import Run
from onehour.training.weights import fit, read_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("weights") / "run"
    return onehour.train("digits", minibatch=1024, epochs=1, warmup="none", out=folder)


def test_evaluate_says_what_the_run_logged(run: Run, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert f"{run.metrics[-1]['top1_error']:.2f} %" in said
    assert len(said.splitlines()) == 3
    assert main(["evaluate", str(run.folder), "--per-class"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 + 2 + 10


def test_evaluate_counts_the_five_likeliest_and_each_class(run: Run, capsys: pytest.CaptureFixture[str]):
    """Against a loop of one sample at a time over the logits of the plain model."""
    plain = load_model("resnet8", channels=1, classes=10).eval()
    plain.load_state_dict(read_weights(run.folder))
    images, labels = digits()[1].tensors
    with torch.no_grad():
        logits = torch.cat([plain(chunk) for chunk in images.split(256)])
    top5, by_class = 0, [[0, 0] for _ in range(10)]
    for row, label in zip(logits, labels.tolist(), strict=True):
        order = row.argsort(descending=True).tolist()
        top5 += label not in order[:5]
        by_class[label][0] += order[0] != label
        by_class[label][1] += 1
    assert main(["evaluate", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top5_errors"] == top5 > 0
    assert found["top5_error"] == 100 * top5 / 4096
    assert [[row["errors"], row["samples"]] for row in found["by_class"]] == by_class
    assert [row["name"] for row in found["by_class"]] == list("0123456789")
    assert sum(errors for errors, _ in by_class) == found["errors"]
    assert found["by_class"][3]["error"] == 100 * by_class[3][0] / by_class[3][1]


def test_five_classes_or_fewer_have_no_top_5_error_and_nan_is_an_error_of_its_class(tmp_path: Path):
    torch.save({"1.weight": torch.full((4, 2), torch.nan), "1.bias": torch.zeros(4)}, tmp_path / "a.pt")
    data = TensorDataset(torch.ones(3, 1, 1, 2), torch.tensor([0, 2, 2]))
    opened = OpenedWeights(tmp_path / "a.pt", recipe=Recipe(model="tinytask:flat"), data=(data, data), device="cpu")
    found = opened.evaluate()
    assert found.top5_errors is None
    assert [(row.errors, row.samples) for row in found.by_class] == [(1, 1), (0, 0), (2, 2)]
    assert found.by_class[1].error is None


def test_divided_data_is_divided_the_same_in_an_evaluation_and_other_data_is_not(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tiny.recipe(data="tinytask:one", validation=0.25, seed=5, epochs=1)
    error = onehour.train(recipe, out=tmp_path / "run").metrics[-1]["top1_error"]
    command = ["evaluate", str(tmp_path / "run"), "--model", "tinytask:net", "--data"]
    capsys.readouterr()
    assert main([*command, "tinytask:one"]) == 0
    assert f"{error:.2f} % ({round(error * 12 / 100)} of 12)" in capsys.readouterr().out
    assert main([*command, "tinytask:data"]) == 0
    assert "of 20)" in capsys.readouterr().out


@pytest.mark.parametrize("samples", [1, 90])
def test_evaluation_takes_data_of_any_size(tmp_path: Path, samples: int):
    model = load_model("resnet8", channels=1, classes=10)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    images = TensorDataset(torch.rand(samples, 1, 8, 8), torch.arange(samples) % 10)
    found = OpenedWeights(
        tmp_path / "a.pt", recipe=Recipe(model="resnet8", classes=10), data=(images, images), device="cpu"
    ).evaluate()
    assert found.samples == samples


@pytest.mark.vision
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_logits_equal_those_of_other_libraries(library: str, tmp_path: Path):
    """An exported ResNet-50 in timm's and torchvision's own, and theirs by name in ours."""
    ours, theirs = (
        load_model("resnet50", channels=3, classes=10),
        load_model(f"{library}:resnet50", channels=3, classes=10),
    )
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
    convert_batchnorm(theirs, per_worker=2)
    assert theirs.train()(images).shape == (2, 10)


class Planted:
    """Would make a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_does_something_is_not_loaded(tmp_path: Path):
    torch.save({"weight": Planted(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds more than tensors"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.safetensors", b"\x08", "cannot be read as weights"),
        ("text.pt", b"hello", "text.pt"),
        ("notes.txt", b"hello", "is not a weights file"),
        ("old.pt", bytes(257) + b"ustar" + bytes(250), "in the oldest of torch's formats"),
    ],
)
def test_what_is_no_weights_file_is_one_message(name: str, content: bytes, said: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_weights(tmp_path / name)


def test_a_file_needs_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert main(["evaluate", str(tmp_path / "a.safetensors")]) == 2
    assert "give --recipe, or --model and --data" in capsys.readouterr().err


def test_a_task_of_ones_own_has_no_classes_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "w.pt").touch()
    assert main(["evaluate", str(tmp_path / "w.pt"), "--recipe", "digits", "--task", "mine:task", "--per-class"]) == 2
    assert "--per-class counts classes, and task mine:task has none" in capsys.readouterr().err


def test_weights_of_another_model_name_what_differs(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"lacks 0\.weight, 0\.bias and it also has other"):
        fit(model, {"other": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"0\.weight is \(3, 9\), expected \(3, 2\)"):
        fit(model, {"0.weight": torch.zeros(3, 9), "0.bias": torch.zeros(3)}, tmp_path / "x.pt")


def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_uses_the_one_before(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    newest = max((copy / "checkpoints").iterdir())
    shutil.copytree(newest, newest.with_name("iteration-000000099"))
    assert main(["evaluate", str(copy)]) == 0
    said = capsys.readouterr()
    assert f"{run.metrics[-1]['top1_error']:.2f} %" in said.out
    assert said.err.startswith(
        "onehour: warning: a damaged checkpoint was left out: iteration-000000099: its manifest is"
    )
    assert said.err.endswith(" that of iteration 8; iteration-000000008 is used in its place\n")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is not a regular file"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({1: torch.ones(1)}, "holds no state dict of tensors"),
        ({"a": 1}, "holds no state dict of tensors: a is a int"),
        ([torch.ones(1)], "holds no state dict of tensors"),
        ({"\x1b[2J": torch.ones(1).expand(2**40)}, r"\\x1b\[2J is not a plain tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is not a plain tensor"),
        ({"a": torch.ones(1, device="meta")}, "a is not a plain tensor"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(state: object, said: str, tmp_path: Path):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=said):
        read_weights(tmp_path / "x.pt")


def test_a_file_is_read_whatever_is_beside_its_folder(tmp_path: Path, tiny: ModuleType):
    (tmp_path / "exports").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    torch.save(tiny.net().state_dict(), tmp_path / "exports" / "net.pt")
    assert read_weights(tmp_path / "exports" / "net.pt").keys() == tiny.net().state_dict().keys()


def test_a_recipe_may_be_given_for_a_checkpoint_and_not_for_a_run(run: Run, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(run.folder), "--recipe", "digits"]) == 2
    assert "is a run, which has a recipe; leave --recipe digits out" in capsys.readouterr().err
    assert main(["evaluate", str(run.folder / "checkpoints" / "iteration-000000008"), "--recipe", "digits"]) == 0
    assert f"{run.metrics[-1]['top1_error']:.2f} %" in capsys.readouterr().out
