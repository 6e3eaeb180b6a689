"""No file can make this project run something: its syntax trees use nothing that would, with the exceptions named."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onehour

SOURCE = Path(onehour.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}

MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm"),
    *("yaml", "ruamel", "code", "codeop", "pty", "imp", "xmlrpc", "telnetlib"),
}
"""Modules whose readers run what they read, or that start a shell or an interpreter."""

CALLS = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module", "execfile"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"),
    *("shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "torch.export.load"),
    "torch.package.PackageImporter",
    *("pandas.read_pickle", "np.fromregex", "importlib.util.spec_from_file_location"),
}
"""Functions that run text, a file or a command line."""

METHODS = {
    *("extract", "extractall", "load_extended", "unsafe_load", "full_load", "run_path", "run_module"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
"""Names of methods and functions, of whatever object: archives' that write files, torch.distributed's that unpickle."""

ALLOWED = {
    ("check/run/script.py", "runpy.run_path"): "`onehour check SCRIPT` is there to run the user's own script",
    ("check/run/script.py", "runpy.run_module"): "`onehour check -- python -m MODULE` is there to run the user's own",
    ("check/watching.py", "torch.distributed.all_gather_object"): "between the processes of the user's job; no file",
    ("data/processes.py", "pickle"): "from a process that it has forked for it; no file",
    ("training/weights.py", "torch.export.load"): "a file that it has just written, by a name that nobody knows yet",
    ("training/console.py", "__import__"): "of a package that is named here, to say whether it is installed",
}
"""(file, what), and why it may."""


def dotted(node: ast.expr) -> str:
    """a.b.c of a name or an attribute; "" of anything else, ".c" of an attribute of it."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives for an argument; None if it gives none, ... if it is no constant."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None


def aliases(tree: ast.AST) -> dict[str, str]:
    """What names of a file stand for: {"sp": "subprocess", "system": "os.system"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(text: str) -> Iterator[str]:
    """Everything in a file that could run what a file holds."""
    tree = ast.parse(text)
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = dotted(node)
            head, _, rest = name.partition(".")
            name = f"{known.get(head, head)}.{rest}" if rest else known.get(head, head)
            if name in CALLS or (isinstance(node, ast.Attribute) and node.attr in METHODS):
                yield name
        elif isinstance(node, ast.Call):
            yield from unsafe(node, known)


def unsafe(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    """What a call's arguments make unsafe."""
    head, _, rest = dotted(call.func).partition(".")
    name = f"{known.get(head, head)}.{rest}" if rest else known.get(head, head)
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("numpy.load", "np.load") and keyword(call, "allow_pickle") not in (None, False):
        yield "numpy.load with allow_pickle"
    if keyword(call, "shell") not in (None, False):
        yield f"{name} with shell"


def test_no_file_runs_what_it_reads():
    for name, path in FILES.items():
        found = {use for use in uses(path.read_text(encoding="utf-8")) if (name, use) not in ALLOWED}
        assert not found, name


def test_every_exception_is_still_needed():
    for name, use in ALLOWED:
        assert use in set(uses(FILES[name].read_text(encoding="utf-8"))), f"{name} has no {use}"


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from pickle import loads", "import yaml", "eval('1')", "run = exec", "import marshal"),
        *("import os\nos.system('x')", "from os import system\nsystem('x')", "import os as o\no.popen('x')"),
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.run('x', shell=yes)",
        *("import torch\ntorch.load('x')", "import torch\ntorch.load('x', weights_only=False)"),
        *("from torch import load\nload('x')", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        *("archive.extractall()", "dist.all_gather_object(a, b)", "import runpy\nrunpy.run_path('x')"),
        *("import shutil\nshutil.unpack_archive('x')", "import shelve as s", "compile('x', 'y', 'exec')"),
    ],
)
def test_each_of_them_would_be_found(text: str):
    assert set(uses(text))


@pytest.mark.parametrize(
    "text",
    [
        *("model.eval()", "re.compile('x')", "torch.compile(model)", "numpy.load('x')", "executor.submit(run)"),
        *("torch.load('x', 'cpu', weights_only=True)", "subprocess.run(['x'])", "subprocess.run(['x'], shell=False)"),
        *("import pickletools", "def load(x): ...\nload('x')", "archive.extractfile(member)"),
    ],
)
def test_what_only_looks_like_them_is_not(text: str):
    assert not set(uses(text))


WRITERS = re.compile(
    r"\.write_(?:text|bytes)\(|\bopen\([^)]*[\"'][rb]*[wax]|\.(?:unlink|rename|rmdir|touch|symlink_to)\(|\bO_CREAT\b|\brmtree\("
    r"|\bos\.(?:replace|rename|remove|unlink|link|symlink|truncate)\("
)
"""What makes, changes or removes a file by its path, and so would follow a link on the way."""

MAY_WRITE = {
    "files.py": "here it is done, for all others",
    "lock.py": "the lock itself",
    "check": "a script's own files, into an overlay and folders that it has just made",
    "training/record.py": "a run's folder as a whole, under another name beside it",
    "training/recorder.py": "a file whose name nobody can know",
    "training/checkpoint.py": "below the run's folder that is held open",
    "dist/watchdog.py": "with O_NOFOLLOW",
    "sweeps/verify.py": "a folder that it has just made",
    "cli/verify.py": "a folder that it has just made",
    "leaving.py": "a folder that it has just made",
    "sweeps/pool.py": "through open_inside",
}


def test_one_module_writes_for_all_others():
    for name, path in FILES.items():
        text = re.sub(r"(?m)^\s*(?:>>>|\.\.\.) .*$|#.*$", "", path.read_text(encoding="utf-8"))
        assert not WRITERS.findall(text) or name in MAY_WRITE or name.split("/")[0] in MAY_WRITE, name


def test_every_module_that_may_write_does():
    for name in MAY_WRITE:
        texts = [path.read_text(encoding="utf-8") for path in FILES.values() if path.is_relative_to(SOURCE / name)]
        assert any(map(WRITERS.search, texts)), name
