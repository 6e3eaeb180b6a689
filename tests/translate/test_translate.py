"""`onehour plan --as`: what every translation holds, and what cannot be translated."""

import ast
import subprocess
import sys
from fractions import Fraction

import pytest

import onehour
from onehour.cli import main
from onehour.planner import plan
from onehour.translate import TOOLS, translate
from onehour.translate.job import Job, rules_in, schedule_code

PYTHON = sorted(set(TOOLS) - {"timm"})


@pytest.mark.parametrize("tool", TOOLS)
def test_the_command_prints_the_translation(tool: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "resnet50", "--minibatch", "8k", "--processes", "64", "--as", tool]) == 0
    heard = capsys.readouterr()
    assert heard.err == ""
    assert heard.out == translate(plan("resnet50", minibatch=8192, processes=64), tool) + "\n"
    assert max(map(len, heard.out.splitlines())) <= 120
    assert "64 processes × 4 passes × 32 images = 8192 an update, 14076 updates." in heard.out.replace("\n# ", " ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("resnet50 --as tim", "no tool is called 'tim'; expected timm"),
        ("resnet50 --as pytorch", "no tool is called 'pytorch'; expected torch"),
        ("resnet50 --as keras", "expected one of torch, timm, lightning, accelerate, hf"),
        ("--base 0.1@256 --minibatch 8k --as torch", "needs the number of training samples; give --samples N"),
        ("resnet50 --minibatch 256,8k --as torch", "--as translates one minibatch, got 2"),
        ("resnet50 --as torch --json", "give --as or --json, not both"),
        ("resnet50 --minibatch 8k --processes 3 --as hf", "256 workers (k = kn / n) do not divide evenly among 3"),
        ("resnet50 --minibatch 8k --processes 3 --as hf", "use --processes 2 or 4, or `onehour train`"),
        ("resnet50 --processes 9 --as hf", "9 processes cannot share 8 workers"),
        ("resnet50 --precision float64 --as torch", "precision float64 is not translated; use --precision float32 or"),
        ("resnet50 --optimizer my.module:Mine --as torch", "optimizer my.module:Mine is your own"),
        ("resnet50 --minibatch 8k --warmup constant --as timm", "timm's schedulers have no constant warmup"),
    ],
)
def test_what_cannot_be_translated_is_one_message(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *flags.split()]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    (line,) = heard.err.splitlines()
    assert message in line


def test_a_tool_without_flags_of_its_own_is_refused_by_the_function_too():
    with pytest.raises(ValueError, match="expected lightning"):
        translate(plan("digits"), "lightening")


@pytest.mark.parametrize(("processes", "expected"), [(None, (256, 1)), (8, (8, 32)), (1, (1, 256))])
def test_workers_become_processes_and_passes(processes: int | None, expected: tuple[int, int]):
    job = Job.of(plan("resnet50", minibatch=8192, processes=processes))
    assert (job.processes, job.passes) == expected
    assert job.processes * job.passes * job.recipe.per_worker == 8192


@pytest.mark.parametrize(("processes", "machines"), [(1, (1, 1)), (8, (1, 8)), (64, (8, 8)), (4, (1, 4)), (2, (1, 2))])
def test_machines_hold_up_to_eight(processes: int, machines: tuple[int, int]):
    assert Job.of(plan("resnet50", minibatch=8192, processes=processes)).machines == machines


@pytest.mark.parametrize("tool", PYTHON)
def test_the_code_is_python_that_imports_the_rules(tool: str):
    text = translate(plan("resnet50", minibatch=8192), tool)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in found if node.module == "onehour" for alias in node.names}
    rules = {"Minibatch", "SampleStream", "ScheduleLR", "parameter_groups", "gradual_warmup", "step_decay"}
    assert names == rules <= set(onehour.__all__)
    assert "\n# What " in text


@pytest.mark.parametrize("tool", TOOLS)
def test_every_limit_has_its_remedy(tool: str):
    _, _, tail = translate(plan("resnet50", minibatch=8192, processes=8), tool).partition("and the remedy:\n")
    lines = tail.splitlines()
    assert all(line.startswith("# ") for line in lines)
    heads = [line.split()[1] for line in lines if line[2].isdigit()]
    assert heads == [f"{number}." for number in range(1, len(heads) + 1)]
    assert len(heads) >= 5
    assert sum(line.startswith("#    → ") for line in lines) == len(heads)


def test_limits_are_those_of_the_job():
    def said(**changes) -> str:
        return " ".join(translate(plan("digits", minibatch=64, **changes), "torch").replace("\n#     ", "").split())

    assert "convert_batchnorm(model, per_worker=16), then BATCH = 32" in said(processes=2)
    assert "convert_batchnorm" not in said(processes=4)
    assert "len(validation)" in said(processes=2)
    assert "len(validation)" not in said(processes=1)
    assert "init_weights_(model) before" in said()
    assert "init_weights_(model, zero_gamma=False) before" in said(zero_gamma=False)


@pytest.mark.parametrize("warmup", ["gradual", "constant", "none"])
@pytest.mark.parametrize("decay", ["step", "cosine"])
@pytest.mark.parametrize("scaling", ["linear", "sqrt", "fixed"])
@pytest.mark.parametrize("factor", [0.1, 0.7])
def test_the_text_of_the_rate_is_the_schedule_to_the_bit(warmup: str, decay: str, scaling: str, factor: float):
    drops = {"milestones": ("3", "16", "64/3"), "decay_factor": factor}
    changes = {"warmup": warmup, "decay": decay, "scaling": scaling, **drops}
    recipe = plan("digits", minibatch=256, **changes).recipe
    code = schedule_code(Job.of(plan(recipe)))
    schedule = eval(code, {name: getattr(onehour, name) for name in rules_in(code)})
    edges = [Fraction(n, d) for n, d in [(0, 1), (3, 1), (5, 1), (16, 1), (64, 3), (24, 1), (25, 1)]]
    near = [float(edge) + step for edge in edges for step in (-1e-3, 0, 1e-3) if edge + step >= 0]
    for epoch in [*near, *(t * 256 / 8192 for t in range(768))]:
        assert schedule(epoch) == recipe.schedule(epoch)


def test_a_plan_in_the_words_of_a_tool_needs_no_torch():
    code = (
        "import sys; from onehour.cli import main\n"
        + "".join(f"assert main(['plan', 'digits', '--as', '{tool}']) == 0\n" for tool in TOOLS)
        + "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
