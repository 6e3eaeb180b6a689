"""`onehour data index|pack|doctor` as a person calls them: one line, one exit code, and Ctrl-C at any time."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onehour.cli.data import add_data
from onehour.data.images import image_folder
from onehour.data.index import INDEX

pytestmark = pytest.mark.usefixtures("forked")

MAIN = """
import argparse, sys
from onehour.cli.data import add_data
parser = argparse.ArgumentParser()
add_data(parser.add_subparsers())
options = parser.parse_args(sys.argv[1:])
sys.exit(options.command(options, sys.argv[1:]))
"""


def call(*arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    add_data(parser.add_subparsers())
    options = parser.parse_args(["data", *map(str, arguments)])
    return options.command(options, [])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return __import__("images").tree(tmp_path / "data")


def test_index_pack_and_doctor_say_what_they_did(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert call("index", tree, "--digests") == 0
    assert call("pack", tree, tmp_path / "out", "--shard-mib", 1) == 0
    assert call("pack", tree / INDEX, tmp_path / "small", "--resize", 10, "--jobs", 2) == 0
    assert call("doctor", tmp_path / "out") == 0
    assert call("index", tree, "--out", tmp_path / "mine.index", "--jobs", 1) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tree / INDEX}",
        f"wrote {tmp_path / 'out'}: 30 images",
        f"wrote {tmp_path / 'small'}: 30 images, shorter side 10 at most",
        f"{tmp_path / 'out'}: nothing found",
        f"wrote {tmp_path / 'mine.index'}",
    ]
    assert image_folder(tmp_path / "small")[0].facts["resized"] == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("index", "{}/nowhere"), "there is no folder"),
        (("index", "{}/data", "--out", "list.txt"), "expected a name that ends in .index, by which --data knows it"),
        (("index", "{}/data", "--jobs", "0"), "--jobs must be above zero, got 0"),
        (("pack", "{}/data", "{}/out", "--resize", "0"), "--resize must be above zero, got 0"),
        (("pack", "{}/data", "{}/out", "--shard-mib", "-1"), "--shard-mib must be above zero, got -1"),
        (("pack", "{}/nowhere", "{}/out"), "there is no folder"),
        (("pack", "{}/data", "{}/out", "--pixel-cap", "9"), "--pixel-cap 9 is for --resize, without which nothing is"),
        (("pack", "{}/data", "{}/out", "--resize", "9", "--pixel-cap", "100"), "more than the cap of 100; remove it"),
        (("doctor", "{}/data", "--pixel-cap", "200000000"), "--pixel-cap is 200000000; expected at most 178956970"),
        (("doctor", "{}/data", "--pixel-cap", "0"), "--pixel-cap must be above zero, got 0"),
    ],
)
def test_bad_input_is_one_message(tree: Path, tmp_path: Path, arguments: tuple[str, ...], said: str):
    with pytest.raises(ValueError, match=said) as raised:
        call(*(argument.format(tmp_path) for argument in arguments))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "command", [("pack", "{tree}", "{out}", "--shard-mib", "1"), ("doctor", "{tree}"), ("index", "{tree}", "--digests")]
)
def test_ctrl_c_is_one_line_and_the_same_command_ends_what_it_began(tmp_path: Path, command: tuple[str, ...]):
    images: Any = __import__("images")
    content = images.saved(images.picture(1, (900, 700)), "PNG")
    tree = images.tree(tmp_path / "data", train=12, make=lambda number: content)
    arguments = [part.format(tree=tree, out=tmp_path / "out") for part in command]
    line = [sys.executable, "-c", MAIN, "data", *arguments, "--jobs", "2"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait(lambda: len(_group(process.pid)) > 2 or process.poll() is not None)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=300)
    if process.returncode == 75:
        assert out == ""
        assert error == "onehour: stopped; the same command goes on, or begins again\n"
    else:  # it was faster
        assert process.returncode in (0, -signal.SIGINT), error
    assert "Traceback" not in error or process.returncode == -signal.SIGINT
    _wait(lambda: not _group(process.pid))
    assert call(*arguments, "--jobs", 2) == 0
    leftovers = [path for path in tmp_path.rglob("*") if path.name.endswith(".writing")]
    assert not leftovers


def _group(leader: int) -> list[int]:
    """Processes of a group."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if (
                    os.getpgid(int(path.name)) == leader
                    and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    found.append(int(path.name))
            except (ProcessLookupError, FileNotFoundError):
                continue
    return found


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert until()
