"""`make` takes a Python that is there, or says in one line what is missing; and what it downloads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD, NEW = "exit 1", "exit 0"
"""What a Python of the name does when it is asked whether it is recent enough and has its venv."""


def venv_commands(folder: Path, pythons: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make setup` would run in a checkout without a .venv where these Pythons alone are on PATH."""
    make = shutil.which("make")
    assert make
    for name, body in pythons.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    command = [make, "--dry-run", "--always-make", "--no-print-directory", "setup", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"PATH": str(folder)}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": NEW, "python3.12": NEW, "python3": NEW}, "python3.11"),
        ({"python3.12": NEW, "python3.13": NEW, "python3": OLD}, "python3.12"),
        ({"python3.13": NEW, "python3": NEW}, "python3.13"),
        ({"python3": NEW}, "python3"),
        ({"python3.11": OLD, "python3": NEW}, "python3"),  # Debian's without its venv
        ({"python3": f'exec {sys.executable} "$@"'}, "python3"),  # this one, asked in earnest
    ],
)
def test_the_first_python_that_is_recent_enough_makes_the_environment(tmp_path: Path, pythons: dict[str, str], taken):
    ran = venv_commands(tmp_path, pythons)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == f"{taken} -m venv .venv"


@pytest.mark.parametrize("pythons", [{}, {"python3.11": OLD, "python3": OLD}], ids=["none", "old"])
def test_no_python_is_one_line_and_exit_code_2(tmp_path: Path, pythons: dict[str, str]):
    ran = venv_commands(tmp_path, pythons)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert len(ran.stderr.splitlines()) == 1
    assert (
        "needs Python 3.11 or later with its venv: neither python3.11, python3.12, python3.13 nor python3" in ran.stderr
    )


def test_a_python_that_is_given_is_taken(tmp_path: Path):
    ran = venv_commands(tmp_path, {"python3.11": NEW}, "PYTHON=/there/python3.14")
    assert ran.stdout.splitlines()[0] == "/there/python3.14 -m venv .venv"


STANDS_IN = """#!/bin/sh
case "$*" in
  *ensurepip*) ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *urlopen*) exit "$UNREACHED" ;;
  *) echo "$*" >> installed ;;
esac
"""
"""For a Python: makes environments of itself, and notes what they are asked to install."""


@pytest.mark.parametrize(("gpu", "reached"), [(False, True), (False, False), (True, True)])
def test_torchs_build_for_the_cpu_is_asked_for_where_it_can_be_had_and_is_wanted(
    tmp_path: Path, gpu: bool, reached: bool
):
    for name, text in {"python3.11": STANDS_IN, "nvidia-smi": f"#!/bin/sh\nexit {int(not gpu)}\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "UNREACHED": str(int(not reached))}
    ran = subprocess.run(["make", "setup"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    from_it = reached and not gpu
    torch, rest = (tmp_path / "installed").read_text().splitlines()
    assert ("--extra-index-url https://download.pytorch.org/whl/cpu" in torch) == from_it
    assert torch.endswith("--constraint constraints.txt torch==2.13.0")
    assert rest.endswith("--editable .[report,onnx,tensorboard,dev]")
    size = "200 MB" if from_it else "3 GB"
    assert [line for line in ran.stdout.splitlines() if "installs torch==2.13.0 from" in line and size in line]
