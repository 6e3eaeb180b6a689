"""`onehour plan --as`: what translations hold, what cannot be translated, what each tool makes of its own."""

import argparse
import ast
import importlib
import os
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import act
import pytest
import torch
from act import settings, small
from torch import nn
from torch.utils.data import TensorDataset

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.models.resnet import resnet8
from onehour.planner import plan
from onehour.recipes import resnet50
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.initialize import init_weights_, last_batchnorms
from onehour.rules.shuffle import SampleStream
from onehour.training.build import build_optimizer
from onehour.translate import OPTIMIZERS, TEMPLATES, schedule_code, translate, values_of

PYTHON = sorted(set(TEMPLATES) - {"timm"})


@pytest.mark.parametrize("tool", TEMPLATES)
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
        ("resnet50 --random-erasing 0.5 --as torch", "random_erasing is not translated; leave it out here"),
        ("resnet50 --task my.module:loss --as torch", "task is not translated; leave it out here"),
        ("resnet50 --task a:b --collate a:c --as hf", "task is not translated; leave it out here"),
        ("resnet50 --pitfall warmup-per-epoch --as timm", "pitfall warmup-per-epoch is not translated; leave it out"),
        ("resnet50 --layer-rates fc.*=10 --as torch", "layer_rates is not translated; leave it out"),
        ("resnet50 --ema 0.999 --as timm", "ema is not translated; leave it out"),
        ("resnet50 --epochs 2.5 --as torch", "other tools count whole epochs, and epochs is 2.5"),
        ("resnet50 --optimizer my.module:Mine --as torch", "optimizer my.module:Mine is your own"),
    ],
)
def test_what_cannot_be_translated_is_one_message(flags: str, message: str, refused: Any):
    assert message in refused(["plan", *flags.split()])


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


@pytest.mark.parametrize("tool", TEMPLATES)
def test_a_name_stays_in_its_comment(tool: str):
    made = translate(plan(resnet50(name="a\nimport os\r\u2028$minibatch")), tool)
    assert "# a\\nimport os\\r\\u2028$minibatch at minibatch 256: " in made


@pytest.mark.parametrize("tool", PYTHON)
def test_the_code_is_python_that_imports_the_rules(tool: str):
    text = translate(plan("resnet50", minibatch=8192), tool)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in found if node.module == "onehour" for alias in node.names}
    rules = {"Minibatch", "SampleStream", "ScheduleLR", "init_weights_", "parameter_groups"}
    assert names == rules | {"gradual_warmup", "step_decay"} <= set(onehour.__all__)


@pytest.mark.parametrize("tool", TEMPLATES)
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


RECIPES = [
    *(small(), small(warmup="constant"), small(decay="cosine", warmup="constant")),
    *(small(decay="cosine", warmup="none"), small(scaling="sqrt"), small(milestones=("3", "5", "31/3"))),
    *(small(milestones=()), small(base_minibatch=96)),
    *(plan("resnet50", minibatch=8192).recipe, plan("digits", minibatch=256).recipe),
]
# Their own imports warn, and starting processes that import them takes long.
theirs = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]
FRAMEWORKS = [pytest.param(name, marks=theirs) for name in ("accelerate", "lightning", "hf")]


def executed(recipe: Recipe, processes: int | None = None, tool: str = "torch") -> dict[str, Any]:
    """What the translation of a recipe on p processes defines."""
    return act.execute(translate(plan(recipe, processes=processes), tool))


def alone(tool: str, folder: Path) -> tuple[nn.Module, list[float]]:
    """A whole run in this process: the net and its rates."""
    return act.act(tool, executed(small(), 1, tool), folder)


def rates(namespace: dict[str, Any], count: int) -> list[float]:
    """What the translation's optimizer has at each of `count` updates, stepped as its loop steps it."""
    optimizer, scheduler = namespace["make_optimizer"](nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    found = []
    for _ in range(count):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)
        optimizer.step()
        scheduler.step()
    return found


def expected(recipe: Recipe) -> list[float]:
    """The recipe's rate at each update."""
    samples = recipe.samples or 0
    updates = recipe.workers.iterations(samples, recipe.epochs)
    return [recipe.schedule(t * recipe.minibatch / samples) for t in range(updates)]


