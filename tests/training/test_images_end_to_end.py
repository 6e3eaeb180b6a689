"""A folder of images from the command line: two processes, ended in the middle, resumed, evaluated, exported."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onehour.cli import main
from onehour.training.record import Run

CLASSES = ("a cat", "<dog>", "é")
MODES = (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen images of odd sizes and modes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for side, count in (("train", 16), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / side / name).mkdir(parents=True)
            for number in range(count):
                size = tuple(int(s) for s in random.integers(20, 90, 2))
                image = Image.fromarray(random.integers(0, 80, (*size, 3), dtype=np.uint8) + np.uint8(60 * label))
                mode, suffix = MODES[number % 5]
                buffer = io.BytesIO()
                image.convert(mode).save(buffer, suffix)
                (root / side / name / f"{number}.{suffix}").write_bytes(buffer.getvalue())
    return root


def command(data: Path, out: Path) -> list[str]:
    sizes = ["--minibatch", "16", "--per-worker", "8", "--base-minibatch", "16", "--base-lr", "0.01", "--epochs", "2"]
    where = ["--processes", "2", "--loaders", "1", "--device", "cpu", "--threads", "1", "--save-every", "1"]
    what = ["--model", "resnet18", "--data", str(data), "--warmup", "none", "--out", str(out)]
    return ["train", "resnet50", *what, *sizes, *where]


@pytest.mark.slow
def test_a_folder_trains_on_two_processes_and_survives_a_kill(folder: Path, tmp_path: Path):
    assert main(command(folder, tmp_path / "undisturbed")) == 0
    disturbed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "onehour", *command(folder, disturbed)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(disturbed.glob("checkpoints/iteration-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(disturbed)], check=False)  # what the launcher's death left running
    assert not Run(disturbed).finished
    assert main(command(folder, disturbed)) == 0
    runs = [Run(tmp_path / "undisturbed"), Run(disturbed)]
    assert runs[0].summary["state_sha256"] == runs[1].summary["state_sha256"]
    assert runs[0].metrics == runs[1].metrics


def test_a_folder_trains_in_one_process(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = [*command(folder, tmp_path / "run")]
    line[line.index("--processes") + 1] = "1"
    line[line.index("--epochs") + 1] = "1"
    line[line.index("--model") + 1] = "resnet8"
    line += ["--train-transform", "images:noisy", "--image-size", "8", "--mixup", "0.2", "--label-smoothing", "0.1"]
    assert main(line) == 0
    run = Run(tmp_path / "run")
    assert run.recipe.samples == 48
    assert run.recipe.classes == 3
    assert (run.recipe.train_transform, run.recipe.image_size) == ("images:noisy", 8)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    assert f"{run.metrics[-1]['top1_error']:.2f} %" in capsys.readouterr().out
