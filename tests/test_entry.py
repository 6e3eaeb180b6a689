"""Code by name: what a person types is imported, what only a file names is not, and is shown without being imported."""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.entry import asked_for, resolve
from onehour.sidefile import Read
from onehour.study.spec import SweepSpec
from onehour.training.build import build_optimizer
from onehour.training.record import Run

PAYLOAD = """
open("executed", "w").close()
import torch
from torch.utils.data import TensorDataset
def net(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
def data(): return [TensorDataset(torch.arange(32.0).reshape(8, 1, 2, 2), torch.arange(8) % 2)] * 2
def opt(groups, lr): return torch.optim.SGD(groups, lr=lr)
"""
EVIL: dict[str, Any] = {"model": "dl.evil:net", "data": "dl.evil:data", "optimizer": "dl.evil:opt"}
TYPED = [word for name, value in EVIL.items() for word in (f"--{name}", value)]
SMALL: dict[str, Any] = {"minibatch": 4, "per_worker": 2, "base_minibatch": 4, "base_lr": 0.1, "epochs": 1}
SMALL["warmup"] = "none"


@pytest.fixture
def downloaded(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from elsewhere: a recipe, and code that the recipe names, which no other test has imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("dl", "dl.evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    folder = alone / "dl"
    folder.mkdir()
    (folder / "evil.py").write_text(PAYLOAD)
    (folder / "recipe.toml").write_text(Recipe(name="dl", **SMALL, **EVIL).to_toml())
    return folder


COMMANDS = {
    "train": ["train", "dl/recipe.toml", "--out", "out", "--device", "cpu"],
    "train in processes": ["train", "dl/recipe.toml", "--out", "out", "--device", "cpu", "--processes", "2"],
    "sweep": ["sweep", "dl/recipe.toml", "--out", "out", "--device", "cpu", "--seeds", "1"],
    "sweep without running": ["sweep", "dl/recipe.toml", "--out", "out", "--device", "cpu", "--dry-run"],
    "verify": ["verify", "dl/recipe.toml", "--device", "cpu", "--steps", "1"],
    "evaluate a run": ["evaluate", "dl", "--device", "cpu"],
    "evaluate a file": ["evaluate", "x.safetensors", "--recipe", "dl/recipe.toml", "--device", "cpu"],
    "a process of verify": ["trace-for-verify", "dl"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_files_names_are_shown_and_nothing_is_imported_or_written(
    downloaded: Path, refused: Any, arguments: list[str]
):
    (downloaded / "verify.json").write_text(json.dumps({"steps": 1, "device": "cpu"}))
    before = sorted(downloaded.parent.rglob("*"))
    said = refused(arguments)
    assert said.startswith("dl/recipe.toml names code, which would run: ")
    assert f"dl.evil:net ({downloaded / 'evil.py'})" in said
    assert f"dl.evil:data ({downloaded / 'evil.py'})" in said
    assert "--trust" in said
    assert sorted(downloaded.parent.rglob("*")) == before


@pytest.mark.parametrize("flags", [["--trust"], TYPED], ids=["trusted", "typed"])
def test_what_is_trusted_or_typed_is_imported_and_the_same_command_resumes(
    downloaded: Path, capsys: pytest.CaptureFixture[str], refused: Any, flags: list[str]
):
    command = [*COMMANDS["train"], *flags]
    assert main(command) == 0
    assert (downloaded.parent / "executed").exists()
    assert main(command) == 0
    assert "out is finished" in capsys.readouterr().out
    (downloaded.parent / "executed").unlink()
    assert "model dl.evil:net" in refused(["evaluate", "out", "--device", "cpu"])
    assert main(["evaluate", "out", "--device", "cpu", "--trust"]) == 0  # the optimizer is not needed, nor asked for
    assert main(["evaluate", "out", "--device", "cpu", *TYPED[:4]]) == 0


def test_what_is_typed_but_for_one_name_is_refused_for_that(downloaded: Path, refused: Any):
    said = refused([*COMMANDS["train"], *TYPED[:4]])
    assert "code, which would run: optimizer dl.evil:opt (" in said
    assert "type them (--optimizer dl.evil:opt)" in said
    assert not (downloaded.parent / "executed").exists()


@pytest.mark.usefixtures("downloaded", "forked")
def test_processes_of_a_launcher_inherit_the_decision(capfd: pytest.CaptureFixture[str]):
    assert main([*COMMANDS["train in processes"], "--trust"]) == 0, capfd.readouterr().err
    sweep = [*COMMANDS["sweep"], "--trust", "--jobs", "1", "--minibatch", "4", "--arm", "none", "--out", "sweep"]
    assert main(sweep) == 0, capfd.readouterr().err
    assert main([*COMMANDS["verify"], *TYPED[:4], "--processes", "1,2"]) == 2  # of the optimizer, nobody has spoken
    assert "optimizer dl.evil:opt" in capfd.readouterr().err


@pytest.mark.usefixtures("downloaded")
def test_a_plan_imports_nothing_and_needs_no_trust(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "dl/recipe.toml"]) == 0
    assert "minibatch  " in capsys.readouterr().out
    assert not Path("executed").exists()


def test_from_python_names_that_are_given_count_and_a_files_do_not(downloaded: Path):
    for recipe in ("dl/recipe.toml", onehour.recipe("dl/recipe.toml"), Run(downloaded).recipe.replace(seed=1)):
        with pytest.raises(ValueError, match="trust=True from Python"):
            onehour.train(recipe, out="out")
        with pytest.raises(ValueError, match="trust=True from Python"):
            onehour.sweep(recipe, out="out")
    recipe = pickle.loads(pickle.dumps(Run(downloaded).recipe))
    for use in (lambda: complete(recipe), lambda: build_optimizer(recipe, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=r"dl/recipe\.toml names code"):
            use()
    assert not Path("executed").exists()
    run = onehour.train("dl/recipe.toml", out="out", device="cpu", **EVIL)
    assert onehour.train("dl/recipe.toml", out="out", device="cpu", trust=True).summary == run.summary
    assert onehour.train(Recipe(name="dl", **SMALL, **EVIL), out="out", device="cpu").summary == run.summary


def test_a_sweeps_file_is_a_file(downloaded: Path):
    spec = SweepSpec(
        recipe=Recipe(**SMALL, model="dl.evil:net", data="dl.evil:data"),
        minibatches=(4,),
        seeds=(0,),
        arms=((("optimizer", "dl.evil:opt"),),),
        arms_at=(8,),
    )
    spec.write(downloaded)
    assert SweepSpec.read(downloaded) == spec
    for cell in SweepSpec.read(downloaded).cells():
        assert isinstance(cell.recipe.model, Read)
        assert isinstance(cell.recipe.optimizer, Read)
        with pytest.raises(ValueError, match=r"dl/sweep\.toml names code"):
            asked_for(cell.recipe, trust=False)


@pytest.mark.parametrize(
    "change", [{"model": "timm:resnet18"}, {"model": "torchvision:resnet18"}, {"model": "resnet8", "data": "digits:1"}]
)
def test_what_is_no_code_of_ones_own_needs_no_trust(tmp_path: Path, change: dict[str, Any]):
    (tmp_path / "recipe.toml").write_text(onehour.recipe("digits", **change).to_toml())
    assert asked_for(Recipe.from_toml(tmp_path / "recipe.toml"), trust=False) == onehour.recipe("digits", **change)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"data": "timm:create_model"}, "timm"),
        ({"optimizer": "torch.optim:SGD"}, "torch/optim/__init__.py"),
        ({"data": "os:abort"}, "os.py"),
        ({"train_transform": "os:abort"}, "type them (--train-transform os:abort)"),
        ({"data": "builtins:input"}, "built-in"),
        ({"data": "no_such_module.of.mine:data"}, "no module no_such_module is found"),
        ({"model": "package.inner:net"}, "package/inner/__init__.py"),
        ({"model": "package.other.deep:net"}, "package"),
    ],
)
def test_what_would_be_imported_is_named_and_no_package_above_it_is(alone: Path, change: dict[str, Any], where: str):
    (alone / "package" / "inner").mkdir(parents=True)
    for folder in (alone / "package", alone / "package" / "inner"):
        (folder / "__init__.py").write_text(PAYLOAD)
    (alone / "recipe.toml").write_text(onehour.recipe("digits", **change).to_toml())
    with pytest.raises(ValueError, match="names code, which would run") as refused:
        asked_for(Recipe.from_toml(alone / "recipe.toml"), trust=False)
    assert where in str(refused.value)
    assert not (alone / "executed").exists()


