"""What a tool cannot do, each with its remedy, as comments behind the code."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from onehour.translate.job import Job

__all__ = ["Limit", "as_comments", "comment", "limits_of_torch"]


@dataclass(frozen=True)
class Limit:
    """One thing that a tool does otherwise, and what to do about it.

    >>> Limit("It pads.", "onehour.StreamBatchSampler").remedy
    'onehour.StreamBatchSampler'
    """

    what: str
    remedy: str


def comment(text: str, first: str = "# ", others: str = "# ") -> str:
    """Text as comment lines of at most 110 characters.

    >>> comment("Two words.", first="# 1. ")
    '# 1. Two words.'
    """
    return textwrap.fill(
        text, 110, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def as_comments(tool: str, limits: list[Limit]) -> str:
    """The limits numbered, each remedy behind an arrow.

    >>> print(as_comments("torch", [Limit("It pads.", "onehour.StreamBatchSampler")]))
    # What torch does not do by itself, and the remedy:
    # 1. It pads.
    #    → onehour.StreamBatchSampler
    """
    lines = [f"# What {tool} does not do by itself, and the remedy:"]
    for number, limit in enumerate(limits, start=1):
        lines += [comment(limit.what, f"# {number}. ", "#    "), comment(limit.remedy, "#    → ", "#      ")]
    return "\n".join(lines)


def limits_of_torch(job: Job) -> list[Limit]:
    """What plain torch leaves open, and with it every tool that is built on its loop.

    >>> from onehour.planner import plan
    >>> [limit.remedy.split()[0] for limit in limits_of_torch(Job.of(plan("digits", processes=1)))][0]
    'onehour.convert_batchnorm(model,'
    """
    n, passes = job.batch, job.passes
    found = []
    if passes > 1:
        found.append(
            Limit(
                f"BatchNorm's running statistics move {passes} times an update, and passes of {n} images are small.",
                f"onehour.convert_batchnorm(model, per_worker={n}), then BATCH = {n * passes} and PASSES = 1: every {n}"
                " are still normalised by themselves, so the loss is the same, and the statistics move once (§2.3).",
            )
        )
    if job.processes > 1:
        found.append(
            Limit(
                "A DistributedSampler repeats validation images until they divide evenly, and a mean of the"
                " processes' means weighs them wrongly.",
                "Evaluate range(rank, len(validation), PROCESSES) on each process, sum the counts of errors over"
                " processes and divide once by len(validation), as `onehour train` does.",
            )
        )
    zero = "" if job.recipe.zero_gamma else ", zero_gamma=False"
    found += [
        Limit(
            "The model keeps the initial weights that it comes with" + (", but for γ." if not zero else "."),
            f"onehour.initialize(model{zero}) before prepare(model): He fan-out, the classifier N(0, 0.01²) (§5.1).",
        ),
        Limit(
            "LambdaLR sets the rate and no more. An optimizer that keeps the rate inside its velocity needs the"
            " momentum correction when it changes (§3, Remark 2); torch.optim's do not.",
            "onehour.ScheduleLR in its place finds out by probing the optimizer, and corrects.",
        ),
        Limit(
            "Crops, flips and dropout change with the number of processes, and where a run is resumed.",
            "Key each image's generator by onehour.seed_for(seed, 'augment', epoch, index), as `onehour train` does.",
        ),
        Limit(
            "A gradient that is not finite, on any process, spoils all weights.",
            "`onehour train` leaves that update out everywhere, and stops.",
        ),
    ]
    return found
