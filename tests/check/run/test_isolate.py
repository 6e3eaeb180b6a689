"""A script writes, removes and renames as it likes, reads back what it did, and its files are as before."""

import os
from pathlib import Path

import pytest

from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.run.overlay import Overlay

STEP = """
import torch
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (weight**2).sum().backward()
    optimizer.step()
"""

ACTIONS = {
    "overwrite": """
from pathlib import Path
Path("notes.txt").write_text("new")
assert Path("notes.txt").read_text() == "new"
assert sorted(p.name for p in Path(".").iterdir()) == ["notes.txt", "runs", "train.py"]
""",
    "append": """
with open("notes.txt", "a") as file:
    file.write("more")
assert open("notes.txt").read() == "oldmore"
""",
    "change in place": """
with open("notes.txt", "r+") as file:
    file.write("O")
assert open("notes.txt").read() == "Old"
""",
    "remove": """
import os
os.remove("notes.txt")
assert not os.path.exists("notes.txt") and "notes.txt" not in os.listdir()
try:
    open("notes.txt")
    raise SystemExit("still there")
except FileNotFoundError:
    pass
open("notes.txt", "x").write("again")
assert open("notes.txt").read() == "again"
""",
    "rename": """
import os
os.replace("notes.txt", "other.txt")
assert open("other.txt").read() == "old" and not os.path.exists("notes.txt")
""",
    "clear and fill": """
import os, shutil
shutil.rmtree("runs")
assert not os.path.exists("runs/1/log.txt")
try:
    open("runs/new.txt", "w")
    raise SystemExit("the folder is gone")
except FileNotFoundError:
    pass
os.makedirs("runs/2")
open("runs/2/log.txt", "w").write("two")
assert os.listdir("runs") == ["2"] and not os.path.exists("runs/1"), os.listdir("runs")
""",
    "a folder moved into place": """
import os
os.makedirs("runs/.tmp/a")
open("runs/.tmp/a/w.bin", "wb").write(b"w")
os.replace("runs/.tmp", "runs/final")
assert [sorted(f) for _, _, f in os.walk("runs/final")] == [[], ["w.bin"]], list(os.walk("runs"))
os.rename("runs/1", "runs/old")
assert open("runs/old/log.txt").read() == "one" and not os.path.exists("runs/1")
""",
    "a checkpoint": """
import torch
torch.save({"w": torch.ones(2)}, "runs/last.pt")
torch.save({"w": torch.ones(3)}, "notes.txt")
assert torch.load("notes.txt")["w"].numel() == 3 and torch.load("runs/last.pt")["w"].numel() == 2
""",
    "times, modes, links": """
import os
from pathlib import Path
Path("notes.txt").touch()
os.chmod("notes.txt", 0o600)
os.truncate("notes.txt", 1)
os.symlink("notes.txt", "link.txt")
assert open("notes.txt").read() == "o" and os.path.lexists("link.txt")
""",
    "another folder": """
import os
os.makedirs("deep/er")
os.chdir("deep/er")
open("here.txt", "w").write("here")
assert os.path.exists("here.txt")
os.chdir("..")
assert open("er/here.txt").read() == "here"
""",
    "logs and arrays": """
import logging, numpy
logging.basicConfig(filename="run.log", level=logging.INFO)
logging.info("said")
numpy.save("runs/array.npy", numpy.arange(3))
assert "said" in open("run.log").read() and numpy.load("runs/array.npy").tolist() == [0, 1, 2]
""",
}


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time and content of all files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ACTIONS)
def test_the_script_sees_what_it_did_and_its_files_do_not(name: str, forkserver: ForkServer, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("old")
    (tmp_path / "runs" / "1").mkdir(parents=True)
    (tmp_path / "runs" / "1" / "log.txt").write_text("one")
    (tmp_path / "train.py").write_text(ACTIONS[name] + STEP, encoding="utf-8")
    before = state(tmp_path)
    check_script("train.py", forkserver=forkserver, limit=60, cwd=tmp_path)
    assert state(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "runs", "train.py"]


@pytest.mark.timeout(600)
def test_what_a_script_may_not_do_it_may_not_do_here(forkserver: ForkServer, tmp_path: Path):
    (tmp_path / "train.py").write_text("open('nowhere/x.txt', 'w')", encoding="utf-8")
    with pytest.raises(CheckError, match=r"train\.py:1: FileNotFoundError"):
        check_script("train.py", forkserver=forkserver, limit=60, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["train.py"]


@pytest.mark.timeout(600)
def test_the_temporary_folder_keeps_what_was_there(forkserver: ForkServer, tmp_path: Path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other / "exp"):
        folder.mkdir(parents=True)
    (other / "model.pt").write_text("old")
    (other / "exp" / "log.txt").write_text("one")
    script = f"""
import os, pathlib, shutil, tempfile, torch
os.chdir({str(other)!r})
torch.save({{"w": torch.ones(2)}}, "model.pt")
assert torch.load("model.pt")["w"].numel() == 2
os.replace("model.pt", "last.pt")
shutil.rmtree("exp")
assert os.listdir() == ["last.pt"]
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "a").write_text("a")
    os.system(f"cp {{folder}}/a {{folder}}/b")
    assert pathlib.Path(folder, "b").read_text() == "a"
loader = torch.utils.data.DataLoader(torch.ones(8), batch_size=4, num_workers=1)
assert [len(batch) for batch in loader] == [4, 4]
"""
    (own / "train.py").write_text(script + STEP, encoding="utf-8")
    before = state(tmp_path)
    check_script("train.py", forkserver=forkserver, limit=60, cwd=own)
    assert state(tmp_path) == before


def test_new_names_and_caches_in_the_temporary_folder_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("exp", "torchinductor_me", "here"):
        (tmp_path / name).mkdir()
    overlay = Overlay(tmp_path / "run" / "written", home=[str(tmp_path / "here")])
    (tmp_path / "new").mkdir()
    root = f"{tmp_path}/run/written{tmp_path}"
    assert overlay.upper(tmp_path / "exp") == f"{root}/exp"
    assert overlay.upper(tmp_path / "exp" / "a") == f"{root}/exp/a"
    assert overlay.upper(tmp_path / "here" / "a") == f"{root}/here/a"
    assert overlay.upper(tmp_path / "new") is None
    assert overlay.upper(tmp_path / "torchinductor_me" / "a") is None


def test_a_removed_folder_hides_what_was_in_it(tmp_path: Path):
    own = tmp_path / "own"
    (own / "a").mkdir(parents=True)
    (own / "a" / "x").write_text("x")
    overlay = Overlay(tmp_path / "run" / "written", home=[str(own)])
    overlay.remove(str(own / "a"))
    assert overlay.read(str(own / "a" / "x")) != str(own / "a" / "x")
    assert not overlay.below(str(own / "a" / "x"))
    assert overlay.names(str(own)) == []
    with pytest.raises(FileNotFoundError):
        overlay.remove(str(own / "a"))
    assert (own / "a" / "x").read_text() == "x"
