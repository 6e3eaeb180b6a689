"""A plan as the command line of timm's train.py, and the differences that remain."""

from __future__ import annotations

import shlex

from onehour.translate.job import Job
from onehour.translate.limits import Limit, as_comments, comment
from onehour.translate.pieces import rate_body
from onehour.translate.timm_schedule import Sched, batches, flags_alone, largest_difference, sched

__all__ = ["command", "differences", "for_timm", "limits"]

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
OWN_DEFAULTS = {"rmsprop": "--momentum 0 --opt-kwargs alpha=0.99", "adagrad": "--opt-eps 1e-10"}
"""Where timm's optimizer has other defaults than torch's."""


def for_timm(job: Job) -> str:
    """A shell script: the file for --config, the command, and the differences that remain.

    Raises:
        ValueError: for constant warmup, which timm's schedulers do not have.

    >>> from onehour.planner import plan
    >>> for_timm(Job.of(plan("resnet50", minibatch=8192))).splitlines()[5]
    'warmup_epochs: 5.012578719701523'
    """
    if job.warmup_epochs and job.recipe.warmup == "constant":
        raise ValueError(
            "timm's schedulers have no constant warmup; use --warmup gradual or none, or translate --as torch"
        )
    found = sched(job)
    about = f"{job.recipe.name} at minibatch {job.recipe.minibatch} for timm's train.py: {job}."
    lines = ["#!/bin/sh", comment(f"{about} Made by `onehour plan --as`; DATA and MODEL are yours to fill in.")]
    if found.milestones is not None:
        lines += [
            "# Its flags take whole epochs; this file also takes parts of one.",
            "cat > onehour.yaml <<'END'",
            f"warmup_epochs: {found.warmup_epochs!r}",
            f"decay_milestones: {list(found.milestones)}",
            "END",
        ]
    return "\n".join([*lines, command(job, found), "", differences(job, found), as_comments("timm", limits(job))])


def command(job: Job, scheduler: Sched) -> str:
    """torchrun train.py with its flags, one group a line.

    >>> from onehour.planner import plan
    >>> job = Job.of(plan("resnet50", minibatch=8192))
    >>> "--sched multistep --sched-on-updates --lr 3.2 --warmup-lr 0.1" in command(job, sched(job))
    True
    """
    recipe = job.recipe
    name = recipe.model.removeprefix("timm:")
    model = name if name in MODELS or recipe.model.startswith("timm:") else "MODEL"
    names = {"sgd": "sgd" if recipe.nesterov else "momentum"}
    optimizer = f"--opt {names.get(recipe.optimizer, recipe.optimizer)}"
    optimizer += f" --momentum {recipe.momentum!r}" * (recipe.optimizer == "sgd")
    optimizer += f" {OWN_DEFAULTS[recipe.optimizer]}" if recipe.optimizer in OWN_DEFAULTS else ""
    cosine = scheduler.milestones is None
    kind = f"--sched {'cosine' if cosine else 'multistep'} --sched-on-updates"
    rates = f"--lr {scheduler.lr!r}" + f" --warmup-lr {scheduler.warmup_lr!r}" * bool(scheduler.warmup_epochs)
    end = f"--min-lr 0 --warmup-epochs {scheduler.warmup_epochs}" if cosine else f"--decay-rate {scheduler.factor!r}"
    flags = [
        "" if cosine else "--config onehour.yaml",
        f"--data-dir DATA --model {shlex.quote(model)}"
        + f" --num-classes {recipe.classes}" * (recipe.classes is not None),
        f"--batch-size {job.batch} --grad-accum-steps {job.passes} --epochs {recipe.epochs} --cooldown-epochs 0",
        f"{optimizer} --weight-decay {recipe.weight_decay!r}",
        f"{kind} {rates} {end}",
        "--smoothing 0 --color-jitter 0",
        "--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875" * (model != "MODEL"),
        f"--dist-bn reduce --no-ddp-bb --seed {recipe.seed}",
        "--amp --amp-dtype bfloat16" * (recipe.precision == "bf16"),
        "--channels-last" * recipe.channels_last,
        "--torchcompile" * recipe.compile,
        "" if recipe.zero_gamma else "--model-kwargs zero_init_last=False",
    ]
    return " \\\n    ".join([f"{job.torchrun} train.py", *(flag for flag in flags if flag)])


