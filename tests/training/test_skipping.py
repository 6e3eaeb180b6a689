"""Runs whose data has bad images: counted over all processes, named once, ended when they are too many, and resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import onehour
from onehour.cli import main
from onehour.data.images import Images, image_folder, open_sides
from onehour.data.loader import Skipped
from onehour.data.pack import pack
from onehour.dist.group import Group
from onehour.training.feeds import Skipping
from onehour.training.record import BAD_IMAGES, Run

PER_CLASS = 350
"""1,050 images to train on, of which one may be bad."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = __import__("images")
    makes = [images.saved(images.picture(seed, (40, 36)), "JPEG") for seed in range(20)]
    return images.tree(
        tmp_path_factory.mktemp("skipping") / "data", train=PER_CLASS, val=4, make=lambda i: makes[i % 20]
    )


@pytest.fixture
def damaged(tree: Path) -> Iterator[Path]:
    """One bad image; the test may add more, and all are whole again after it."""
    files = [tree / "train" / "dog" / f"{number:04d}.JPEG" for number in (3, 100, 200)]
    whole = files[0].read_bytes(), files[1].read_bytes(), files[2].read_bytes()
    files[0].write_bytes(b"damaged")
    yield tree
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)


def line(data: Path, out: Path, *options: str) -> list[str]:
    sizes = ["--minibatch", "50", "--per-worker", "25", "--base-minibatch", "50", "--image-size", "16"]
    where = ["--loaders", "1", "--device", "cpu", "--threads", "1", "--out", str(out)]
    model = ["--model", "images:net", "--data", str(data), "--epochs", "2", "--base-lr", "0.01", "--warmup", "none"]
    return ["train", "resnet50", *model, *sizes, *where, "--bad-images", "skip", *options]


def full(*_: object, **_options: object) -> None:
    raise OSError(28, "No space left on device")


def named(run: Run) -> list[str]:
    lines = (run.folder / BAD_IMAGES).read_text("utf-8").splitlines()
    return [json.loads(text)["image"] for text in lines]


def test_a_bad_image_is_counted_each_epoch_and_named_once(damaged: Path, tmp_path: Path):
    assert main(line(damaged, tmp_path / "run")) == 0
    run = Run(tmp_path / "run")
    assert [record["skipped"] for record in run.metrics] == [1, 2]
    assert run.summary["skipped"] == 2
    assert named(run) == [str(damaged / "train" / "dog" / "0003.JPEG")]
    assert run.recipe.bad_images == "skip"


@pytest.mark.usefixtures("environ", "forked")
def test_two_processes_count_the_same(damaged: Path, tmp_path: Path):
    runs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = line(damaged, out, "--processes", str(processes), "--epochs", "1", "--reduce", "canonical")
        if processes == 1:
            assert main(arguments) == 0
        else:
            command = [sys.executable, "-m", "onehour", *arguments]
            subprocess.run(command, check=True, env=os.environ, timeout=200, stdout=subprocess.DEVNULL)
        runs.append(Run(out))
    assert [run.summary["skipped"] for run in runs] == [1, 1]
    assert named(runs[0]) == named(runs[1])
    assert runs[0].metrics == runs[1].metrics


