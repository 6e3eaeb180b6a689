"""A run's folder that some host does not see is refused, and a slow file system is waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onehour.dist.group import Group
from onehour.dist.launched import LOOPBACK
from onehour.dist.processes import Processes, meeting_place
from onehour.training.recorder import look_for_folder

LOOKS = """
import os, socket, sys
from pathlib import Path
from onehour.dist.group import joined
from onehour.training.recorder import look_for_folder
socket.gethostname = lambda: f"host{os.environ['RANK']}"
folder = Path(os.environ["FOLDER"])
with joined("cpu") as group:
    found = "seen"
    try:
        look_for_folder(folder, group, patience=float(os.environ["PATIENCE"]))
    except ValueError as error:
        found = f"refused: {error}"
    Path(os.environ["OUT"], f"{group.rank}").write_text(found)
os._exit(0)
"""


def looked(out: Path, folders: list[Path], patience: float = 0.3) -> list[str]:
    """What each process finds, where process r sees folders[r] under the run's name."""
    with meeting_place(0) as port:
        shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(folders)), "OUT": str(out)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "PATIENCE": str(patience)}
        environs = [
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "FOLDER": str(folder)}
            for rank, folder in enumerate(folders)
        ]
        assert Processes([sys.executable, "-c", LOOKS], environs).wait() is None
    return [(out / str(rank)).read_text() for rank in range(len(folders))]


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Two folders, as two hosts have them under one name."""
    for name in "ab":
        (tmp_path / name).mkdir()
    return [tmp_path / "a", tmp_path / "b"]


def test_alone_there_is_nothing_to_look_for(tmp_path: Path):
    look_for_folder(tmp_path, Group())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_a_folder_that_all_see_leaves_no_trace(tmp_path: Path, places: list[Path]):
    (places[0] / ".seen-by-a-killed-one").touch()
    assert looked(tmp_path, [places[0]] * 2) == ["seen", "seen"]
    assert list(places[0].iterdir()) == []


@pytest.mark.timeout(120)
def test_one_that_a_host_does_not_see_is_refused_with_both_hosts(tmp_path: Path, places: list[Path]):
    found = looked(tmp_path, [places[0], places[1] / "nowhere"])
    assert all(text.startswith("refused: ") for text in found)
    assert "is not shared: process 1 on host1 does not see what process 0 on host0 writes there; give --out" in found[0]
    assert found[0].partition(" is not ")[2] == found[1].partition(" is not ")[2]
    assert list(places[0].iterdir()) == []


@pytest.mark.timeout(120)
def test_a_slow_file_system_is_waited_for(tmp_path: Path, places: list[Path]):
    """A second sees what the first has written a second later, as over a network."""
    copying = (
        f"until ls {places[0]}/.seen-* 2> /dev/null; do sleep 0.05; done; sleep 1; cp {places[0]}/.seen-* {places[1]}"
    )
    copier = subprocess.Popen(["sh", "-c", copying], stdout=subprocess.DEVNULL, env=os.environ)
    assert looked(tmp_path, places, patience=20.0) == ["seen", "seen"]
    copier.wait(timeout=10)
