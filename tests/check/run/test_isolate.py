"""A script writes, removes and renames as it likes, reads back what it did, and its files are as before."""

import copy
import os
from pathlib import Path

import pytest
from observing import STEP

from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.run.overlay import Overlay

BY_KERNEL, BY_PATCHES = "a mount namespace", "Python's own functions for files"
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
    "paths as bytes": """
import os
with open(b"notes.txt", "wb") as file:
    file.write(b"new")
assert open(os.fsencode(os.path.abspath("notes.txt"))).read() == "new"
os.mkdir(b"made")
open(b"made/x", "xb").close()
os.rename(b"made/x", b"made/y")
assert sorted(os.listdir(b".")) == [b"made", b"notes.txt", b"runs", b"train.py"], os.listdir(b".")
assert [(e.name, e.path) for e in os.scandir(b"made")] == [(b"y", b"made/y")]
assert [f for _, _, f in os.walk(b"made")] == [[b"y"]] and os.getcwdb() == os.fsencode(os.getcwd())
os.remove(b"runs/1/log.txt")
assert not os.path.exists("runs/1/log.txt") and os.path.exists(b"made/y")
""",
    "folders by number": """
import os
folder = os.open("runs", os.O_RDONLY)
file = os.open("new.txt", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
os.write(file, b"new")
os.close(file)
os.mkdir("made", dir_fd=folder)
assert sorted(os.listdir(folder)) == ["1", "made", "new.txt"], os.listdir(folder)
os.rename("1/log.txt", "log.txt", src_dir_fd=folder, dst_dir_fd=folder)
assert open("runs/log.txt").read() == "one" and not os.path.exists("runs/1/log.txt")
os.unlink("new.txt", dir_fd=folder)
assert sorted(os.listdir("runs")) == ["1", "log.txt", "made"] and os.stat("log.txt", dir_fd=folder).st_size == 3
os.chmod(folder, 0o700)
""",
    "files by number": """
import io, os
for flags in (os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
    file = os.open("notes.txt", flags)
    os.write(file, b"n")
    os.close(file)
assert open("notes.txt").read() == "n"
raw = io.FileIO("runs/1/log.txt", "w")
raw.write(b"raw")
raw.close()
assert open("runs/1/log.txt").read() == "raw" and isinstance(raw, io.FileIO)
os.utime("notes.txt", (1, 1))
os.chown("notes.txt", os.getuid(), os.getgid())
os.mkfifo("pipe")
""",
    "a path of one's own": """
import os
class Place:
    def __fspath__(self):
        return b"notes.txt"
open(Place(), mode="a").write("more")
assert open(file=Place()).read() == "oldmore" and os.stat(path=Place()).st_size == 7
os.remove(path=Place())
assert not os.path.lexists("notes.txt")
""",
    "links": """
import os
os.link("notes.txt", "second.txt")
open("second.txt", "a").write("more")
assert open("second.txt").read() == "oldmore"
os.symlink("notes.txt", "link.txt")
open("link.txt", "a").write("again")
assert os.readlink("link.txt") == "notes.txt" and open("notes.txt").read() == "oldmoreagain"
os.symlink(os.path.abspath("runs"), "latest")
open("latest/1/log.txt", "w").write("two")
open("latest/new.txt", "w").write("new")
assert open("runs/1/log.txt").read() == "two" and os.path.exists("runs/new.txt")
os.symlink("runs/1", "next")
os.replace("next", "latest")
assert open("latest/log.txt").read() == "two" and os.path.islink("latest")
os.remove("latest")
assert os.path.exists("runs/1/log.txt") and not os.path.lexists("latest")
""",
    "a folder that is older": """
import os
open("runs/new.txt", "w").write("new")
os.chdir("runs")
assert os.path.basename(os.getcwd()) == "runs" and sorted(os.listdir()) == ["1", "new.txt"]
assert open("1/log.txt").read() == "one" and open("new.txt").read() == "new"
os.chdir("..")
assert open("notes.txt").read() == "old"
""",
    "modules that hold a function": """
import os, tarfile
from shutil import copyfile
open("runs/in.txt", "w").write("packed")
with tarfile.open("runs/a.tar", "w") as archive:
    archive.add("runs/in.txt", "notes.txt")
with tarfile.open("runs/a.tar") as archive:
    archive.extractall(".", filter="data")
assert open("notes.txt").read() == "packed"
copyfile("notes.txt", "runs/1/log.txt")
assert open("runs/1/log.txt").read() == "packed"
""",
    "TensorBoard, in a new folder": """
import os
from torch.utils.tensorboard import SummaryWriter
os.mkdir("logs")
writer = SummaryWriter("logs")
writer.add_scalar("loss", 1.0, 0)
writer.close()
assert len(os.listdir("logs")) == 1
""",
    "from another folder": """
import os, tempfile
number, path = tempfile.mkstemp()
os.write(number, b"new")
os.close(number)
os.replace(path, "notes.txt")
assert open("notes.txt").read() == "new" and not os.path.exists(path)
""",
    "logs and arrays": """
import logging, numpy
logging.basicConfig(filename="run.log", level=logging.INFO)
logging.info("said")
numpy.save("runs/array.npy", numpy.arange(3))
assert "said" in open("run.log").read() and numpy.load("runs/array.npy").tolist() == [0, 1, 2]
""",
}

