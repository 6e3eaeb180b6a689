"""The command line: what it does, and one clear message for everything that cannot be done."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onehour.cli import main
from onehour.recipes import digits
from onehour.training.record import Run
from onehour.translate import TEMPLATES

MALFORMED = 'name = "mine"\nminibatch = 64\nepochs = = 3\n'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--minibatch 100", "minibatch 100 is not a multiple of per_worker 16"),
        ("--minibatch 100", "use 96 or 112, or another per_worker"),
        ("--minibatch 32 --processes 3", "3 processes cannot share 2 workers (k = kn / n)"),
        ("--minibatch 16k", "minibatch 16384 is larger than the data set of 8192 samples"),
        ("--minibatch many", "'many' is not a size; expected a positive whole number such as 256 or 8k (k = 1024)"),
        ("--minibatch -32", "not a size"),
        ("--minibach 64", "unknown argument '--minibach'; expected --minibatch"),
        ("--minibatch=64 --epoch=3", "unknown argument '--epoch=3'; expected --epochs"),
        ("--base-lr -0.1", "base_lr must be finite and not below zero, got -0.1"),
        ("--base-lr fast", "fast"),
        ("--weight-decay -1e-4", "weight_decay must be finite and not below zero, got -0.0001"),
        ("--epochs 3 --warmup-epochs 5", "warmup_epochs 5 is longer than the run of 3 epochs"),
        ("--scaling linaer", "scaling is 'linaer'; expected linear"),
        ("--workers 8", "k = kn / n, with --minibatch and --per-worker. Processes that load data are --loaders"),
        ("--workers=8", "--loaders"),
        ("--workers-per-pass 0", "workers_per_pass must be above zero"),
        ("--workers-per-pass few", "expected auto or a whole number, got 'few'"),
        ("--loaders -2", "loaders must be above zero"),
        ("--processes 0", "processes must be above zero"),
        ("--device tpu", "tpu"),
        ("--model resnet5", "no model is called 'resnet5'; expected resnet50"),
        ("--model nowhere:net", "nowhere cannot be imported"),
        ("--model tinytask:failing", "model tinytask:failing failed when called: RuntimeError: no disk"),
        ("--model tinytask:net", "the model cannot take the data's images (1, 8, 8)"),
        ("--log tensorbord", "no logger is called 'tensorbord'; expected tensorboard"),
        ("--log tinytask:Silent", "has no method finish"),
        ("--samples 9000", "--samples is read from the data; only `onehour plan`, which reads no data, takes it"),
        ("extra", "unknown argument 'extra'"),
    ],
)
def test_bad_input_is_one_message(tiny: ModuleType, alone: Path, refused: Any, flags: str, message: str):
    assert message in refused(["train", "digits", *flags.split()])
    assert list(alone.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digts"], "no recipe is called 'digts'; expected digits"),
        (["train"], "RECIPE"),
        (["trian", "digits"], "no command is called 'trian'; expected train; see `onehour --help`"),
        (["trace-for"], "no command is called 'trace-for'; expected one of train, plan, sweep, report, verify, check,"),
        (["data", "pak"], "no command is called 'pak'; expected pack; see `onehour data --help`"),
        ([], "COMMAND"),
        (["train", "missing.toml"], "missing.toml cannot be read: No such file or directory"),
        (["train", "resnet50"], "this recipe needs data; give --data"),
        (["plan"], "plan needs a RECIPE or --base LR@MINIBATCH"),
        (["plan", "digits", "--base", "0.1@256"], "and not both"),
        (["plan", "--base", "0.1"], "--base is '0.1'; expected a rate and its minibatch, for example 0.1@256"),
        (["plan", "--base", "fast@256"], "--base is 'fast@256'"),
        (["plan", "--base", "0.1@many"], "'many' is not a size"),
        (["plan", "digits", "--run", "nowhere"], "nowhere is not a run's folder"),
        (["plan", "digits", "--run", "x", "--images-per-second", "9"], "not both"),
        (["plan", "digits", "--images-per-second", "-9"], "images_per_second must be finite and not below zero"),
        (["plan", "digits", "--processes", "64"], "64 processes cannot share 2 workers"),
        (["plan", "digits", "--minibatch", "32,33"], "minibatch 33 is not a multiple"),
        (["plan", "digits", "--minibatch", "32,many"], "'many' is not a size"),
        (["plan", "resnet50", "--milestones", "1e400"], "milestone '1e400' is not an epoch"),
        (["plan", "digits", "--minibach", "32"], "expected --minibatch"),
        (["plan", "digits", "--epochs", "1.5s"], "--epochs: invalid float value: '1.5s'"),
        (["plan", "digits", "--minibatch", "256,1k", "--ramp", "256:8"], "must end below minibatch 256"),
        (["plan", "digits", "--holds-to", "512"], "--holds-to takes an interval of minibatches, for example 512,2k"),
        (
            ["plan", "resnet50", "--minibatch", "256,8k", "--images-per-second", "9"],
            "--images-per-second applies to one minibatch; for several give --run",
        ),
        (["train", "digits", "--restarts", "-1"], "restarts must not be below zero, got -1"),
        (
            ["train", "digits", "--reduce", "canonical", "--workers-per-pass", "2", "--minibatch", "64"],
            "canonical_pass = 1",
        ),
        (["train", "digits", "--reduce", "canonical", "--threads", "2"], "canonical_threads"),
        (["sweep", "digits", "--processes", "0"], "processes must be above zero, got 0"),
        (["sweep", "digits", "--dry-run", "--margin", "0"], "margin must be above zero, got 0.0"),
        (["sweep", "digits", "--dry-run", "--looks", "0"], "looks must be above zero, got 0"),
        (["verify"], "needs a RECIPE, or --model and --data"),
        (["verify", "digits", "--processes", "2"], "two different numbers"),
        (["verify", "digits", "--processes", "1,two"], "expected numbers such as 1,2,4"),
        (["verify", "digits", "--steps", "0"], "steps must be above zero"),
    ],
)
def test_bad_commands_are_one_message(alone: Path, refused: Any, arguments: list[str], message: str):
    assert message in refused(arguments)


def test_a_command_that_is_refused_leaves_the_old_run_in_its_place(tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.toml").write_text(digits().to_toml())
    command = ["train", "digits", "--out", str(tmp_path / "old"), "--fresh", "--reduce", "canonical"]
    assert main([*command, "--workers-per-pass", "2"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_the_command_that_resumes_a_run_can_be_typed(tmp_path: Path, refused: Any):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "recipe.toml").write_text(digits().to_toml())
    assert f"`onehour train '{run}/recipe.toml' --out '{run}'` resumes it" in refused(["train", str(run)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MALFORMED, "line 3"),
        ('name = "mine"\nminibach = 64\n', "a recipe has no 'minibach'; expected minibatch"),
        ("\x00", "line 1"),
    ],
)
def test_a_recipe_file_with_a_mistake_names_file_and_place(alone: Path, refused: Any, text: str, message: str):
    (alone / "mine.toml").write_text(text)
    line = refused(["train", "mine.toml"])
    assert line.startswith("mine.toml: ")
    assert message in line


def test_a_run_ends_with_its_outcome_and_the_same_command_prints_it_again(
    command: list[str], capsys: pytest.CaptureFixture[str], alone: Path
):
    assert main(command) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert "writes" in first.out
    outcome = first.out[first.out.index("final error") :]
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"{alone / 'run'} is finished; --fresh starts over and keeps it under a numbered name\n")
    assert again.endswith(outcome)
    assert "epoch " not in again


def test_fresh_says_where_the_old_run_went(command: list[str], capsys: pytest.CaptureFixture[str], alone: Path):
    assert main(command) == 0
    assert main([*command, "--fresh", "--seed", "1"]) == 0
    assert f"kept the old run as {alone / 'run.1'}" in capsys.readouterr().out
    assert [Run(alone / name).recipe.seed for name in ("run.1", "run")] == [0, 1]


def test_a_refused_command_leaves_the_old_folder_where_it_is(command: list[str], refused: Any, alone: Path):
    """Also what is found last, a port in use: --fresh moves nothing before the new run can begin."""
    assert main(command) == 0
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = str(other.getsockname()[1])
        line = refused([*command, "--fresh", "--processes", "2", "--port", port])
    assert f"port {port} cannot be used" in line
    assert [path.name for path in alone.iterdir()] == ["run"]


def test_not_finite_leaves_with_4(command: list[str], capsys: pytest.CaptureFixture[str], alone: Path):
    assert main([*command, "--data", "tinytask:poisoned"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("onehour: the loss or a gradient was not finite at iteration ")
    assert Run(alone / "run").summary["outcome"] == "non-finite"


def test_out_of_memory_before_the_run_is_one_message_too(command: list[str], refused: Any):
    assert "out of memory" in refused([*command, "--model", "tinytask:Giant"])


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    tiny: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    alone: Path,
):
    monkeypatch.setattr(tiny.Remembering, "log", lambda self, record: signal.raise_signal(signal.SIGTERM))
    stopping = [*command, "--log", "tinytask:Remembering"]
    assert main(stopping) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "onehour: stopped after iteration 7 and saved; the same command goes on from there"
    monkeypatch.undo()
    os.chdir(alone)
    assert main(stopping) == 0
    assert "resumes" in capsys.readouterr().out
    assert main([*command[:-1], str(alone / "undisturbed")]) == 0
    assert len({Run(alone / name).summary["state_sha256"] for name in ("run", "undisturbed")}) == 1


def test_flags_reach_the_recipe_and_the_run(command: list[str], alone: Path):
    flags = "--seed 3 --no-nesterov --milestones 1,3/2 --save-every 5 --workers-per-pass 1 --loaders 0 --profile 1"
    assert main([*command, *flags.split()]) == 0
    run = Run(alone / "run")
    assert (run.recipe.seed, run.recipe.nesterov, run.recipe.milestones) == (3, False, ("1", "3/2"))
    (session,) = json.loads((run.folder / "environment.json").read_text())["sessions"]
    assert (session["workers_per_pass"], session["loaders"]) == (1, 0)
    assert (run.folder / "trace-0.json").exists()


NO_TORCH = """
import sys, onehour
from onehour.cli import main
for arguments in {}:
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    assert not code, arguments
print(onehour.plan("resnet50", minibatch=8192, processes=8)["iterations"].value)
assert not {{"torch", "numpy"}} & set(sys.modules)
"""


def test_help_and_plans_do_not_wait_for_torch():
    """It takes seconds to import."""
    commands = [
        *(["--help"], ["train", "--help"], ["plan", "resnet50", "--minibatch", "8k", "--processes", "8"]),
        ["plan", "--base", "0.1@256", "--samples", "1281167", "--minibatch", "256,8k", "--json"],
        *(["plan", "digits", "--as", tool] for tool in TEMPLATES),
    ]
    command = [sys.executable, "-W", "error", "-c", NO_TORCH.format(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n14076\n")


@pytest.mark.usefixtures("forked")
def test_two_processes_from_one_command(command: list[str], alone: Path, environ: dict[str, str]):
    (alone / "run").mkdir()
    (alone / "run" / "old").touch()
    command += ["--processes", "2", "--threads", "1", "--fresh"]
    started = [sys.executable, "-m", "onehour", *command]
    done = subprocess.run(started, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("digits: minibatch 8 = 2 workers × 4 on 2 processes") == 1
    assert done.stdout.startswith(f"kept the old run as {alone / 'run.1'}\n")
    assert [line.split()[0] for line in done.stdout.splitlines()][-1] == "curve"
    assert (alone / "run.1" / "old").exists()
    run = Run(alone / "run")
    assert run.finished
    (session,) = json.loads((run.folder / "environment.json").read_text())["sessions"]
    assert session["processes"] == 2
    assert len(run.metrics) == 2


@pytest.mark.usefixtures("forked")
def test_what_is_wrong_in_a_started_process_is_said_once(
    command: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "1")  # so that what `launch` sets is put back
    assert main([*command, "--data", "tinytask:poisoned", "--processes", "2"]) == 4
    said = capfd.readouterr().err
    assert said.count("was not finite") == 1
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("launched", [True, False])
def test_one_of_several_processes_leaves_without_the_interpreters_shutdown(launched: bool):
    """Gloo's threads now and then abort it ("terminate called without an active exception")."""
    code = "import atexit, sys; atexit.register(print, 'shut down'); sys.argv[1:] = ['plan', 'digits']"
    code += "; from onehour.__main__ import run; run()"
    environment = os.environ | ({"RANK": "0", "WORLD_SIZE": "1"} if launched else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "target_lr" in done.stdout
    assert ("shut down" in done.stdout) != launched
