"""Command lines are read as people type them."""

from pathlib import Path

import pytest
from observing import STEP

from onehour.check.run.checking import Command, check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.cli.check import read_command

ARGUMENTS = ["--lr", "3", "data.py"]
TYPED = {
    "train.py": Command("train.py", ARGUMENTS),
    "bin/train": Command("bin/train", ARGUMENTS),
    "python train.py": Command("train.py", ARGUMENTS),
    "CUDA_VISIBLE_DEVICES= /usr/bin/python3.12 -u train.py": Command(
        "train.py", ARGUMENTS, environ={"CUDA_VISIBLE_DEVICES": ""}
    ),
    "uv run python train.py": Command("train.py", ARGUMENTS),
    "uv run train.py": Command("train.py", ARGUMENTS),
    "SEED=1 train.py": Command("train.py", ARGUMENTS, environ={"SEED": "1"}),
    "python -m pkg.train": Command("pkg/train.py", ARGUMENTS, module="pkg.train"),
    "python -m pkg": Command("pkg/__main__.py", ARGUMENTS, module="pkg"),
    "torchrun train.py": Command("train.py", ARGUMENTS, launcher="torchrun"),
    "torchrun --nproc-per-node 2 train.py": Command("train.py", ARGUMENTS, launcher="torchrun", processes=2),
    "torchrun --standalone --nproc_per_node=8 --nnodes 1 train.py": Command(
        "train.py", ARGUMENTS, launcher="torchrun", processes=8
    ),
    "torchrun --nproc-per-node gpu -m pkg.train": Command(
        "pkg/train.py", ARGUMENTS, module="pkg.train", launcher="torchrun"
    ),
    "OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc_per_node=2 train.py": Command(
        "train.py", ARGUMENTS, launcher="torchrun", processes=2, environ={"OMP_NUM_THREADS": "1"}
    ),
    "python -m torch.distributed.launch --nproc_per_node=2 train.py": Command(
        "train.py", ARGUMENTS, launcher="launch", processes=2
    ),
    "accelerate launch train.py": Command("train.py", ARGUMENTS, launcher="accelerate"),
    "accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 --cpu train.py": Command(
        "train.py",
        ARGUMENTS,
        launcher="accelerate",
        processes=2,
        environ={"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"},
    ),
    "fabric run --accelerator=cpu --devices=2 --strategy ddp train.py": Command(
        "train.py",
        ARGUMENTS,
        launcher="fabric",
        processes=2,
        environ={"LT_CLI_USED": "1", "LT_NUM_NODES": "1", "LT_ACCELERATOR": "cpu", "LT_STRATEGY": "ddp"},
    ),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a package whose modules can be run."""
    (tmp_path / "pkg").mkdir()
    for name in ("__init__", "__main__", "train"):
        (tmp_path / "pkg" / f"{name}.py").write_text("")
    return tmp_path


@pytest.mark.parametrize("typed", TYPED)
def test_a_command_is_read(typed: str, package: Path):
    expected = TYPED[typed]
    read = read_command([*typed.split(), *ARGUMENTS], package)
    if expected.module is not None:
        assert Path(read.script).relative_to(package).as_posix() == expected.script
        assert (read.arguments, read.module, read.launcher) == (ARGUMENTS, expected.module, expected.launcher)
    else:
        assert read == expected


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("torchrun --nproc-per-node 2", "there is no Python script in `torchrun --nproc-per-node 2`"),
        ("python -m pkg.nothing", "there is no module pkg.nothing"),
    ],
)
def test_a_command_without_a_script_is_refused(typed: str, said: str, package: Path):
    with pytest.raises(CheckError, match=said):
        read_command(typed.split(), package)


def test_a_module_is_run_as_python_does(package: Path, forkserver: ForkServer):
    (package / "pkg" / "parts.py").write_text("lr = 0.1")
    head = "import os, sys\nfrom .parts import lr\nassert sys.argv[1:] == ['x'] and sys.path[0] == os.getcwd()\n"
    (package / "pkg" / "train.py").write_text(head + STEP)
    command = read_command(["python", "-m", "pkg.train", "x"], package)
    assert check_script(command, forkserver=forkserver, cwd=package).runs.startswith("ran on one process; ")


def test_modules_are_found_where_pythonpath_says(package: Path, forkserver: ForkServer):
    (package / "scripts").mkdir()
    (package / "scripts" / "train.py").write_text("import pkg.train\nraise SystemExit(pkg.train.__name__)\n")
    command = read_command(["PYTHONPATH=.", "python", "scripts/train.py"], package)
    with pytest.raises(CheckError, match=r"the script exited: pkg\.train"):
        check_script(command, forkserver=forkserver, cwd=package)


@pytest.mark.parametrize(
    ("typed", "head"),
    [
        ("torchrun --nproc-per-node 2 train.py", "assert sys.argv[1:] == []"),
        ("python -m torch.distributed.launch train.py", "assert sys.argv[1:] in ([], [f'--local-rank={rank}'])"),
        ("fabric run --devices 2 train.py", "assert os.environ['LT_CLI_USED'] == '1' and rank + 1 <= devices"),
        ("torchrun --nproc-per-node=1 train.py", "assert 'WORLD_SIZE' not in os.environ"),
    ],
)
def test_a_launcher_s_script_is_run_on_its_processes(typed: str, head: str, tmp_path: Path, forkserver: ForkServer):
    text = """
import os, sys
rank, devices = int(os.environ.get("RANK", "0")), int(os.environ.get("LT_DEVICES", "1"))
"""
    join = "\nif 'RANK' in os.environ:\n    torch.distributed.init_process_group('gloo')\n"
    (tmp_path / "train.py").write_text(text + head + "\nimport torch" + join + STEP)
    checked = check_script(read_command(typed.split(), tmp_path), forkserver=forkserver, cwd=tmp_path)
    runs = "on one process" if "=1" in typed else "on one process and on 2 processes"
    assert checked.runs.startswith(f"ran {runs}; ")
    assert [note for note in checked.notes if "could not be checked" in str(note)] == []
