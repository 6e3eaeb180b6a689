"""A plan as the command line of timm's train.py, with a file for --config, and the differences that remain.

train.py counts an epoch in its own updates, made of the full batches of a process's share, and its flags take whole
epochs only. A file given with --config takes parts of one too, so that a single update of its can be named.
"""

from __future__ import annotations

import math
import shlex
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from string import Template

from onehour.rules.schedule import parse_milestones
from onehour.translate.job import Job, comment, numbered, rules_in, schedule_code

__all__ = ["TimmSchedule", "for_timm", "largest_difference", "timm_schedule", "updates_per_epoch"]

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
OWN_DEFAULTS = {"rmsprop": " --momentum 0 --opt-kwargs alpha=0.99", "adagrad": " --opt-eps 1e-10"}
"""Where timm's optimizer has other defaults than torch's."""

SEVERAL_PASSES = """
BatchNorm's running statistics move $passes times an update, and passes of $per_worker images are small.
→ After create_model, onehour.convert_batchnorm(model, per_worker=$per_worker), with --batch-size $together
--grad-accum-steps 1 and the file that this plan has with --per-worker $together: every $per_worker are still normalised
by themselves, so the loss is the same.
"""
SHORT = """
Each epoch ends with an update of $short of $passes passes: a smaller minibatch at the full rate.
→ onehour.StreamBatchSampler as below: all its minibatches are full.
"""
ALWAYS = """
An epoch repeats images until the processes have equal shares, and leaves out those that fill no batch.
→ DataLoader(dataset, batch_sampler=onehour.StreamBatchSampler($samples, onehour.Minibatch($per_worker, $workers),
seed=$seed, epochs=$epochs)), which takes the process from torch.distributed.

No bias is decayed, the classifier's included; the recipe leaves out normalisation's parameters only.
→ onehour.parameter_groups(model, weight_decay=$weight_decay) in place of the model in create_optimizer_v2.

The classifier does not start from N(0, 0.01²) (§5.1).
→ onehour.init_weights_(model$zero) after create_model.

Validation repeats images until the processes have equal shares, and averages the processes' means.
→ `onehour evaluate` on the checkpoint counts every image once.

It resumes at epochs only, with other crops.
→ `onehour train timm:NAME` resumes at any update, with the same ones.
"""


@dataclass(frozen=True)
class TimmSchedule:
    """timm's scheduler: what it is given, in its epochs of `updates`, and the rate that follows; no milestones for
    cosine.

    >>> TimmSchedule(3.2, 0.1, warmup_epochs=5, milestones=(30,), factor=0.1, epochs=90, updates=100).rate(250)
    1.6500000000000001
    """

    lr: float
    warmup_lr: float
    warmup_epochs: float
    milestones: tuple[float, ...] | None
    factor: float
    epochs: int
    updates: int

    def rate(self, update: int) -> float:
        """The rate of update t, as timm.scheduler steps on updates; a milestone at update m acts from m − 1 on."""
        warmup, total = self.warmup_epochs * self.updates, self.epochs * self.updates
        if update < warmup:
            return self.warmup_lr + update * ((self.lr - self.warmup_lr) / warmup)
        if self.milestones is None:
            return 0.5 * self.lr * (1 + math.cos(math.pi * update / total)) if update < total else 0.0
        return self.lr * self.factor ** bisect_right([m * self.updates for m in self.milestones], update + 1)


def timm_schedule(job: Job) -> TimmSchedule:
    """What timm must be given: each drop and the end of warmup as the fraction of its own epoch where ours is."""
    recipe, updates, warmup = job.recipe, updates_per_epoch(job), job.warmup_epochs
    per_epoch = Fraction(job.samples, recipe.minibatch)
    given = {"warmup_lr": recipe.schedule(0.0), "factor": recipe.decay_factor, "epochs": recipe.epochs}
    if recipe.decay == "cosine":
        return TimmSchedule(recipe.target_lr, warmup_epochs=warmup, milestones=None, updates=updates, **given)
    drops = [m for m in parse_milestones(recipe.milestones) if not warmup or m > warmup]
    return TimmSchedule(
        recipe.schedule(float(warmup)),  # with the drops inside the warmup, which timm would not warm up to
        warmup_epochs=float(warmup * per_epoch / updates),
        # Half an update behind, since it acts an update early; so that no rounding decides.
        milestones=tuple(float((math.ceil(m * per_epoch) + Fraction(1, 2)) / updates) for m in drops),
        updates=updates,
        **given,
    )


