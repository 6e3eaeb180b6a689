"""`make` takes a Python that is there, or says in one line what is missing."""

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
        command, cwd=ROOT, env=environment | {"PATH": str(folder)}, capture_output=True, text=True, timeout=60
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
