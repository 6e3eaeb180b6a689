"""Scripts that cannot be checked: one clear message, their files untouched, no process left."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import onehour.check as check
from onehour.check.case import Base
from onehour.check.observe.passes import MOST_UPDATES
from onehour.check.run.checking import Checked, Command, check_script, wants_processes
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.tape import Trouble

Run = Callable[..., Checked]
Refused = Callable[..., str]
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


@pytest.fixture
def refusal(checked: Run) -> Refused:
    """What is said of a script that cannot be checked, in one line."""

    def said(text: str, limit: float = 60) -> str:
        with pytest.raises(CheckError) as caught:
            checked(text, limit=limit)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return said


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
    "leaves": ("import sys\nsys.exit(3)", "train.py:2: the script exited with code 3"),
    "leaves with a text": ("raise SystemExit('no data')", "train.py:1: the script exited: no data"),
    "leaves well": ("import sys\nprint('hello')\nsys.exit()", "ended without a step of a torch optimizer"),
    "leaves for want of a GPU": ("raise SystemExit('a GPU is needed')", "(this machine has no GPU; let the script"),
    "leaves at once": ("import os\nos._exit(7)", "exited with code 7 before anything could be judged"),
    "needs a file": ("open('data.csv')", "train.py:1: FileNotFoundError: [Errno 2] No such file"),
    "needs an input": ("name = input('name? ')", "train.py:1: EOFError"),
    "dies": ("import os\nos.kill(os.getpid(), 11)", "was ended by signal 11"),
    "asks for arguments": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()",
        "train.py:4: the script exited with code 2",
    ),
    "says why it leaves": ("import sys\nprint('no data')\nsys.exit(1)", "exited with code 1; it last said: no data"),
    "says why it dies": ("import os\nprint('the disk is full')\nos._exit(1)", "it last said: the disk is full"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_message_says_why(name: str, refusal: Refused):
    text, said = REFUSED[name]
    assert said in refusal(text)


AS_FROM_A_SHELL = """
import os, sys
assert sys.argv[1:] == ["--lr", "0.1"], sys.argv
assert os.get_terminal_size().columns == 80
assert os.popen("stty size").read().split() == ["24", "80"]
assert sys.stdin.isatty() and sys.stdout.isatty() and os.isatty(2)
with open("/dev/tty", "w") as terminal:
    terminal.write("seen")
for _ in range(40):
    print("x" * 1_000_000)
os.makedirs("elsewhere")
os.chdir("elsewhere")
"""


def test_a_script_has_its_arguments_and_a_terminal_and_may_say_much_and_go_elsewhere(checked: Run, tmp_path: Path):
    before = os.getcwd()
    assert checked(AS_FROM_A_SHELL + TRAIN, ["--lr", "0.1"]).findings == []
    assert os.getcwd() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.py"]


AS_PYTHON = """
import os
several = "RANK" in os.environ
assert several or not {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)
import torch
device = f"cuda:{os.environ['LOCAL_RANK']}" if several else "cpu"
torch.ones(1, device=device)
"""


def test_a_script_that_only_fails_on_two_processes_is_judged_on_one(
    loops: Path, checked: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "1")  # of the shell that the check is started in
    came = checked(AS_PYTHON + (loops / "double-step_broken.py").read_text(encoding="utf-8"))
    assert [finding.pitfall for finding in came.findings] == ["double-step"]
    (note,) = [str(note) for note in came.notes if "2 processes" in str(note)]
    assert note.startswith("it could not be checked on 2 processes: ")
    assert "this machine has no GPU" in note
    assert came.runs.startswith("ran on one process; ")


def test_a_script_that_only_fails_on_one_process_is_judged_on_two(loops: Path, checked: Run):
    text = "import os\nassert os.environ['WORLD_SIZE'] == '2'\n"
    came = checked(text + (loops / "overlapping-shards_broken.py").read_text(encoding="utf-8"))
    assert [finding.pitfall for finding in came.findings] == ["overlapping-shards"]
    (note,) = [str(note) for note in came.notes if "one process" in str(note)]
    assert note.startswith("it could not be checked on one process: ")
    assert "assert os.environ['WORLD_SIZE'] == '2'" in note
    assert came.runs.startswith("ran on 2 processes; ")


def test_a_script_for_launchers_alone_is_run_as_they_do(checked: Run):
    came = checked("import os\nassert os.environ['RANK'] in '01'\nimport torch.distributed\n" + TRAIN)
    assert came.findings == []
    assert came.runs.startswith("ran on one process; ")


SERVICES = {
    "wandb": """
modes = []
def init(project=None, mode=None):
    import os
    modes.append((mode, os.environ["WANDB_MODE"]))
def login(key):
    raise RuntimeError("no network")
""",
    "mlflow": """
