"""`onehour.train`: the same from Python, with objects in and objects out."""

import importlib
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import onehour
from onehour.api import train
from onehour.execution import Execution
from onehour.runs import check_start
from onehour.training.record import Run, StoppedError


def test_a_run_comes_back_as_an_object(tiny: ModuleType, tmp_path: Path):
    run = train(tiny.recipe(), out=tmp_path / "run")
    assert isinstance(run, Run)
    assert run.folder == tmp_path / "run"
    assert 0 <= run.final_error <= 100
    assert [record["epoch"] for record in run.metrics] == [1, 2]
    assert run.recipe == tiny.recipe(samples=48, classes=3)


def test_it_learns(tiny: ModuleType, tmp_path: Path):
    run = train(tiny.recipe(epochs=10), out=tmp_path / "run")
    assert run.metrics[-1]["train_loss"] < 0.7 * run.metrics[0]["train_loss"]
    assert run.metrics[-1]["top1_error"] < 35  # chance is 67


def test_a_name_with_changes_and_places(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    common: dict[str, Any] = {"minibatch": 8, "per_worker": 4, "base_minibatch": 8, "epochs": 1, "warmup_epochs": 1}
    run = train("digits", model="tinytask:net", data="tinytask:data", seed=7, classes=3, **common)
    assert run.folder == Path("runs/digits-8-s7")
    assert (run.recipe.model, run.recipe.data, run.recipe.epochs) == ("tinytask:net", "tinytask:data", 1)


def test_places_may_be_text_and_recipes_files(tiny: ModuleType, tmp_path: Path):
    (tmp_path / "my.toml").write_text(tiny.recipe(epochs=1).to_toml())
    run = train(str(tmp_path / "my.toml"), out=str(tmp_path / "run"), trust=True)
    assert run.folder == tmp_path / "run"
    assert run.recipe.name == "tiny"


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("kind", ["object", "class", "function"])
def test_a_model_may_be_an_object_a_class_or_a_function(tiny: ModuleType, tmp_path: Path, kind: str):
    model: Any = {"object": Net(), "class": Net, "function": lambda: Net()}[kind]
    run = train(tiny.recipe(), model=model, out=tmp_path / "run")
    assert run.finished
    assert run.recipe.model.startswith("<")
    assert ("Net" in run.recipe.model) == (kind != "function")


def test_a_model_object_is_trained_in_place_and_evaluates_as_saved(tiny: ModuleType, tmp_path: Path):
    model: Any = Net()
    before = model[0].weight.detach().clone()
    run = train(tiny.recipe(), model=model, out=tmp_path / "run")
    assert not torch.equal(model[0].weight, before)
    images, labels = tiny.data()[1].tensors
    wrong = (model.eval()(images).argmax(1) != labels).sum().item()
    assert run.metrics[-1]["top1_error"] == 100 * wrong / len(labels)
    # And it is anyone's again: other batch sizes, no hooks.
    model.train()
    model(torch.randn(8, 1, 4, 4)).sum().backward()


@pytest.mark.parametrize("kind", ["data", "listed"])
def test_data_may_be_objects(tiny: ModuleType, tmp_path: Path, kind: str):
    named = train(tiny.recipe(), out=tmp_path / "named")
    run = train(tiny.recipe(), data=getattr(tiny, kind)(), out=tmp_path / "run", classes=3, loaders=0)
    assert run.summary["weights_sha256"] == named.summary["weights_sha256"]
    assert run.recipe.data in ("<TensorDataset>", "<Listed>")


def test_divided_data_does_not_depend_on_how_it_is_read_or_where_the_run_is_resumed(tiny: ModuleType, tmp_path: Path):
    recipe = tiny.recipe(validation=0.25, classes=3)
    tensors = tiny.one()
    whole = train(recipe, data=tensors, out=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(recipe, data=tensors, out=tmp_path / "read", stop_asked=iter([False, False, True]).__next__)
    read = train(recipe, data=tiny.Listed(tensors), out=tmp_path / "read", loaders=1)
    assert read.summary["state_sha256"] == whole.summary["state_sha256"]
    assert read.metrics == whole.metrics


def test_dropout_and_augmentation_depend_on_neither_loaders_nor_a_resume(tiny: ModuleType, tmp_path: Path):
    def model() -> nn.Module:
        return nn.Sequential(tiny.net(), nn.Dropout(0.2))

    given: dict[str, Any] = {"data": tuple(map(tiny.Augmented, tiny.data())), "model": model, "classes": 3}
    expected = train(tiny.recipe(), **given, out=tmp_path / "whole", loaders=0)
    calls = iter(range(100))
    with pytest.raises(StoppedError, match="stopped after iteration 5"):
        train(tiny.recipe(), **given, out=tmp_path / "run", loaders=2, stop_asked=lambda: next(calls) == 4)
    torch.manual_seed(99)
    run = train(tiny.recipe(), **given, out=tmp_path / "run", loaders=0)
    assert run.summary["state_sha256"] == expected.summary["state_sha256"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibach": 16}, "a recipe has no 'minibach'; expected minibatch"),
        ({"minibatch": 6}, "minibatch 6 is not a multiple of per_worker 4"),
        ({"device": "tpu"}, "device is 'tpu'; expected auto, cpu or cuda"),
        ({"workers_per_pass": 0}, "workers_per_pass must be above zero"),
        ({"loaders": -1}, "loaders must be above zero"),
        ({"port": 70000}, "port must lie in 0 … 65535"),
        ({"log": "tensorbord"}, "no logger is called 'tensorbord'"),
        ({"data": ("train",)}, r"expected \(train, validation\)"),
        ({"model": "resnet5"}, "no model is called 'resnet5'; expected resnet50"),
    ],
)
def test_bad_input_is_a_value_error(tiny: ModuleType, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        train(tiny.recipe(), out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_processes_cannot_be_asked_for_here_and_are_not_quietly_dropped(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="processes"):
        train(tiny.recipe(), out=tmp_path / "run", processes=2)


def test_check_finds_what_would_stop_a_run_and_writes_nothing(tiny: ModuleType, tmp_path: Path):
    execution = Execution(out=tmp_path / "run")
    assert check_start(tiny.recipe(), execution) is None
    assert list(tmp_path.iterdir()) == []
    train(tiny.recipe(), out=tmp_path / "run")
    finished = check_start(tiny.recipe(), execution)
    assert finished is not None
    assert finished.folder == tmp_path / "run"
    assert check_start(tiny.recipe(), Execution(out=tmp_path / "run", fresh=True)) is None
    with pytest.raises(ValueError, match="3 processes cannot share 2 workers"):
        check_start(tiny.recipe(), Execution(processes=3))


def test_onehour_train_is_a_plain_function_whatever_was_imported_before():
    importlib.import_module("onehour.training.record")
    assert isinstance(onehour.train, FunctionType)


NOTEBOOK = [
    "import onehour\nplan = onehour.plan('digits', minibatch=1024)\nplan['target_lr'].value",
    "run = onehour.train('digits', minibatch=32, epochs=0.01, warmup='none', out='run')\nlen(run.metrics)",
    "run",
]


def test_it_works_in_a_notebook(tmp_path: Path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    results = [output["data"]["text/plain"] for output in outputs if output["output_type"] == "execute_result"]
    assert results[:2] == ["6.4", "1"]
    assert results[2].startswith("Run('run': final error ")
    assert "epoch 0.01/0.01" in str(outputs)
    assert Run(tmp_path / "run").finished


@pytest.mark.parametrize(("seconds", "patience"), [(None, 0.0), (120.0, 2400.0)])
def test_processes_wait_for_each_other_longer_than_the_watchdog_does(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None, patience: float
):
    def joined(device: str, *, patience: float) -> Any:
        raise InterruptedError(patience)

    monkeypatch.setattr("onehour.runs.joined", joined)
    with pytest.raises(InterruptedError) as raised:
        train(tiny.recipe(), out=tmp_path / "run", hang_timeout=seconds)
    assert raised.value.args == (patience,)