def differences(job: Job, scheduler: Sched) -> str:
    """By how much rates and updates differ from the recipe's, and the formula to put in where they do.

    >>> from onehour.planner import plan
    >>> job = Job.of(plan("digits"))
    >>> print(differences(job, sched(job)))
    # Rates: onehour's at every update, to 1e-9, with the file above; flags alone cannot name these milestones.
    # Updates: 24 epochs × 256 = 6144, as in the recipe.
    """
    most, where = largest_difference(job, scheduler)
    flags = flags_alone(job)
    lines = []
    if most > 1e-9:
        lines += [
            comment(f"Rates: not onehour's. They differ by up to {most:.3g} (at update {where}), since {_WHY}"),
            formula(job),
        ]
    elif flags is None:
        text = "with the file above; flags alone cannot name these milestones."
        lines += [comment(f"Rates: onehour's at every update, to 1e-9, {text}")]
    elif scheduler.milestones is None:
        lines += [comment("Rates: onehour's at every update, to 1e-9.")]
    else:
        worst, at = largest_difference(job, flags)
        named = f"--warmup-epochs {flags.warmup_epochs} --decay-milestones {' '.join(map(str, flags.milestones or ()))}"
        text = f"with the file above. With {named} in its place they differ by up to {worst:.3g}, at update {at}."
        lines += [comment(f"Rates: onehour's at every update, to 1e-9, {text}")]
    made = scheduler.epochs * scheduler.updates
    text = "as in the recipe." if made == job.iterations else f"where the recipe has {job.iterations}."
    return "\n".join([*lines, f"# Updates: {scheduler.epochs} epochs × {scheduler.updates} = {made}, {text}"])


_WHY = (
    "timm warms up to the peak and not to the cosine's value there, and its cosine ends with its own updates. To have"
    " them equal, put this behind create_scheduler_v2 in train.py:"
)


def formula(job: Job) -> str:
    """The lines that give timm's scheduler our rate, as comments.

    >>> from onehour.planner import plan
    >>> print(formula(Job.of(plan("digits", decay="cosine"))).splitlines()[-1])
    #     lr_scheduler._get_lr = lambda update: [rate(update)] * len(optimizer.param_groups)
    """
    lines = [
        "import math",
        "def rate(update):",
        f"    epoch = update * {job.recipe.minibatch} / {job.samples}",
        *rate_body(job).splitlines(),
        "lr_scheduler._get_lr = lambda update: [rate(update)] * len(optimizer.param_groups)",
    ]
    return "\n".join(f"#     {line}" for line in lines)


def limits(job: Job) -> list[Limit]:
    """What timm's train.py does otherwise than the recipe.

    >>> from onehour.planner import plan
    >>> len(limits(Job.of(plan("resnet50", minibatch=8192))))
    5
    """
    n, passes, recipe = job.batch, job.passes, job.recipe
    zero = "" if recipe.zero_gamma else ", zero_gamma=False"
    found = []
    if passes > 1:
        found.append(
            Limit(
                f"BatchNorm's running statistics move {passes} times an update, and passes of {n} images are small.",
                f"After create_model, onehour.convert_batchnorm(model, per_worker={n}), with --batch-size {n * passes}"
                f" --grad-accum-steps 1 and the file that this plan has with --per-worker {n * passes}: every {n} are"
                " still normalised by themselves, so the loss is the same.",
            )
        )
    if short := batches(job) % passes:
        found.append(
            Limit(
                f"Each epoch ends with an update of {short} of {passes} passes: a smaller minibatch at the full rate.",
                "onehour.StreamBatchSampler as below: all its minibatches are full.",
            )
        )
    size = f"onehour.Minibatch({n}, {recipe.workers.workers})"
    found += [
        Limit(
            "An epoch repeats images until the processes have equal shares, and leaves out those that fill no batch.",
            f"DataLoader(dataset, batch_sampler=onehour.StreamBatchSampler({job.samples}, {size}, seed={recipe.seed},"
            f" epochs={recipe.epochs})), which takes the process from torch.distributed.",
        ),
        Limit(
            "No bias is decayed, the classifier's included; the recipe leaves out normalisation's parameters only.",
            f"onehour.parameter_groups(model, weight_decay={recipe.weight_decay!r}) in place of the model in"
            " create_optimizer_v2.",
        ),
        Limit(
            "The classifier does not start from N(0, 0.01²) (§5.1).",
            f"onehour.initialize(model{zero}) after create_model.",
        ),
        Limit(
            "Validation repeats images until the processes have equal shares, and averages the processes' means.",
            "`onehour evaluate` on the checkpoint counts every image once.",
        ),
        Limit(
            "It resumes at epochs only, with other crops.",
            "`onehour train timm:NAME` resumes at any update, with the same ones.",
        ),
    ]
    return found
