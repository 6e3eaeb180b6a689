"""What is said of a script's error: what, in which line of the user's, and what it often means."""

import runpy
import sys
from pathlib import Path

import pytest

from onehour.check.run.script import in_a_line, place

REFUSED = {
    "needs a file": ("open('data.csv')", "train.py:1: FileNotFoundError: [Errno 2] No such file"),
    "no Python": ("if True\n    pass", "train.py:1: SyntaxError: expected ':'"),
    "missing module": ("import nosuchmodule", "train.py:1: ModuleNotFoundError: No module named 'nosuchmodule'"),
    "asserts": ("x = 1\nassert x == 2", "train.py:2: AssertionError: assert x == 2"),
    "asserts in words": ("assert 1 == 2, 'not equal'", "AssertionError: not equal (assert 1 == 2, 'not equal')"),
    "says nothing": ("raise RuntimeError", "train.py:1: RuntimeError: without a message"),
}
OLD = "(the script seems too old for the installed "
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
NOT_OLD = {
    "not installed": "import nosuchmodule",
    "a module's attribute": "import torch\ntorch.nn.Linear(1, 1).module",
    "an attribute of one's own": "class Own:\n    pass\nOwn().nothing",
    "a keyword of one's own": "def load(path):\n    pass\nload(where=1)",
    "a module of one's own": "from train import nothing",
}
CUDA = (
    *("torch.nn.Linear(1, 1).cuda()", "torch.ones(1, device='cuda:0')", "torch.cuda.set_device(0)"),
    *("torch.cuda.get_device_name()", "torch.cuda.Event().record()", "torch.cuda.synchronize()"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    return tmp_path


def said(folder: Path, text: str) -> str:
    path = folder / "train.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        runpy.run_path(str(path), run_name="__main__")
    assert "\n" not in in_a_line(caught.value)
    return f"{place(caught.value)}: {in_a_line(caught.value)}"


@pytest.mark.parametrize("name", REFUSED)
def test_the_line_and_what_happened_there(name: str, folder: Path):
    text, expected = REFUSED[name]
    assert expected in said(folder, text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("name", TOO_OLD)
def test_a_script_that_is_too_old_is_told_so(name: str, folder: Path):
    text, package = TOO_OLD[name]
    assert OLD + package in said(folder, text)


@pytest.mark.parametrize("name", NOT_OLD)
def test_other_errors_are_not_taken_for_age(name: str, folder: Path):
    assert OLD not in said(folder, NOT_OLD[name])


@pytest.mark.parametrize("text", CUDA)
def test_cuda_without_a_gpu(text: str, folder: Path):
    told = said(folder, f"import torch\n{text}")
    assert told.startswith(f"{folder}/train.py:2: ")
    assert "(this machine has no GPU; let the script choose its device" in told
