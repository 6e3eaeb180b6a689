"""The translation into timm's train.py: what its own optimizer and scheduler make of the flags."""

import argparse
import importlib
import math
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from onehour.config import ADAPTIVE, Recipe
from onehour.models.small import resnet8
from onehour.planner import Plan, plan
from onehour.training.build import build_optimizer
from onehour.translate import translate
from onehour.translate.job import Job
from onehour.translate.timm_command import largest_difference, timm_schedule, updates_per_epoch

VARIANTS = {
    "gradual": {},
    "none": {"warmup": "none"},
    "sqrt": {"scaling": "sqrt"},
    "fixed": {"scaling": "fixed"},
    "a drop inside the warmup": {"milestones": ("3", "5", "31/3"), "decay_factor": 0.7},
    "too many drops inside the warmup": {"milestones": ("3", "5", "31/3")},
    "no drop": {"milestones": ()},
    "whole epochs": {"milestones": ("8", "16", "20")},
    "cosine": {"decay": "cosine"},
    "cosine without warmup": {"decay": "cosine", "warmup": "none"},
    "four workers": {"minibatch": 96},
}


def job(recipe: Recipe | str, processes: int | None = None, **changes: Any) -> Job:
    return Job.of(plan(recipe, processes=processes, **changes))


@pytest.mark.parametrize(
    ("samples", "minibatch", "processes"),
    [(1000, 48, 1), (1000, 48, 2), (1000, 96, 2), (1001, 192, 4), (960, 96, 4), (97, 96, 2)],
)
def test_an_epoch_has_as_many_updates_as_the_loader_makes(small, samples: int, minibatch: int, processes: int):
    made = job(small(samples=samples, minibatch=minibatch), processes)
    sampler = DistributedSampler(range(samples), num_replicas=processes, rank=0)  # type: ignore[arg-type]
    loader = DataLoader(range(samples), batch_size=made.recipe.per_worker, sampler=sampler, drop_last=True)  # type: ignore[arg-type]
    assert updates_per_epoch(made) == math.ceil(len(loader) / made.passes)


@pytest.mark.parametrize(
    ("recipe", "processes"), [("resnet50", 256), ("resnet50", 8), ("resnet50", 1), ("digits", 2), ("digits", 1)]
)
def test_with_the_file_every_rate_is_ours(recipe: str, processes: int):
    made = job(recipe, processes, minibatch=8192 if recipe == "resnet50" else 256)
    scheduler, samples = timm_schedule(made), made.samples
    updates = range(scheduler.epochs * scheduler.updates)
    rates = [(scheduler.rate(t), made.recipe.schedule(t * made.recipe.minibatch / samples)) for t in updates]
    assert max(abs(found - expected) for found, expected in rates) <= 1e-9
    assert largest_difference(made, scheduler)[0] <= 1e-9


@pytest.mark.parametrize("processes", [256, 8])
@pytest.mark.parametrize("decay", ["step", "cosine"])
def test_the_difference_that_is_printed_is_the_largest_of_all(processes: int, decay: str):
    made = job("resnet50", processes, minibatch=8192, decay=decay)
    scheduler = timm_schedule(made)
    rates = [scheduler.rate(t) for t in range(scheduler.epochs * scheduler.updates)]
    differences = [abs(r - made.recipe.schedule(t * 8192 / made.samples)) for t, r in enumerate(rates)]
    most, where = largest_difference(made, scheduler)
    assert most == pytest.approx(max(differences), rel=1e-5)
    assert differences[where] == most
    if decay == "cosine":
        assert f"{most:.3g}" in translate(plan(made.recipe, processes=processes), "timm")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "Rates: onehour's at every update, to 1e-9, with the file above."),
        ({"decay": "cosine"}, "Rates: not onehour's. They differ by up to"),
        ({"samples": 960, "decay": "cosine", "warmup": "none"}, "Rates: onehour's at every update, to 1e-9."),
        ({"samples": 960}, "Updates: 24 epochs × 20 = 480, as in the recipe."),
        ({}, "Updates: 24 epochs × 20 = 480, where the recipe has 500."),
        ({"minibatch": 96, "samples": 1010}, "Each epoch ends with an update of 1 of 2 passes"),
        ({"precision": "bf16"}, "--amp --amp-dtype bfloat16"),
        ({"channels_last": True, "compile": True}, "--channels-last \\ --torchcompile"),
        ({"zero_gamma": False}, "--model-kwargs zero_init_last=False"),
        ({"model": "timm:resnet26d"}, "--model resnet26d"),
        ({"model": "timm:a b"}, "--model 'a b'"),
        ({"model": "resnet8"}, "--model MODEL"),
    ],
    ids=str,
)
def test_what_is_said(small, changes: dict[str, Any], sentence: str):
    text = translate(plan(small(**changes), processes=2), "timm")
    assert sentence in " ".join(text.replace("\n# ", " ").split())


