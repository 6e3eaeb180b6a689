"""Scripts that cannot be checked: one clear message, their files untouched, no process left."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import onehour.check as check
from onehour.check.run import checking
from onehour.check.run.checking import check_script, wants_processes
from onehour.check.run.forkserver import CheckError, ForkServer

TRAIN = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
loader = DataLoader(data, batch_size=16, shuffle=True)
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(4):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(forkserver: ForkServer, folder: Path, text: str, limit: float = 60) -> str:
    """What is said of a script that cannot be checked, in one line."""
    with pytest.raises(CheckError) as caught:
        check_script(script(folder, text), forkserver=forkserver, limit=limit, cwd=folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def running_with(mark: str) -> list[int]:
    """The processes whose command or environment holds a text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in text and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


REFUSED = {
    "never steps": ("print('hello')", "ended without a step of a torch optimizer"),
    "leaves": ("import sys\nsys.exit(3)", "train.py:2: the script exited with code 3"),
    "leaves with a text": ("raise SystemExit('no data')", "train.py:1: the script exited: no data"),
    "leaves well": ("import sys\nsys.exit()", "ended without a step"),
    "leaves at once": ("import os\nos._exit(7)", "left the process with code 7 before anything could be judged"),
    "needs a file": ("open('data.csv')", "train.py:1: FileNotFoundError: [Errno 2] No such file"),
    "needs an input": ("name = input('name? ')", "train.py:1: EOFError"),
    "no Python": ("if True\n    pass", "train.py:1: SyntaxError: expected ':'"),
    "missing module": ("import nosuchmodule", "train.py:1: ModuleNotFoundError: No module named 'nosuchmodule'"),
    "dies": ("import os\nos.kill(os.getpid(), 11)", "was ended by signal 11"),
    "asks for arguments": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()",
        "train.py:4: the script exited with code 2",
    ),
    "says why it dies": ("import os\nprint('the disk is full')\nos._exit(1)", "it last said: the disk is full"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REFUSED)
def test_one_message_says_why(name: str, forkserver: ForkServer, tmp_path: Path):
    text, said = REFUSED[name]
    assert said in refusal(forkserver, tmp_path, text)


