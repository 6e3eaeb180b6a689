"""The wheel, in an empty environment outside the clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_digits_in_an_empty_environment(tmp_path: Path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "onehour/py.typed",
        "onehour/data/digits.npz",
        "onehour/study/references.json",
        "onehour/cli/__init__.py",
    ):
        assert needed in names
    assert any(name.endswith("digits.LICENSE.txt") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    version = torch.__version__.partition("+")[0]
    run(python, "-m", "pip", "install", "--quiet", f"torch=={version}", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    command = (tmp_path / "venv" / "bin" / "onehour", "train", "digits", "--minibatch", "1k", "--processes", "2")
    said = run(*command, "--epochs", "1", "--warmup", "none", cwd=tmp_path)
    assert "final error" in said
    assert "pip install 'onehour[report]'" in said  # matplotlib is an extra
    assert (tmp_path / "runs" / "digits-1024-s0" / "summary.json").is_file()
