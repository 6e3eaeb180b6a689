"""BatchNorm's statistics of the present weights: exact means over workers of n, for evaluations alone."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.dist.group import Group
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream
from onehour.training import statistics
from onehour.training.evaluate import Recalibrated, WeightsEvaluation
from onehour.training.record import Run
from onehour.training.seeds import refuse_joining
from onehour.training.state import digest_of, model_state
from onehour.training.statistics import EvaluationStoppedError, Recalibration

IMAGES, N = 44, 4
"""11 workers: five passes of two and one of one."""


def plain() -> nn.Module:
    """Two layers, so that the second one's statistics depend on what the first one normalised by."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1)
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture
def recalibration(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Recalibration:
    """In two blocks of passes."""
    monkeypatch.setattr(statistics, "CHUNK", 2 * N)
    monkeypatch.setattr(statistics, "BLOCK", 4)
    model = convert_batchnorm(plain().double(), N)
    recipe, data = complete(tiny.recipe(precision="float64"), tiny.data())
    return Recalibration(model, recipe, data, images=IMAGES, group=Group(), loaders=0)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_statistics_are_the_means_over_workers_of_n(recalibration: Recalibration, tiny: ModuleType):
    oracle, train = plain().double().train(), tiny.data()[0]
    samples = SampleStream(samples=len(train), minibatch=IMAGES, seed=seed_for(0, "recalibrate")).indices(0)
    norms: list[Any] = [oracle.get_submodule("1"), oracle.get_submodule("4")]
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    for worker in range(IMAGES // N):
        for norm in norms:
            norm.momentum = 1.0
        oracle(train.tensors[0][samples[worker :: IMAGES // N]].double())
        for norm, total in zip(norms, sums, strict=True):
            total += torch.stack([norm.running_mean, norm.running_var])
    recalibration.apply()
    for number, total in zip((1, 4), sums, strict=True):
        layer: Any = recalibration.model.get_submodule(str(number))
        found, expected = torch.stack([layer.running_mean, layer.running_var]), total / (IMAGES // N)
        assert (found - expected).abs().max() <= 1e-12
        assert (found[1] - 1).abs().min() > 1e-3  # they are others than at the start


def test_the_models_own_buffers_are_put_back_where_they_lie(recalibration: Recalibration):
    model = recalibration.model
    before, places = buffers(model), [buffer.data_ptr() for buffer in model.buffers()]
    with recalibration.applied():
        assert not torch.equal(buffers(model)["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert [buffer.data_ptr() for buffer in model.buffers()] == places


def test_a_stop_is_heard_between_passes_and_leaves_the_model_as_it_was(recalibration: Recalibration):
    before, asked = digest_of(model_state(recalibration.model)), iter([False, False, True])
    with pytest.raises(EvaluationStoppedError), recalibration.applied(lambda: next(asked)):
        pass
    assert digest_of(model_state(recalibration.model)) == before


def test_a_runs_own_bits_are_the_same_with_the_field_and_its_curve_is_not(tiny: ModuleType, tmp_path: Path):
    runs = [
        onehour.train(tiny.recipe(recalibrate=images), out=tmp_path / str(images), device="cpu")
        for images in (None, IMAGES)
    ]
    assert len({run.summary["state_sha256"] for run in runs}) == 1
    assert all(len({run.metrics[epoch]["train_loss"] for run in runs}) == 1 for epoch in (0, 1))
    assert all(len({run.metrics[epoch]["val_loss"] for run in runs}) == 2 for epoch in (0, 1))


def test_dropouts_numbers_are_the_same_whoever_loads(tiny: ModuleType):
    """A data set of one's own seeds every generator for each sample, here where nobody else loads."""
    found = []
    for loaders in (0, 1):
        model = convert_batchnorm(nn.Sequential(nn.Dropout(0.5), plain()), N)
        recipe, data = complete(tiny.recipe(), tiny.listed())
        recalibration = Recalibration(model, recipe, data, images=IMAGES, group=Group(), loaders=loaders)
        recalibration.apply()
        recalibration.close()
        found.append(digest_of(model_state(model)))
    assert found[0] == found[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_statistics_have_the_same_bits_on_any_number_of_processes(world: Callable[[int], Path], processes: int):
    alone, shared = (load_file(world(p) / "recalibrated.safetensors") for p in (1, processes))
    assert digest_of(alone) == digest_of(shared)
    assert (alone["bn1.running_var"] - 1).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recalibrate": 30}, "recalibrate 30 is not a multiple of per_worker 4, .* use 28 or 32"),
        ({"recalibrate": 52, "samples": 48}, "recalibrate is 52 images, and the data has 48"),
        ({"recalibrate": 8, "batchnorm": "keep"}, "recalibrate is for batchnorm ghost"),
        ({"recalibrate": 8, "pitfall": "batchnorm-stats-of-rank-0"}, "recalibrate replaces"),
    ],
)
def test_what_cannot_be_is_refused(tiny: ModuleType, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        tiny.recipe(**changes)


def test_a_model_without_running_statistics_is_refused(tiny: ModuleType, tmp_path: Path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="has no BatchNorm with running statistics"):
        onehour.train(tiny.recipe(recalibrate=8), model=model, out=tmp_path / "run", device="cpu")


def test_a_kept_batchnorm_is_named_as_the_reason(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(batchnorm="keep"))
    with pytest.raises(ValueError, match="is for batchnorm ghost, and this run has batchnorm keep"):
        Recalibration(tiny.net(), recipe, data, images=8, group=Group(), loaders=0)


def test_seeds_are_not_joined(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(recalibrate=8))
    with pytest.raises(ValueError, match="recalibrate takes other images for each seed"):
        refuse_joining(recipe, data, Group())


def test_the_command_prints_an_evaluation_writes_a_file_and_leaves_the_run_alone(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = onehour.train(tiny.recipe(), out=tmp_path / "run", device="cpu")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    names = ["--model", "tinytask:net", "--data", "tinytask:data", "--device", "cpu"]
    to = tmp_path / "weights.pt"
    capsys.readouterr()
    assert main(["recalibrate", str(run.folder), *names, "--json", "--images", "44", "--to", str(to)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == IMAGES
    assert found["before"]["loss"] == run.metrics[-1]["val_loss"] != found["loss"]
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert main(["evaluate", str(to), *names, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == found["loss"]
    assert main(["recalibrate", str(run.folder), *names, "--to", str(to)]) == 2  # it is there already
    assert main(["recalibrate", str(run.folder), *names, "--images", "45"]) == 2
    assert "--images 45 is not a multiple of per_worker 4" in capsys.readouterr().err
    assert main(["recalibrate", str(run.folder), *names]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "BatchNorm's statistics over 48 training images"
    assert said[-1].startswith("before ")


def test_of_a_task_of_ones_own_the_command_prints_its_metric_before_and_after(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before, after = (WeightsEvaluation(None, 16, 0.5, {"distance [m]": value}) for value in (2.5, 1.5))
    found = Recalibrated(48, before, after, {})
    monkeypatch.setattr("onehour.training.evaluate.recalibrated", lambda *_, **__: found)
    (tmp_path / "weights.pt").touch()
    names = ["--model", "tinytask:net", "--data", "tinytask:data"]
    assert main(["recalibrate", str(tmp_path / "weights.pt"), *names]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "distance     1.5 m",
        "loss         0.5000",
        "before       2.5 m",
    ]


def test_a_checkpoint_is_evaluated_as_it_is_and_says_how_its_run_was(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = onehour.train(tiny.recipe(recalibrate=IMAGES, ema=0.9), out=tmp_path / "run", device="cpu")
    names = ["--model", "tinytask:net", "--data", "tinytask:data", "--device", "cpu"]
    for flags, loss in (([], "val_loss"), (["--ema"], "ema_val_loss")):
        assert main(["evaluate", str(run.folder), *names, *flags]) == 0
        command = " ".join(["onehour recalibrate", str(run.folder), *flags])
        assert f"`{command}` evaluates as the run did" in capsys.readouterr().err
        assert main(["recalibrate", str(run.folder), *names, *flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["loss"], found["images"]) == (Run(run.folder).metrics[-1][loss], IMAGES)


def test_files_without_the_field_are_what_they_were():
    assert "recalibrate" not in Recipe().to_toml()
    assert Recipe.from_dict({"recalibrate": "8k"}).recalibrate == 8192


def test_a_runs_own_transform_of_its_images_is_used_once_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images: Any = __import__("images")
    sizes: dict[str, Any] = {"minibatch": 4, "per_worker": 4, "base_minibatch": 4, "epochs": 1, "warmup": "none"}
    own: dict[str, Any] = {"train_transform": "images:noisy", "image_size": 8, "recalibrate": 8}
    data = str(images.tree(tmp_path / "data", train=4))
    options: dict[str, Any] = {"out": tmp_path / "run", "device": "cpu", "loaders": 0}
    run = onehour.train("resnet50", model="images:net", data=data, **sizes, **own, **options)
    command = ["recalibrate", str(run.folder), "--model", "images:net", "--device", "cpu", "--json"]
    assert main(command) == 2
    assert "names code, which would run: train_transform images:noisy" in capsys.readouterr().err
    assert main([*command, "--train-transform", "images:noisy"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == run.metrics[-1]["val_loss"]
    assert main(["evaluate", *command[1:]]) == 0  # which needs no such code