def test_the_lines_that_give_it_our_rate_do(small):
    recipe = small(decay="cosine")
    text = translate(plan(recipe), "timm")
    code = [line.removeprefix("#     ") for line in text.splitlines() if line.startswith("#     ")]
    scheduler, optimizer = argparse.Namespace(), argparse.Namespace(param_groups=[{}, {}])
    exec("\n".join(code[:3]), {"lr_scheduler": scheduler, "optimizer": optimizer})
    for t in range(500):
        assert scheduler._get_lr(t) == [recipe.schedule(t * 48 / 1000)] * 2


# From here on with timm itself.

warned = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def timm(acting) -> Any:
    acting.define_operators()
    pytest.importorskip("yaml")
    return pytest.importorskip("timm")


def parsed(text: str) -> argparse.Namespace:
    """The options as train.py has them: those of the file as defaults, then the flags, of train.py's types."""
    head, _, tail = text.partition("torchrun")
    defaults: dict[str, Any] = {}
    if "<<'END'\n" in head:
        defaults = importlib.import_module("yaml").safe_load(head.split("<<'END'\n")[1].split("END\n")[0])
    words = shlex.split(tail.split("\n\n")[0].replace("\\\n", " "))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for kind, names in {
        str: "config data-dir model sched opt train-interpolation interpolation dist-bn amp-dtype model-kwargs",
        int: "num-classes batch-size grad-accum-steps epochs warmup-epochs cooldown-epochs seed",
        float: "lr warmup-lr min-lr decay-rate weight-decay smoothing color-jitter crop-pct opt-eps",
    }.items():
        for name in names.split():
            parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--opt-kwargs", nargs="*", action=importlib.import_module("timm.utils").ParseKwargs, default={})
    for name in ("sched-on-updates", "no-ddp-bb", "amp", "channels-last", "torchcompile"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.set_defaults(warmup_lr=1e-5, warmup_epochs=5, min_lr=0.0, decay_rate=0.1, decay_milestones=[90])
    parser.set_defaults(**defaults)
    return parser.parse_args(words[words.index("train.py") + 1 :])


def rates_of_timm(made: Plan) -> Iterator[float]:
    """The rate of each update of train.py's loop, which steps the scheduler with the count of updates behind it."""
    optim, scheduler = (importlib.import_module(f"timm.{name}") for name in ("optim", "scheduler"))
    options = parsed(translate(made, "timm"))
    optimizer = optim.create_optimizer_v2(resnet8(), **optim.optimizer_kwargs(cfg=options), **options.opt_kwargs)
    updates = updates_per_epoch(Job.of(made))
    found, epochs = scheduler.create_scheduler_v2(
        optimizer, **scheduler.scheduler_kwargs(options), updates_per_epoch=updates
    )
    assert epochs == made.recipe.epochs
    for update in range(epochs * updates):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        yield rate
        found.step_update(num_updates=update + 1)


@warned
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_timm_has_our_rates_or_the_difference_that_is_printed(
    timm, farthest, small, changes: dict[str, Any], processes: int
):
    made = plan(small(**changes), processes=processes)
    rates = list(rates_of_timm(made))
    found = farthest(made.recipe, rates)
    scheduler = timm_schedule(Job.of(made))
    assert rates == pytest.approx([scheduler.rate(t) for t in range(len(rates))], rel=1e-12, abs=1e-15)
    assert found == pytest.approx(largest_difference(Job.of(made), scheduler)[0], rel=1e-6, abs=1e-9)
    if found > 1e-9:
        assert made.recipe.decay == "cosine"
        assert f"They differ by up to {found:.3g}" in translate(made, "timm").replace("\n# ", " ")


@warned
@pytest.mark.slow
@pytest.mark.parametrize("processes", [256, 64, 8, 1])
def test_timm_has_the_papers_rates(timm, farthest, processes: int):
    made = plan("resnet50", minibatch=8192, processes=processes)
    assert farthest(made.recipe, list(rates_of_timm(made))) <= 1e-9


@warned
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ADAPTIVE, "sgd"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_timms_optimizer_is_ours(timm, small, name: str, momentum: float, nesterov: bool):
    recipe = small(optimizer=name, scaling="sqrt", momentum=momentum, nesterov=nesterov, weight_decay=3e-4)
    options = parsed(translate(plan(recipe), "timm"))
    optim = importlib.import_module("timm.optim")
    optimizer = optim.create_optimizer_v2(resnet8(), **optim.optimizer_kwargs(cfg=options), **options.opt_kwargs)
    expected = build_optimizer(recipe, resnet8())
    assert type(optimizer) is type(expected)
    how = {"lr", "initial_lr", "params", "fused", "foreach"}  # where and how fast it computes, not what
    for group in optimizer.param_groups:
        like = next(g for g in expected.param_groups if g["weight_decay"] == group["weight_decay"])
        assert {k: v for k, v in group.items() if k not in how} == {k: v for k, v in like.items() if k not in how}


@warned
@pytest.mark.slow
def test_timm_leaves_out_the_bias_that_is_said(timm, small):
    optim = importlib.import_module("timm.optim")
    model = resnet8()
    free = optim.create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4).param_groups
    left_out = {id(p) for group in free if group["weight_decay"] == 0 for p in group["params"]}
    extra = left_out - {id(p) for p in build_optimizer(small(), model).param_groups[1]["params"]}
    (classifier,) = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert extra == {id(classifier.bias)}