EACH = f"""
import os, traceback
failed = []
for name, text in {ACTIONS!r}.items():
    if (child := os.fork()) == 0:
        try:
            os.chdir(name)
            exec(text)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    failed += [name] * (os.waitpid(child, 0)[1] != 0)
assert not failed, failed
"""
"""Each in a folder and a process of its own."""


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time and content of all files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


BELOW_PYTHON = """
import os, sqlite3
database = sqlite3.connect("notes.db")
database.execute("create table t (x)")
database.commit()
os.system("echo new > notes.txt; rm -r runs; mkdir runs; mv train.py runs/")
assert open("notes.txt").read() == "new\\n" and os.listdir("runs") == ["train.py"]
"""


@pytest.fixture
def patching(forkserver: ForkServer) -> ForkServer:
    """The same process, but files are kept by Python's functions alone."""
    patching = copy.copy(forkserver)
    patching.overlayfs = False
    return patching


@pytest.fixture(params=[BY_KERNEL, BY_PATCHES])
def keeping(request: pytest.FixtureRequest) -> tuple[ForkServer, str]:
    """Starts scripts whose files are kept by one of the ways, and its name."""
    return request.getfixturevalue("forkserver" if request.param == BY_KERNEL else "patching"), request.param


def project(folder: Path, script: str) -> None:
    """A script with some files about it."""
    (folder / "runs" / "1").mkdir(parents=True)
    (folder / "notes.txt").write_text("old")
    (folder / "runs" / "1" / "log.txt").write_text("one")
    (folder / "train.py").write_text(script + STEP, encoding="utf-8")


def test_the_script_sees_what_it_did_and_its_files_do_not(keeping: tuple[ForkServer, str], tmp_path: Path):
    for name in ACTIONS:
        project(tmp_path / name, "")
    (tmp_path / "train.py").write_text(EACH + STEP, encoding="utf-8")
    before = state(tmp_path)
    said = check_script("train.py", forkserver=keeping[0], limit=60, cwd=tmp_path).runs
    assert said == f"ran on one process; its files were protected by {keeping[1]}"
    assert state(tmp_path) == before
    for name in ACTIONS:
        assert sorted(os.listdir(tmp_path / name)) == ["notes.txt", "runs", "train.py"]


def test_the_kernel_keeps_what_libraries_and_other_programs_write(forkserver: ForkServer, tmp_path: Path):
    project(tmp_path, BELOW_PYTHON)
    before = state(tmp_path)
    assert BY_KERNEL in check_script("train.py", forkserver=forkserver, limit=60, cwd=tmp_path).runs
    assert state(tmp_path) == before


def test_what_a_script_may_not_do_it_may_not_do_here(forkserver: ForkServer, tmp_path: Path):
    (tmp_path / "train.py").write_text("open('nowhere/x.txt', 'w')", encoding="utf-8")
    with pytest.raises(CheckError, match=r"train\.py:1: FileNotFoundError"):
        check_script("train.py", forkserver=forkserver, limit=60, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["train.py"]


def test_the_temporary_folder_keeps_what_was_there(keeping: tuple[ForkServer, str], tmp_path: Path):
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
    check_script("train.py", forkserver=keeping[0], limit=60, cwd=own)
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
