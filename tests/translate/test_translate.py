"""`onehour plan --as`: what every translation holds, what cannot be translated, and what timm makes of its own."""

import argparse
import ast
import importlib
import shlex
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
from torch import nn

import onehour
from onehour.cli import main
from onehour.models.resnet import resnet8
from onehour.planner import plan
from onehour.training.build import build_optimizer
from onehour.translate import TOOLS, translate
from onehour.translate.values import OPTIMIZERS, schedule_code, values_of
from tests.translate.act import settings, small

PYTHON = sorted(set(TOOLS) - {"timm"})


@pytest.mark.parametrize("tool", TOOLS)
def test_the_command_prints_the_translation(tool: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "resnet50", "--minibatch", "8k", "--processes", "64", "--as", tool]) == 0
    heard = capsys.readouterr()
    assert heard.err == ""
    assert heard.out == translate(plan("resnet50", minibatch=8192, processes=64), tool) + "\n"
    assert max(map(len, heard.out.splitlines())) <= 120
    assert "8192: 64 × 4 × 32 (processes, passes, images), 14076 updates." in heard.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("resnet50 --as tim", "no tool is called 'tim'; expected timm"),
        ("resnet50 --as pytorch", "no tool is called 'pytorch'; expected torch"),
        ("resnet50 --as keras", "expected one of torch, timm, lightning, accelerate, hf"),
        ("--base 0.1@256 --minibatch 8k --as torch", "needs the number of training samples; give --samples N"),
        ("resnet50 --minibatch 256,8k --as torch", "--as translates one plan, got 2"),
        ("resnet50 --as torch --json", "give --as or --json, not both"),
        ("resnet50 --minibatch 8k --processes 3 --as hf", "256 workers (k = kn / n) do not divide evenly among 3"),
        ("resnet50 --minibatch 6k --processes 5 --as hf", "use --processes 4 or 6, or `onehour train`"),
        ("resnet50 --processes 9 --as hf", "9 processes cannot share 8 workers"),
        ("resnet50 --label-smoothing 0.1 --as timm", "label_smoothing is not translated; leave it out here"),
        ("resnet50 --precision float64 --as torch", "precision float64 is not translated; use --precision float32 or"),
        ("resnet50 --layer-rates fc.*=10 --as torch", "layer_rates is not translated; leave it out"),
        ("resnet50 --ema 0.999 --as timm", "ema is not translated; leave it out"),
        ("resnet50 --epochs 2.5 --as torch", "other tools count whole epochs, and epochs is 2.5"),
        ("resnet50 --optimizer my.module:Mine --as torch", "optimizer my.module:Mine is your own"),
    ],
)
def test_what_cannot_be_translated_is_one_message(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *flags.split()]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    (line,) = heard.err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("processes", "expected", "start"),
    [
        (None, (256, 1, 32), "torchrun --nnodes 32 --nproc-per-node 8 "),
        (64, (64, 4, 8), "torchrun --nnodes 8 --nproc-per-node 8 "),
        (4, (4, 64, 1), "torchrun --nproc-per-node 4 "),
        (1, (1, 256, 1), "torchrun --nproc-per-node 1 "),
    ],
)
def test_workers_become_processes_and_passes_on_machines_of_eight(processes: int | None, expected: Any, start: str):
    made = plan("resnet50", minibatch=8192, processes=processes)
    values = values_of(made)
    assert (values["processes"], values["passes"], values["nodes"]) == expected
    assert values["processes"] * values["passes"] * values["per_worker"] == 8192
    assert start in translate(made, "torch")


@pytest.mark.parametrize("tool", PYTHON)
def test_the_code_is_python_that_imports_the_rules(tool: str):
    text = translate(plan("resnet50", minibatch=8192), tool)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in found if node.module == "onehour" for alias in node.names}
    rules = {"Minibatch", "SampleStream", "ScheduleLR", "init_weights_", "parameter_groups"}
    assert names == rules | {"gradual_warmup", "step_decay"} <= set(onehour.__all__)


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_left_open_has_its_remedy(tool: str):
    text = translate(plan("digits", minibatch=64, processes=2), tool)
    head, _, tail = text.partition("\n# What is left to you, and how to do it:\n")
    lines = tail.splitlines()
    assert head
    assert all(line.startswith("# ") for line in lines)
    numbers = [line.split()[1] for line in lines if line[2].isdigit()]
    assert numbers == [f"{number}." for number in range(1, len(numbers) + 1)]
    assert len(numbers) >= 4
    assert sum(line.startswith("#    → ") for line in lines) == len(numbers)
    assert "convert_batchnorm(model, per_worker=16)" in tail
    assert "init_weights_(model)" in text
    assert "init_weights_(model, zero_gamma=False)" in translate(plan("digits", zero_gamma=False), tool)


