"""A module of somebody's that does on import what only a script should: one message that names the line."""

from pathlib import Path

import pytest

from onehour.cli import main

MODULES = {
    "parses": ("import argparse\np = argparse.ArgumentParser()\np.add_argument('--x')\np.parse_args()", "parses.py:4"),
    "needs": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('x')\np.parse_args(['--no'])",
        "needs.py:4",
    ),
    "leaves": ("import sys\nsys.exit('bye')", "SystemExit: bye"),
    "odd": ("class Odd(BaseException): pass\nraise Odd('strange')", "Odd: strange"),
    "called": ("import sys\ndef net(): sys.exit(3)", "code that was called leaves Python: SystemExit: 3"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_leaves_python_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    source, said = MODULES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["onehour", "train", "--odd"])
    Path(f"of_test_entry_{name}.py").write_text(source)
    assert main(["train", "digits", "--model", f"of_test_entry_{name}:net", "--out", "run"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert said in told
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("can't start new thread"), "no more threads or processes"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "memory ran out while Python imported"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_runs_out_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, said: str
):
    def fails(*arguments: object) -> int:
        raise error

    monkeypatch.setattr("onehour.cli.plan_command", fails)
    assert main(["plan", "digits"]) == (75 if isinstance(error, KeyboardInterrupt) else 2)
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