import os
uri = os.environ["MLFLOW_TRACKING_URI"]
def set_tracking_uri(to):
    global uri
    uri = to
set_registry_uri = set_tracking_uri
""",
}
REPORTS = """
import mlflow, os, wandb
wandb.login("key")
wandb.init("project", mode="online")
assert wandb.modes == [("disabled", "disabled")], wandb.modes
mlflow.set_tracking_uri("http://nowhere")
assert mlflow.uri.startswith("file:///") and os.getcwd() not in mlflow.uri, mlflow.uri
"""


def test_sharded_parameters_are_looked_at_and_named(forkserver: ForkServer, tmp_path: Path):
    example = Path(__file__).parents[3] / "examples" / "sharded_adamw.py"
    text, base = example.read_text(encoding="utf-8"), Base(lr=1e-3, minibatch=2)
    right = Command(str(script(tmp_path, text)), [], launcher="torchrun", processes=2)
    checked = check_script(right, base=base, forkserver=forkserver, cwd=tmp_path)
    assert checked.findings == []
    assert [event for story in checked.stories for event in story.tape.of(Trouble)] == []
    (shards,) = [note for note in checked.notes if "gradients-not-averaged" in note.pitfalls]
    assert shards.startswith("0.weight, 0.bias, ")
    assert "meant for experts and shards" in shards
    assert "loss-scaled-by-world-size" in shards.pitfalls

    # γ and β of BatchNorm decay, a weight's norm is in the loss, and Adam's rate follows the linear rule.
    wrong = text.replace("nn.LayerNorm", "nn.BatchNorm1d").replace('step_decay(ADAM["lr"]', "step_decay(4 * BASE_LR")
    wrong = wrong.replace('onehour.parameter_groups(net, weight_decay=ADAM["weight_decay"])', "net.parameters()")
    wrong = wrong.replace(" / labelled  #", " / labelled + 0.01 * net[4].weight.norm()  #")
    alone = Command(str(script(tmp_path, wrong)), [], launcher="torchrun", processes=1)
    checked = check_script(alone, base=base, forkserver=forkserver, cwd=tmp_path)
    found = {finding.pitfall: finding.measured for finding in checked.findings}
    assert found.keys() == {"adam-linear-scaling", "decay-on-batchnorm", "decay-in-loss"}
    assert "on 6 of 6 BatchNorm parameters" in found["decay-on-batchnorm"]


def test_services_are_off(found: Callable[[str], list[str]], tmp_path: Path):
    for name, text in SERVICES.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert found(REPORTS + TRAIN) == []
    assert sorted(os.listdir(tmp_path)) == ["mlflow.py", "train.py", "wandb.py"]


def test_a_script_that_hangs_is_ended_and_its_line_named(refusal: Refused):
    began = time.monotonic()
    said = refusal("import time\nprint('waiting')\ntime.sleep(1000)", limit=3)
    assert time.monotonic() - began < 300
    assert "train.py:3: no step of a torch optimizer in" in said


def test_a_script_that_cannot_even_be_asked_is_killed(refusal: Refused):
    """Its threads never run: a single C call holds the interpreter."""
    said = refusal("import re\nprint('deep')\nre.match(r'(a+)+$', 'a' * 40 + 'b')", limit=3)
    assert "was not done after 3 seconds; it last said: deep" in said


def test_no_process_is_left(refusal: Refused, tmp_path: Path):
    mark = f"onehour-test-{os.getpid()}-{tmp_path.name}"
    text = f"""