@pytest.mark.timeout(600)
def test_cuda_without_a_gpu(forkserver: ForkServer, tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = refusal(forkserver, tmp_path, "import torch\nmodel = torch.nn.Linear(1, 1).cuda()")
    assert "train.py:2: AssertionError: Torch not compiled with CUDA enabled (this machine has no GPU" in said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("text", ["while True:\n    pass", "import time\nprint('waiting')\ntime.sleep(1000)"])
def test_a_script_that_hangs_is_ended_and_its_line_named(text: str, forkserver: ForkServer, tmp_path: Path):
    began = time.monotonic()
    said = refusal(forkserver, tmp_path, text, limit=3)
    assert time.monotonic() - began < 300
    assert "train.py:" in said
    assert "no step of a torch optimizer" in said


@pytest.mark.timeout(600)
def test_a_script_that_cannot_even_be_asked_is_killed(forkserver: ForkServer, tmp_path: Path):
    """Its threads never run: a single C call holds the interpreter."""
    said = refusal(forkserver, tmp_path, "import re\nprint('deep')\nre.match(r'(a+)+$', 'a' * 40 + 'b')", limit=3)
    assert "was not done after 3 seconds; it last said: deep" in said


@pytest.mark.timeout(600)
def test_no_process_is_left(forkserver: ForkServer, tmp_path: Path):
    mark = f"onehour-test-{os.getpid()}-{tmp_path.name}"
    text = f"""
import subprocess, sys, time
for new in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # {mark}"], start_new_session=new)
time.sleep(1000)
"""
    refusal(forkserver, tmp_path, text, limit=4)
    assert running_with(mark) == []


@pytest.mark.timeout(600)
def test_processes_of_its_own_are_named_when_nothing_else_was_seen(forkserver: ForkServer, tmp_path: Path):
    text = """
import multiprocessing, time
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
"""
    said = refusal(forkserver, tmp_path, text)
    assert "ended without a step" in said
    assert "the processes that" in said
    assert "train.py:5" in said


@pytest.mark.timeout(600)
def test_megabytes_on_the_way_do_not_matter(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "for _ in range(40):\n    print('x' * 1_000_000)\n" + TRAIN)
    assert check_script(path, forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


@pytest.mark.timeout(600)
def test_another_folder_does_not_matter(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "import os\nos.makedirs('elsewhere')\nos.chdir('elsewhere')\n" + TRAIN)
    before = os.getcwd()
    checked = check_script(path, forkserver=forkserver, limit=60, cwd=tmp_path)
    assert checked.findings == []
    assert os.getcwd() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.timeout(600)
def test_a_slow_script_is_judged_on_what_was_seen(forkserver: ForkServer, tmp_path: Path):
    slow = TRAIN.replace("        optimizer.zero_grad()\n", "        __import__('time').sleep(0.2)\n")
    checked = check_script(script(tmp_path, slow), forkserver=forkserver, limit=4, cwd=tmp_path)
    assert [finding.pitfall for finding in checked.findings] == ["step-without-zero-grad"]


@pytest.mark.timeout(600)
def test_a_script_that_swallows_every_error_is_stopped(forkserver: ForkServer, tmp_path: Path):
    swallowing = TRAIN.replace("range(4)", "range(10**9)").replace(
        "        optimizer.step()\n",
        "        try:\n            optimizer.step()\n        except BaseException:\n            pass\n",
    )
    assert check_script(script(tmp_path, swallowing), forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


@pytest.mark.timeout(600)
def test_arguments_reach_the_script(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "import sys\nassert sys.argv[1:] == ['--lr', '0.1'], sys.argv\n" + TRAIN)
    assert check_script(path, ["--lr", "0.1"], forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


@pytest.mark.timeout(600)
def test_a_comment_silences_a_finding_of_its_line(loops: Path, forkserver: ForkServer, tmp_path: Path):
    text = (loops / "double-step_broken.py").read_text(encoding="utf-8")
    line = "        optimizer.step()\n"
    silenced = text.replace(line, line.rstrip() + "  # onehour: ignore[double-step]\n")
    assert check_script(script(tmp_path, silenced), forkserver=forkserver, limit=60).findings == []
    other = text.replace(line, line.rstrip() + "  # onehour: ignore[no-warmup]\n")
    assert len(check_script(script(tmp_path, other), forkserver=forkserver, limit=60).findings) == 1


@pytest.mark.timeout(600)
def test_only_and_skip(loops: Path, forkserver: ForkServer):
    path = loops / "double-step_broken.py"
    assert check_script(path, forkserver=forkserver, skip=["double-step"]).findings == []
    assert check_script(path, forkserver=forkserver, only=["no-warmup"]).findings == []
    assert len(check_script(path, forkserver=forkserver, only=["double-step"]).findings) == 1
    with pytest.raises(ValueError, match="no pitfall is called 'doublestep'; expected 'double-step'"):
        check_script(path, forkserver=forkserver, skip=["doublestep"])


def below(parent: int) -> list[int]:
    """The children of a process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "stat").read_text()
        except OSError:
            continue
        if int(text[text.rindex(")") + 2 :].split()[1]) == parent:
            found.append(int(entry.name))
    return found


@pytest.mark.timeout(600)
def test_who_gives_up_leaves_nothing_behind(tmp_path: Path):
    path = script(tmp_path, "import time; time.sleep(1000)")
    with ForkServer() as forkserver:
        assert forkserver._process.stdin is not None
        request = {"script": str(path), "arguments": [], "folder": str(tmp_path), "cwd": str(tmp_path), "environ": {}}
        print(json.dumps(request | {"processes": 2, "limit": 100}), file=forkserver._process.stdin, flush=True)
        until = time.monotonic() + 20
        while len(born := below(forkserver._process.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(born) == 2
        born.append(forkserver._process.pid)
    assert not [pid for pid in born if Path(f"/proc/{pid}").exists()]


def test_the_command_itself_waits_for_no_torch():
    """Its process imports none; the one that runs scripts does, once."""
    code = "import sys, onehour.check.run.checking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_script_made_for_several_processes_is_recognised(loops: Path, tmp_path: Path):
    path = script(tmp_path, "import engine\n")
    assert not wants_processes(path)
    (tmp_path / "unused.py").write_text("import torch.distributed")
    assert not wants_processes(path)
    (tmp_path / "engine.py").write_text("import torch.distributed as dist")
    assert wants_processes(path)
    assert wants_processes(loops / "overlapping-shards_broken.py")
    assert not wants_processes(loops / "double-step_broken.py")


@pytest.mark.parametrize(
    ("line", "wants"),
    [
        ('if "RANK" in os.environ: ...', True),
        ("local_rank = os.environ['LOCAL_RANK']", True),
        ("import ignite.distributed as idist", True),
        ("from mmengine.runner import Runner", True),
        ("from lightning.fabric import Fabric", True),
        ("import onehour", True),
        ("RANK = 4  # of the matrix", False),
        ("import numpy", False),
    ],
)
def test_signs_of_several_processes(line: str, wants: bool, tmp_path: Path):
    assert wants_processes(script(tmp_path, line)) == wants


@pytest.mark.timeout(600)
def test_a_script_is_over_when_its_processes_part(loops: Path, forkserver: ForkServer, tmp_path: Path):
    """What comes after cannot hang the check."""
    text = (loops / "batchnorm-stats-of-rank-0_broken.py").read_text(encoding="utf-8").replace("range(5)", "range(2)")
    path = script(tmp_path, text + "\nwhile rank == 1:\n    pass\n")
    checked = check_script(path, forkserver=forkserver, limit=60, cwd=tmp_path)
    assert [finding.pitfall for finding in checked.findings] == ["batchnorm-stats-of-rank-0"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, forkserver: ForkServer) -> None:
    """Without waiting for torch each time."""
    monkeypatch.setattr(checking, "check_script", partial(check.check_script, forkserver=forkserver))


@pytest.mark.usefixtures("started")
def test_a_clean_script_passes(loops: Path):
    check.assert_clean(loops / "lr-not-scaled_fixed.py", base_lr=0.1, base_minibatch=16)


@pytest.mark.usefixtures("started")
def test_a_script_with_a_finding_fails_with_its_table(loops: Path):
    with pytest.raises(AssertionError, match=r"(?s)1 finding\(s\) in .*lr-not-scaled.*target rate 0.1 at minibatch 64"):
        check.assert_clean(loops / "lr-not-scaled_broken.py", base_lr=0.1, base_minibatch=16)


@pytest.mark.usefixtures("started")
def test_a_script_that_cannot_be_run_is_no_clean_one(tmp_path: Path):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    with pytest.raises(check.CheckError, match=r"train\.py:1: the script exited with code 3"):
        check.assert_clean(tmp_path / "train.py")