@pytest.mark.parametrize("warmup", ["gradual", "constant", "none"])
@pytest.mark.parametrize("decay", ["step", "cosine"])
@pytest.mark.parametrize("scaling", ["linear", "sqrt", "fixed"])
@pytest.mark.parametrize("factor", [0.1, 0.7])
def test_the_text_of_the_rate_is_the_schedule_to_the_bit(warmup: str, decay: str, scaling: str, factor: float):
    drops = {"milestones": ("3", "16", "64/3"), "decay_factor": factor}
    recipe = plan("digits", minibatch=256, warmup=warmup, decay=decay, scaling=scaling, **drops).recipe
    schedule = eval(schedule_code(recipe), {name: getattr(onehour, name) for name in onehour.__all__})
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
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("model", "word"), [("timm:resnet26d", "resnet26d"), ("timm:a b", "'a b'"), ("x:y", "MODEL")])
def test_what_timm_is_told(model: str, word: str):
    changes = {"precision": "bf16", "channels_last": True, "compile": True, "zero_gamma": False}
    said = " ".join(translate(plan("digits", model=model, **changes), "timm").replace("\\\n", "").split())
    assert f"--model {word} " in said
    assert "--amp --amp-dtype bfloat16 --channels-last --torchcompile --model-kwargs zero_init_last=False" in said


RATES = [{}, {"decay": "cosine"}, {"warmup": "constant"}, {"warmup": "none"}]


def rate_lines(text: str) -> str:
    """The code that a translation for timm asks to put into train.py."""
    return "\n".join(line.removeprefix("#     ") for line in text.splitlines()[:9] if line.startswith("#     "))


@pytest.mark.parametrize("changes", RATES, ids=str)
def test_the_lines_for_timm_give_our_rate(changes: dict[str, Any]):
    optimizer, scheduler = argparse.Namespace(param_groups=[{}, {}]), argparse.Namespace()
    exec(rate_lines(translate(plan(small(**changes)), "timm")), {"lr_scheduler": scheduler, "optimizer": optimizer})
    for update in range(500):
        assert scheduler._get_lr(update) == [small(**changes).schedule(update * 48 / 1000)] * 2


def parsed(text: str) -> argparse.Namespace:
    """The options as timm's train.py has them."""
    options: dict[str, Any] = {"momentum": 0.9, "min_lr": 0.0, "opt_kwargs": {}}
    for flag in text.partition("train.py")[2].split("\n\n")[0].replace("\\\n", " ").split(" --")[1:]:
        name, *values = shlex.split(flag)
        value = values[0].rpartition("=")[2] if values else "True"
        found = ast.literal_eval(value) if value[0].isdigit() or not values else value
        found = tuple(map(float, values)) if name == "opt-betas" else found
        options[name.replace("-", "_")] = {"alpha": found} if name == "opt-kwargs" else found
    return argparse.Namespace(**options)


@pytest.mark.vision
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", RATES, ids=str)
def test_timm_has_our_rate_at_every_update(changes: dict[str, Any]):
    text, recipe = translate(plan(small(**changes), processes=2), "timm"), small(**changes)
    options, optim, made = parsed(text), *map(importlib.import_module, ("timm.optim", "timm.scheduler"))
    optimizer = optim.create_optimizer_v2(resnet8(), **optim.optimizer_kwargs(cfg=options), **options.opt_kwargs)
    scheduler, epochs = made.create_scheduler_v2(optimizer, **made.scheduler_kwargs(options), updates_per_epoch=20)
    assert epochs == recipe.epochs
    exec(rate_lines(text), {"lr_scheduler": scheduler, "optimizer": optimizer})
    for update in range(500):
        assert {group["lr"] for group in optimizer.param_groups} == {recipe.schedule(update * 48 / 1000)}
        scheduler.step_update(num_updates=update + 1)  # as train.py does


@pytest.mark.vision
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_timms_optimizer_is_ours(name: str, momentum: float, nesterov: bool):
    recipe = small(optimizer=name, scaling="sqrt", momentum=momentum, nesterov=nesterov)
    options, optim = parsed(translate(plan(recipe), "timm")), importlib.import_module("timm.optim")
    model = resnet8()
    optimizer = optim.create_optimizer_v2(model, **optim.optimizer_kwargs(cfg=options), **options.opt_kwargs)
    expected = build_optimizer(recipe, model)
    assert type(optimizer) is type(expected)
    for group in optimizer.param_groups:
        like = next(g for g in expected.param_groups if g["weight_decay"] == group["weight_decay"])
        assert settings(group) == settings(like)
    ours, theirs = ({id(p) for p in o.param_groups[i]["params"]} for o, i in ((expected, 1), (optimizer, 0)))
    (classifier,) = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert theirs - ours == {id(classifier.bias)}  # which is said
