"""Scripts that cannot be checked: one clear message, their files untouched, no process left."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import onehour.check as check
from onehour.check.case import Base
from onehour.check.run import checking
from onehour.check.run.checking import Command, check_script, wants_processes
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.tape import Trouble

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
    "says why it leaves": ("import sys\nprint('no data')\nsys.exit(1)", "exited with code 1; it last said: no data"),
    "asserts": ("x = 1\nassert x == 2", "train.py:2: AssertionError: assert x == 2"),
    "asserts in words": ("assert 1 == 2, 'not equal'", "AssertionError: not equal (assert 1 == 2, 'not equal')"),
    "says why it dies": ("import os\nprint('the disk is full')\nos._exit(1)", "it last said: the disk is full"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_message_says_why(name: str, forkserver: ForkServer, tmp_path: Path):
    text, said = REFUSED[name]
    assert said in refusal(forkserver, tmp_path, text)


TOO_OLD = {
    "a module of torch": ("from torch._six import inf", "torch"),
    "a name of torch": ("from torch.autograd.gradcheck import zero_gradients", "torch"),
    "an attribute of torch": ("import torch\ntorch.gels(1, 2)", "torch"),
    "a method": ("from torch.utils.data import DataLoader\niter(DataLoader([1])).next()", "torch"),
    "a keyword": (
        "import torch\nfrom torch.optim import SGD, lr_scheduler\noptimizer = SGD(torch.nn.Linear(1, 1).parameters())\n"
        "lr_scheduler.StepLR(optimizer, 1, verbose=True)",
        "torch",
    ),
    "an index": ("import torch\ntorch.ones(())[0]", "torch"),
    "numpy": ("import numpy as np\nnp.float(1)", "numpy"),
    "a name of Python": ("from collections import Mapping", "Python 3"),
    "Python 2": ("print 'hello'", "Python 3"),
    "a word of Python": ("import torch\ntorch.ones(1).cuda(async=True)", "Python 3"),
}


@pytest.mark.parametrize("name", TOO_OLD)
def test_a_script_that_is_too_old_is_told_so(name: str, forkserver: ForkServer, tmp_path: Path):
    text, package = TOO_OLD[name]
    assert f"(the script seems too old for the installed {package}" in refusal(forkserver, tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "import nosuchmodule",
        "import torch\ntorch.nn.Linear(1, 1).module",
        "class Own:\n    pass\nOwn().nothing",
        "def load(path):\n    pass\nload(where=1)",
        "from train import nothing",
    ],
)
def test_other_errors_are_not_taken_for_age(text: str, forkserver: ForkServer, tmp_path: Path):
    assert "too old" not in refusal(forkserver, tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "torch.nn.Linear(1, 1).cuda()",
        "torch.ones(1, device='cuda:0')",
        "torch.cuda.set_device(0)",
        "torch.cuda.get_device_name()",
        "torch.cuda.Event().record()",
        "torch.cuda.synchronize()",
        "raise SystemExit('a GPU is needed')",
    ],
)
def test_cuda_without_a_gpu(text: str, forkserver: ForkServer, tmp_path: Path):
    said = refusal(forkserver, tmp_path, f"import torch\n{text}")
    assert said.startswith("train.py:2: " if Path.cwd() == tmp_path else f"{tmp_path}/train.py:2: ")
    assert "(this machine has no GPU; let the script choose its device" in said


TERMINAL = """
import os, sys
assert os.get_terminal_size().columns == 80
assert os.popen("stty size").read().split() == ["24", "80"]
assert sys.stdin.isatty() and sys.stdout.isatty() and os.isatty(2)
with open("/dev/tty", "w") as terminal:
    terminal.write("seen")