def updates_per_epoch(job: Job) -> int:
    """Updates that timm makes of an epoch: full batches of a process's share, the last ones as a smaller update."""
    return -(-_batches(job) // job.passes)


def _batches(job: Job) -> int:
    """Full batches of a process's share of an epoch: the sampler pads the shares, the loader drops the rest."""
    return -(-job.samples // job.processes) // job.recipe.per_worker


def largest_difference(job: Job, scheduler: TimmSchedule) -> tuple[float, int]:
    """By how much timm's rate differs from ours at most, and at which update; looked for where it can be largest."""
    recipe, last = job.recipe, scheduler.epochs * scheduler.updates - 1
    per_epoch = Fraction(job.samples, recipe.minibatch)
    ours = [m * per_epoch for m in parse_milestones(recipe.milestones)] + [job.warmup_epochs * per_epoch]
    theirs = [m * scheduler.updates for m in (*(scheduler.milestones or ()), scheduler.warmup_epochs)]
    edges = {math.floor(edge) + step for edge in (*ours, *theirs) for step in (-2, -1, 0, 1, 2)}
    # Between edges both are straight lines, or cosines that this many points show to a millionth.
    spread = {last * i // 4000 for i in range(4001)}
    updates = sorted(update for update in edges | spread if 0 <= update <= last)
    return max((abs(scheduler.rate(t) - recipe.schedule(t * recipe.minibatch / job.samples)), t) for t in updates)


def for_timm(job: Job) -> str:
    """A shell script: the file for --config, the command, and the differences that remain.

    Raises:
        ValueError: for constant warmup, which timm's schedulers do not have.
    """
    recipe = job.recipe
    if job.warmup_epochs and recipe.warmup == "constant":
        raise ValueError(
            "timm's schedulers have no constant warmup; use --warmup gradual or none, or translate --as torch"
        )
    found = timm_schedule(job)
    about = f"{recipe.name} at minibatch {recipe.minibatch} for timm's train.py: {job}."
    lines = ["#!/bin/sh", comment(f"{about} Made by `onehour plan --as`; DATA and MODEL are yours to fill in.")]
    if found.milestones is not None:
        lines += [
            "# Its flags take whole epochs; this file also takes parts of one.",
            f"cat > onehour.yaml <<'END'\nwarmup_epochs: {found.warmup_epochs!r}",
            f"decay_milestones: {list(found.milestones)}\nEND",
        ]
    return "\n".join([*lines, _command(job, found), "", *_differences(job, found), numbered("timm", _limits(job))])


def _command(job: Job, scheduler: TimmSchedule) -> str:
    """torchrun train.py with its flags, one group a line."""
    recipe = job.recipe
    name = recipe.model.removeprefix("timm:")
    model = name if name in MODELS or recipe.model.startswith("timm:") else "MODEL"
    optimizer = recipe.optimizer + OWN_DEFAULTS.get(recipe.optimizer, "")
    if recipe.optimizer == "sgd":
        optimizer = f"{'sgd' if recipe.nesterov else 'momentum'} --momentum {recipe.momentum!r}"
    rates = f"--lr {scheduler.lr!r}" + f" --warmup-lr {scheduler.warmup_lr!r}" * bool(scheduler.warmup_epochs)
    if scheduler.milestones is None:
        kind = f"cosine --sched-on-updates {rates} --min-lr 0 --warmup-epochs {scheduler.warmup_epochs}"
    else:
        kind = f"multistep --sched-on-updates {rates} --decay-rate {scheduler.factor!r}"
    classes = "" if recipe.classes is None else f" --num-classes {recipe.classes}"
    flags = [
        "" if scheduler.milestones is None else "--config onehour.yaml",
        f"--data-dir DATA --model {shlex.quote(model)}{classes}",
        f"--batch-size {recipe.per_worker} --grad-accum-steps {job.passes} --epochs {recipe.epochs}"
        " --cooldown-epochs 0",
        f"--opt {optimizer} --weight-decay {recipe.weight_decay!r}",
        f"--sched {kind}",
        "--smoothing 0 --color-jitter 0",
        "--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875" * (model != "MODEL"),
        f"--dist-bn reduce --no-ddp-bb --seed {recipe.seed}",
        "--amp --amp-dtype bfloat16" * (recipe.precision == "bf16"),
        "--channels-last" * recipe.channels_last,
        "--torchcompile" * recipe.compile,
        "" if recipe.zero_gamma else "--model-kwargs zero_init_last=False",
    ]
    return " \\\n    ".join([f"{job.torchrun} train.py", *(flag for flag in flags if flag)])


def _differences(job: Job, scheduler: TimmSchedule) -> list[str]:
    """By how much rates and updates differ from the recipe's, and the lines to put in where the rates do."""
    most, where = largest_difference(job, scheduler)
    if most > 1e-9:
        schedule, size = schedule_code(job), f"{job.recipe.minibatch} / {job.samples}"
        text = (
            f"Rates: not onehour's. They differ by up to {most:.3g} (at update {where}), since timm warms up to the"
            " peak and not to the cosine's value there, and its cosine ends with its own updates. To have them equal,"
            " put this behind create_scheduler_v2 in train.py:"
        )
        rates = [
            comment(text),
            f"#     from onehour import {', '.join(rules_in(schedule))}",
            f"#     schedule = {schedule}",
            f"#     lr_scheduler._get_lr = lambda t: [schedule(t * {size})] * len(optimizer.param_groups)",
        ]
    else:
        rates = [
            "# Rates: onehour's at every update, to 1e-9" + ", with the file above" * bool(scheduler.milestones) + "."
        ]
    made = scheduler.epochs * scheduler.updates
    text = "as in the recipe." if made == job.iterations else f"where the recipe has {job.iterations}."
    return [*rates, f"# Updates: {scheduler.epochs} epochs × {scheduler.updates} = {made}, {text}"]


def _limits(job: Job) -> str:
    """What timm's train.py does otherwise than the recipe."""
    recipe, passes, short = job.recipe, job.passes, _batches(job) % job.passes
    limits = SEVERAL_PASSES * (passes > 1) + SHORT * (short > 0) + ALWAYS
    return Template(limits).substitute(
        recipe.as_dict(),
        passes=passes,
        together=recipe.per_worker * passes,
        short=short,
        samples=job.samples,
        workers=recipe.workers.workers,
        zero="" if recipe.zero_gamma else ", zero_gamma=False",
    )