def distance(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of weights; running statistics move once a pass, so they depend on the passes."""
    assert state.keys() == other.keys()
    return max(
        float((state[key] - other[key]).abs().max()) for key in state if "running" not in key and "num" not in key
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_rate_is_ours(recipe: Recipe):
    namespace = executed(recipe)
    assert rates(namespace, namespace["UPDATES"]) == expected(recipe)


@pytest.mark.parametrize("tool", ["torch", *FRAMEWORKS])
def test_a_whole_run_has_our_rates_and_the_weights_of_plain_torch(tool: str, tmp_path: Path):
    """Which they would not be with another mean, a clipped gradient, or other samples."""
    model, seen = alone(tool, tmp_path)
    assert seen == expected(small())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert distance(model.state_dict(), alone("torch", tmp_path)[0].state_dict()) <= 1e-9


@pytest.mark.parametrize("tool", [pytest.param("torch", marks=pytest.mark.slow), *FRAMEWORKS])
def test_two_processes_do_what_one_does(tool: str, tmp_path: Path):
    (tmp_path / "large.py").write_text(translate(plan(small()), tool), encoding="utf-8")
    script = [act.__file__, tool, str(tmp_path / "large.py"), str(tmp_path / "result.pt")]
    world = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(world, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt")
    assert result["rates"] == expected(small())
    assert distance(result["state"], alone(tool, tmp_path)[0].state_dict()) <= 1e-9
    for key in ("running_mean", "running_var"):
        assert torch.isfinite(result["state"][f"0.bn.{key}"]).all()


@pytest.mark.parametrize("tool", FRAMEWORKS[1:2])
def test_lightning_goes_on_where_it_stopped(tool: str, tmp_path: Path):
    _, first = act.act(tool, executed(small(), 1, tool), tmp_path, max_steps=123)
    model, second = act.act(tool, executed(small(), 1, tool), tmp_path, resume=True)
    assert (len(first), len(second)) == (123, 377)
    assert first + second == expected(small())
    assert distance(model.state_dict(), alone("torch", tmp_path)[0].state_dict()) <= 1e-9


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_an_update_is_that_of_one_large_minibatch(tmp_path: Path, zero_gamma: bool):
    """Two passes of 24 with plain BatchNorm are one of 48 with BatchNorm over 24, to float64's rounding."""
    recipe = small(zero_gamma=zero_gamma)
    namespace = executed(recipe, processes=1)
    batches = [index for _, index in zip(range(6), namespace["Stream"](0), strict=False)]
    namespace["UPDATES"] = 3
    model, _ = act.act("torch", namespace, tmp_path)
    x, y = act.points().tensors
    ours = convert_batchnorm(init_weights_(act.net(), zero_gamma=zero_gamma), per_worker=24)
    optimizer = build_optimizer(recipe, ours)
    for t in range(3):
        rows = torch.tensor(batches[2 * t : 2 * t + 2]).T.reshape(-1)  # rows j, j + 2 … are worker j's
        for group in optimizer.param_groups:
            group["lr"] = recipe.schedule(t * 48 / 1000)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(ours(x[rows]), y[rows], reduction="sum") / 48).backward()
        optimizer.step()
    for (name, found), wanted in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (found - wanted).abs().max() <= 1e-12, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_model_is_prepared_as_ours_is():
    model, untouched = resnet8(), resnet8()
    executed(plan("digits", channels_last=True, compile=True).recipe)["prepare"](model)
    zero = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    assert zero == set(last_batchnorms(model)) != set()
    assert model.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert model._compiled_call_impl is not None
    executed(plan("digits", zero_gamma=False).recipe)["prepare"](untouched)
    assert all(m.weight.all() for m in untouched.modules() if isinstance(m, nn.BatchNorm2d))
    assert untouched._compiled_call_impl is None


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_optimizers_are_ours_but_for_the_rate_that_is_set(name: str, momentum: float):
    recipe = small(optimizer=name, scaling="sqrt", momentum=momentum, nesterov=False)
    optimizer, _ = executed(recipe)["make_optimizer"](resnet8())
    wanted = build_optimizer(recipe, resnet8())
    assert type(optimizer) is type(wanted)
    assert list(map(settings, optimizer.param_groups)) == list(map(settings, wanted.param_groups))
    sizes = [[[p.shape for p in group["params"]] for group in each.param_groups] for each in (optimizer, wanted)]
    assert sizes[0] == sizes[1]  # who decays


@pytest.mark.parametrize("processes", [1, 2])
def test_the_stream_is_that_of_a_run_and_goes_on_where_it_is_told(processes: int):
    recipe = small(seed=3)
    namespace = executed(recipe, processes)
    streams = [list(namespace["Stream"](rank)) for rank in range(processes)]
    passes = namespace["PASSES"]
    assert {len(stream) for stream in streams} == {500 * passes} == {len(namespace["Stream"](0))}
    ours = SampleStream(samples=1000, minibatch=recipe.workers, seed=3)
    for t in range(500):
        batches = [batch for stream in streams for batch in stream[passes * t : passes * (t + 1)]]
        assert batches == [ours.indices(t, worker).tolist() for worker in range(2)]
    assert list(namespace["Stream"](0, start=123)) == streams[0][123 * passes :]


def test_another_number_of_processes_is_refused():
    with pytest.raises(ValueError, match="made for 2 processes, started in 1"):
        executed(small())["train"](act.net(), act.points())


def test_bf16_is_autocast():
    namespace = executed(small(precision="bf16"), 1)
    namespace["UPDATES"] = 1
    seen = []
    model = act.net().float()
    model[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, y = act.points().tensors
    namespace["train"](model, TensorDataset(x.float(), y))
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