def test_too_many_end_the_run_which_goes_on_once_they_are_restored(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    others = [damaged / "train" / "dog" / f"{number:04d}.JPEG" for number in (100, 200)]
    whole = [file.read_bytes() for file in others]
    for file in others:
        file.write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr("onehour.training.checkpoint.Store.write", full)
        assert main(line(damaged, tmp_path / "full")) == 2
    said = capsys.readouterr().err
    assert "has stopped there and could not save it; the same command goes on from the checkpoint before\n" in said
    assert main(line(damaged, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "training images could not be read up to iteration" in said
    assert "more than 0.1 % of an epoch" in said
    assert said.count("\n") == 1
    run = Run(tmp_path / "run")
    assert 2 <= len(named(run)) <= 3
    assert list((run.folder / "checkpoints").glob("iteration-*"))
    for file, content in zip(others, whole, strict=True):
        file.write_bytes(content)
    assert main(line(damaged, tmp_path / "run")) == 0
    assert run.finished
    assert run.summary["skipped"] >= 3


def test_a_packs_smaller_images_are_in_the_recipe_and_another_folder_is_needed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pack(open_sides(tree, sizes=True), tmp_path / "pack", resize=20)
    assert main(line(tmp_path / "pack", tmp_path / "run", "--epochs", "1")) == 0
    assert Run(tmp_path / "run").recipe.resized == 20
    assert main(line(tree, tmp_path / "run", "--epochs", "1")) == 2
    assert "resized: 20 → None" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--bad-images", "skip"), ("--exif-orientation",), ("--pixel-cap", "1000")])
def test_other_data_is_not_asked_for_what_images_have(
    flag: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "digits", *flag, "--out", str(tmp_path / "run")]) == 2
    assert "are for images in a folder, an index or a pack; leave them out" in capsys.readouterr().err


def test_the_pixel_cap_is_the_recipes(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(line(tree, tmp_path / "run", "--pixel-cap", "1000")) == 2
    assert "has 40×36 pixels, more than the cap of 1,000" in capsys.readouterr().err
    assert main(line(tree, tmp_path / "run", "--pixel-cap", "999999999")) == 2
    assert "pixel_cap is 999999999; expected at most 178956970" in capsys.readouterr().err


class Dying(Images):
    """A process that loads image 500 is killed, as the kernel does when memory runs out."""

    once: Path | None = None
    """A file that keeps it from happening again."""

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        if index == 500 and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().keyed(index, key)


def trained(tree: Path, out: Path, once: Path | None) -> Run:
    train, validation = image_folder(tree)
    data = Dying(train.source, augmented=True)
    data.once = once
    sizes: dict[str, Any] = {"minibatch": 50, "per_worker": 25, "base_minibatch": 50, "image_size": 16, "epochs": 1}
    rates: dict[str, Any] = {"base_lr": 0.01, "warmup": "none"}
    model = __import__("images").net
    return onehour.train(
        "resnet50", data=(data, validation), model=model, out=out, loaders=2, device="cpu", threads=1, **sizes, **rates
    )


def test_a_killed_loader_changes_nothing_of_a_run(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    there = tmp_path / "there"
    there.touch()
    runs = [trained(tree, tmp_path / "undisturbed", there), trained(tree, tmp_path / "killed", tmp_path / "once")]
    said = capfd.readouterr()
    assert "was killed (SIGKILL) at sample 500" in said.err + said.out
    assert (tmp_path / "once").exists()
    digests = [run.summary["state_sha256"] for run in runs]
    assert digests[0] == digests[1]
    assert runs[0].metrics == runs[1].metrics


def test_an_image_that_kills_every_loader_ends_a_run_with_one_message(tree: Path, tmp_path: Path):
    expected = r"^3 processes that load data ended at the same samples, .*SIGKILL\) at sample 500 \(.*\.JPEG\); look"
    with pytest.raises(ValueError, match=expected) as raised:
        trained(tree, tmp_path / "run", None)
    assert "\n" not in str(raised.value)


def test_names_that_were_refused_are_written_though_no_other_image_is_bad(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    feed = SimpleNamespace(skipped=Skipped(), dataset=image_folder(tree)[0])
    recipe = onehour.Recipe(samples=1050)
    skipping = Skipping(recipe, feed, Group(), folder=tmp_path, inside=tmp_path)  # type: ignore[arg-type]
    skipping.add(0, torch.tensor(1.0))
    feed.skipped.add([3])

    with monkeypatch.context() as patched:
        patched.setattr("onehour.training.feeds.append_whole", full)
        assert skipping.count() == 1
    assert not (tmp_path / BAD_IMAGES).exists()
    assert skipping.count() == 1
    assert json.loads((tmp_path / BAD_IMAGES).read_text("utf-8"))["index"] == 3


def test_more_than_a_thousandth_of_an_epoch_since_this_process_began_ask_for_a_stop(tmp_path: Path):
    """Of 2,000 images in minibatches of 1,000: two an epoch."""
    recipe = onehour.Recipe(samples=2000, minibatch=1000, per_worker=100, base_minibatch=1000)
    feed = SimpleNamespace(skipped=Skipped(), dataset=[])
    skipping = Skipping(recipe, feed, Group(), folder=tmp_path, inside=tmp_path)  # type: ignore[arg-type]
    skipping.skipped.fill_(7)  # as a checkpoint says
    asked = [bool(skipping.add(iteration, torch.tensor(count))) for iteration, count in ((2, 2.0), (3, 0.0), (4, 2.0))]
    assert asked == [False, False, False]
    skipping.refuse_too_many(5, "saved")
    assert [bool(skipping.add(iteration, torch.tensor(1.0))) for iteration in (5, 6)] == [True, True]
    with pytest.raises(ValueError, match=r"^13 training images could not be read up to iteration 7, more than 0.1 %"):
        skipping.refuse_too_many(7, "saved")