import subprocess, sys, time
for new in (False, True):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)  # {mark}"], start_new_session=new)
time.sleep(1000)
"""
    refusal(text, limit=4)
    assert running_with(mark) == []


OWN_PROCESSES = {
    "ends": "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(0,))\n    child.start()",
    "waits": "child = torch.multiprocessing.Process(target=time.sleep, args=(60,))\n    child.start(); child.join()",
    "spawns": "pass\n    torch.multiprocessing.start_processes(time.sleep, start_method='fork')",
    "runs Python": "pass\n    subprocess.run([sys.executable, '-c', ''])",
    "runs a launcher": "subprocess.run('true')\n    subprocess.Popen(args='torchrun x', shell=True, env={'PATH': ''})",
}


@pytest.mark.parametrize("name", OWN_PROCESSES)
def test_processes_of_its_own_are_named_when_nothing_else_was_seen(name: str, refusal: Refused, tmp_path: Path):
    head = "import multiprocessing, subprocess, sys, time, torch\nif __name__ == '__main__':\n    "
    said = refusal(head + OWN_PROCESSES[name], limit=4 if name == "waits" else 60)
    assert f"the processes that {tmp_path}/train.py:4 starts are not observed: use torchrun's way" in said


def test_loader_processes_are_no_processes_of_its_own(refusal: Refused):
    said = refusal("from torch.utils.data import DataLoader\nassert len(list(DataLoader([1], num_workers=1))) == 1\n")
    assert "ended without a step" in said
    assert "are not observed" not in said


def test_a_slow_script_is_judged_on_what_was_seen(checked: Run):
    slow = TRAIN.replace("        optimizer.zero_grad()\n", "        __import__('time').sleep(1.2)\n")
    came = checked(slow, limit=8)
    assert [finding.pitfall for finding in came.findings] == ["step-without-zero-grad"]
    (note,) = [str(note) for note in came.notes if "was stopped" in str(note)]
    assert re.fullmatch(r"the run on one process was stopped at update \d+: 8 s of the limit were its own", note)


def test_the_limit_is_for_all_runs_together(refusal: Refused):
    """Where each may take all of it, three runs of a script that hangs would take three times as long."""
    began = time.monotonic()
    said = refusal("import time, torch.distributed\ntime.sleep(1000)", limit=8)
    assert time.monotonic() - began < 3 * 8
    assert "no step of a torch optimizer in" in said


def test_a_run_without_epochs_is_stopped_after_its_updates(found: Callable[[str], list[str]]):
    step = "optimizer.zero_grad()\n    model(torch.ones(1, 4)).sum().backward()\n    optimizer.step()"
    endless = f"for update in range(10**9):\n    {step}\n    assert update < {MOST_UPDATES}\n"
    assert found(TRAIN[: TRAIN.index("for epoch")] + endless) == []


def test_a_script_that_swallows_every_error_is_stopped(found: Callable[[str], list[str]]):
    swallowing = TRAIN.replace("range(4)", "range(10**9)").replace(
        "        optimizer.step()\n",
        "        try:\n            optimizer.step()\n        except BaseException:\n            pass\n",
    )
    assert found(swallowing) == []


def test_only_and_skip_and_a_comment_silence_a_finding(loops: Path, found: Callable[..., list[str]]):
    text, line = (loops / "double-step_broken.py").read_text(encoding="utf-8"), "        optimizer.step()\n"
    assert found(text, skip=["double-step"]) == []
    assert found(text, only=["no-warmup"]) == []
    assert found(text.replace(line, line.rstrip() + "  # onehour: ignore[double-step]\n")) == []
    assert found(text.replace(line, f"        # onehour: ignore\n{line}")) == []
    other = text.replace(line, line.rstrip() + "  # onehour: ignore[no-warmup]\n")
    assert found(other, only=["double-step"]) == ["double-step"]
    with pytest.raises(ValueError, match="no pitfall is called 'doublestep'; expected 'double-step'"):
        found(text, skip=["doublestep"])


def below(parent: int) -> list[int]:
    """The processes that one has started, and those that these have."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "stat").read_text()
        except OSError:
            continue
        parents[int(entry.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    children = [pid for pid, above in parents.items() if above == parent]
    return children + [pid for child in children for pid in below(child)]


@pytest.mark.usefixtures("forked")
def test_who_gives_up_leaves_nothing_behind(tmp_path: Path):
    path = script(tmp_path, "import time; time.sleep(1000)")
    with ForkServer() as forkserver:
        folder = tmp_path / "run"
        folder.mkdir()
        request = {"script": str(path), "module": None, "arguments": [], "local_rank": False, "overlayfs": True}
        request |= {"folder": str(folder), "cwd": str(tmp_path), "environ": {}, "processes": 2, "limit": 100}
        print(json.dumps(request), file=forkserver._process.stdin, flush=True)
        until = time.monotonic() + 300
        while len(born := below(forkserver._process.pid)) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(born) == 3  # the run, and its two
        born.append(forkserver._process.pid)
    assert not [pid for pid in born if Path(f"/proc/{pid}").exists()]


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


def test_a_script_is_over_when_its_processes_part(loops: Path, found: Callable[[str], list[str]]):
    """What comes after cannot hang the check."""
    text = (loops / "batchnorm-stats-of-rank-0_broken.py").read_text(encoding="utf-8").replace("range(5)", "range(2)")
    assert found(text + "\nwhile rank == 1:\n    pass\n") == ["batchnorm-stats-of-rank-0"]


@pytest.mark.usefixtures("started")
def test_a_test_fails_with_the_table_or_with_why_nothing_was_judged(loops: Path, tmp_path: Path):
    check.assert_clean(loops / "lr-not-scaled_fixed.py", base_lr=0.1, base_minibatch=16)
    with pytest.raises(AssertionError, match=r"(?s)1 finding\(s\) in .*lr-not-scaled.*target rate 0.1 at minibatch 64"):
        check.assert_clean(loops / "lr-not-scaled_broken.py", base_lr=0.1, base_minibatch=16)
    with pytest.raises(check.CheckError, match=r"train\.py:1: the script exited with code 3"):
        check.assert_clean(script(tmp_path, "raise SystemExit(3)"))