"""


def test_a_script_finds_a_terminal(forkserver: ForkServer, tmp_path: Path):
    assert check_script(script(tmp_path, TERMINAL + TRAIN), forkserver=forkserver, cwd=tmp_path).findings == []


AS_PYTHON = """
import os
several = "RANK" in os.environ
assert several or not {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)
import torch
device = f"cuda:{os.environ['LOCAL_RANK']}" if several else "cpu"
torch.ones(1, device=device)
"""


def test_a_script_that_only_fails_on_two_processes_is_judged_on_one(
    loops: Path, forkserver: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "1")  # of the shell that the check is started in
    text = AS_PYTHON + (loops / "double-step_broken.py").read_text(encoding="utf-8")
    checked = check_script(script(tmp_path, text), forkserver=forkserver, cwd=tmp_path)
    assert [finding.pitfall for finding in checked.findings] == ["double-step"]
    (note,) = [str(note) for note in checked.notes if "2 processes" in str(note)]
    assert note.startswith("it could not be checked on 2 processes: ")
    assert "this machine has no GPU" in note
    assert checked.runs.startswith("ran on one process; ")


def test_a_script_that_only_fails_on_one_process_is_judged_on_two(loops: Path, forkserver: ForkServer, tmp_path: Path):
    text = "import os\nassert os.environ['WORLD_SIZE'] == '2'\n"
    text += (loops / "overlapping-shards_broken.py").read_text(encoding="utf-8")
    checked = check_script(script(tmp_path, text), forkserver=forkserver, cwd=tmp_path)
    assert [finding.pitfall for finding in checked.findings] == ["overlapping-shards"]
    (note,) = [str(note) for note in checked.notes if "one process" in str(note)]
    assert note.startswith("it could not be checked on one process: ")
    assert "assert os.environ['WORLD_SIZE'] == '2'" in note
    assert checked.runs.startswith("ran on 2 processes; ")


def test_a_script_for_launchers_alone_is_run_as_they_do(forkserver: ForkServer, tmp_path: Path):
    text = "import os\nassert os.environ['RANK'] in '01'\nimport torch.distributed\n" + TRAIN
    checked = check_script(script(tmp_path, text), forkserver=forkserver, cwd=tmp_path)
    assert checked.findings == []
    assert checked.runs.startswith("ran on one process; ")


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


def test_services_are_off(forkserver: ForkServer, tmp_path: Path):
    for name, text in SERVICES.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert check_script(script(tmp_path, REPORTS + TRAIN), forkserver=forkserver, cwd=tmp_path).findings == []
    assert sorted(os.listdir(tmp_path)) == ["mlflow.py", "train.py", "wandb.py"]


@pytest.mark.parametrize("text", ["while True:\n    pass", "import time\nprint('waiting')\ntime.sleep(1000)"])
def test_a_script_that_hangs_is_ended_and_its_line_named(text: str, forkserver: ForkServer, tmp_path: Path):
    began = time.monotonic()
    said = refusal(forkserver, tmp_path, text, limit=3)
    assert time.monotonic() - began < 300
    assert "train.py:" in said
    assert "no step of a torch optimizer" in said


def test_a_script_that_cannot_even_be_asked_is_killed(forkserver: ForkServer, tmp_path: Path):
    """Its threads never run: a single C call holds the interpreter."""
    said = refusal(forkserver, tmp_path, "import re\nprint('deep')\nre.match(r'(a+)+$', 'a' * 40 + 'b')", limit=3)
    assert "was not done after 3 seconds; it last said: deep" in said


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


OWN_PROCESSES = {
    "ends": "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(0,))\n    child.start()",
    "waits": "child = torch.multiprocessing.Process(target=time.sleep, args=(60,))\n    child.start(); child.join()",
    "spawns": "pass\n    torch.multiprocessing.spawn(time.sleep, nprocs=1)",
    "runs Python": "pass\n    subprocess.run([sys.executable, '-c', ''])",
    "runs a launcher": "subprocess.run('true')\n    subprocess.Popen(args='torchrun --help > /dev/null', shell=True)",
}


@pytest.mark.parametrize("name", OWN_PROCESSES)
def test_processes_of_its_own_are_named_when_nothing_else_was_seen(name: str, forkserver: ForkServer, tmp_path: Path):
    head = "import multiprocessing, subprocess, sys, time, torch\nif __name__ == '__main__':\n    "
    said = refusal(forkserver, tmp_path, head + OWN_PROCESSES[name], limit=4 if name == "waits" else 60)
    assert f"the processes that {tmp_path}/train.py:4 starts are not observed: use torchrun's way" in said


def test_loader_processes_are_no_processes_of_its_own(forkserver: ForkServer, tmp_path: Path):
    text = "from torch.utils.data import DataLoader\nassert len(list(DataLoader([1, 2], num_workers=1))) == 2\n"
    said = refusal(forkserver, tmp_path, text)
    assert "ended without a step" in said
    assert "are not observed" not in said


def test_megabytes_on_the_way_do_not_matter(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "for _ in range(40):\n    print('x' * 1_000_000)\n" + TRAIN)
    assert check_script(path, forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


def test_another_folder_does_not_matter(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "import os\nos.makedirs('elsewhere')\nos.chdir('elsewhere')\n" + TRAIN)
    before = os.getcwd()
    checked = check_script(path, forkserver=forkserver, limit=60, cwd=tmp_path)
    assert checked.findings == []
    assert os.getcwd() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.py"]


def test_a_slow_script_is_judged_on_what_was_seen(forkserver: ForkServer, tmp_path: Path):
    slow = TRAIN.replace("        optimizer.zero_grad()\n", "        __import__('time').sleep(1.2)\n")
    checked = check_script(script(tmp_path, slow), forkserver=forkserver, limit=8, cwd=tmp_path)
    assert [finding.pitfall for finding in checked.findings] == ["step-without-zero-grad"]
    (note,) = [str(note) for note in checked.notes if "was stopped" in str(note)]
    assert re.fullmatch(r"the run on one process was stopped at update \d+: 8 s of the limit were its own", note)


def test_the_limit_is_for_all_runs_together(forkserver: ForkServer, tmp_path: Path):
    """Where each may take all of it, three runs of a script that hangs would take three times as long."""
    began = time.monotonic()
    said = refusal(forkserver, tmp_path, "import time, torch.distributed\ntime.sleep(1000)", limit=8)
    assert time.monotonic() - began < 3 * 8
    assert "no step of a torch optimizer in" in said


def test_a_script_that_swallows_every_error_is_stopped(forkserver: ForkServer, tmp_path: Path):
    swallowing = TRAIN.replace("range(4)", "range(10**9)").replace(
        "        optimizer.step()\n",
        "        try:\n            optimizer.step()\n        except BaseException:\n            pass\n",
    )
    assert check_script(script(tmp_path, swallowing), forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


def test_arguments_reach_the_script(forkserver: ForkServer, tmp_path: Path):
    path = script(tmp_path, "import sys\nassert sys.argv[1:] == ['--lr', '0.1'], sys.argv\n" + TRAIN)
    assert check_script(path, ["--lr", "0.1"], forkserver=forkserver, limit=60, cwd=tmp_path).findings == []


def test_a_comment_silences_a_finding_of_its_line(loops: Path, forkserver: ForkServer, tmp_path: Path):
    text = (loops / "double-step_broken.py").read_text(encoding="utf-8")
    line = "        optimizer.step()\n"
    silenced = text.replace(line, line.rstrip() + "  # onehour: ignore[double-step]\n")
    assert check_script(script(tmp_path, silenced), forkserver=forkserver, limit=60).findings == []
    other = text.replace(line, line.rstrip() + "  # onehour: ignore[no-warmup]\n")
    assert len(check_script(script(tmp_path, other), forkserver=forkserver, limit=60).findings) == 1


def test_only_and_skip(loops: Path, forkserver: ForkServer):
    path = loops / "double-step_broken.py"
    assert check_script(path, forkserver=forkserver, skip=["double-step"]).findings == []
    assert check_script(path, forkserver=forkserver, only=["no-warmup"]).findings == []
    assert len(check_script(path, forkserver=forkserver, only=["double-step"]).findings) == 1
    with pytest.raises(ValueError, match="no pitfall is called 'doublestep'; expected 'double-step'"):
        check_script(path, forkserver=forkserver, skip=["doublestep"])


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


def test_who_gives_up_leaves_nothing_behind(tmp_path: Path):
    path = script(tmp_path, "import time; time.sleep(1000)")
    with ForkServer() as forkserver:
        assert forkserver._process.stdin is not None
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