def test_a_name_that_was_read_is_not_resolved(tmp_path: Path):
    with pytest.raises(ValueError, match="math:sqrt"):
        resolve("model", Read("math:sqrt", tmp_path / "recipe.toml"))


def test_no_process_takes_a_module_of_the_current_folder_for_pythons_own(alone: Path):
    for name in ("torch", "json", "multiprocessing", "argparse", "numpy"):
        (alone / f"{name}.py").write_text("open('executed', 'w').close()")
    small = ["digits", "--minibatch", "32", "--epochs", "0.01", "--warmup", "none", "--device", "cpu"]
    assert main(["train", *small, "--processes", "2", "--out", "run"]) == 0
    assert main(["sweep", *small, "--out", "sweep", "--seeds", "1", "--arm", "none", "--jobs", "1"]) == 0
    assert not (alone / "executed").exists()
    assert "PYTHONSAFEPATH" not in os.environ


MODULES = {
    "parses": ("import argparse\np = argparse.ArgumentParser()\np.add_argument('--x')\np.parse_args()", "parses.py:4"),
    "leaves": ("import sys\nsys.exit('bye')", "SystemExit: bye"),
    "odd": ("class Odd(BaseException): pass\nraise Odd('strange')", "Odd: strange"),
    "called": ("import sys\ndef net(): sys.exit(3)", "code that was called exits Python: SystemExit: 3"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_leaves_python_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, name: str
):
    source, said = MODULES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["onehour", "train", "--odd"])
    Path(f"of_test_entry_{name}.py").write_text(source)
    assert said in refused(["train", "digits", "--model", f"of_test_entry_{name}:net", "--out", "run"])
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("can't start new thread"), "no more threads or processes"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "memory ran out while Python imported"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_runs_out_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, said: str
):
    def fails(*arguments: object, **options: object) -> int:
        raise error

    monkeypatch.setattr("onehour.cli.plan.plan", fails)
    assert main(["plan", "digits"]) == (75 if isinstance(error, KeyboardInterrupt) else 2)
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
