"""What every tool must be told of a plan: the recipe, its samples, and who computes which part of a minibatch."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from onehour.config import ADAPTIVE, Recipe
from onehour.planner import Plan

__all__ = ["Job", "comment", "numbered", "rules_in", "schedule_code"]


@dataclass(frozen=True)
class Job:
    """A recipe on p processes that each take `passes` passes of n images an update: kn = p · passes · n."""

    recipe: Recipe
    samples: int
    processes: int
    passes: int

    @classmethod
    def of(cls, plan: Plan) -> Job:
        """The job of a plan; a process for each worker where the plan names no number of processes.

        Raises:
            ValueError: if the samples are unknown, the workers do not divide evenly, or no other tool has it.
        """
        recipe, workers = plan.recipe, plan.recipe.workers.workers
        processes = plan["placement"].value if "placement" in plan.values else workers
        if recipe.samples is None:
            raise ValueError("a translation needs the number of training samples; give --samples N")
        if workers % processes:
            fits = [p for p in range(1, workers + 1) if workers % p == 0]
            near = sorted({max(p for p in fits if p < processes), min(p for p in fits if p > processes)})
            raise ValueError(
                f"{workers} workers (k = kn / n) do not divide evenly among {processes} processes, and other tools"
                f" average over processes as if they did; use --processes {near[0]} or {near[1]}, or `onehour train`"
            )
        if recipe.optimizer not in ("sgd", *ADAPTIVE):
            raise ValueError(
                f"optimizer {recipe.optimizer} is your own, and what it takes is not known here; translate with"
                " --optimizer sgd, and put your own in its place"
            )
        if recipe.precision == "float64":
            raise ValueError("precision float64 is not translated; use --precision float32 or bf16")
        return cls(recipe, recipe.samples, processes, workers // processes)

    @property
    def iterations(self) -> int:
        """⌈E·N / kn⌉, updates of the whole run."""
        return self.recipe.workers.iterations(self.samples, self.recipe.epochs)

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warmup; 0 where the rate does not grow."""
        return self.recipe.warmup_epochs if self.recipe.warms_up else 0

    @property
    def machines(self) -> tuple[int, int]:
        """Machines, and processes on each: as many as divide evenly, at most the paper's 8 (§4)."""
        each = max(g for g in range(1, 9) if self.processes % g == 0)
        return self.processes // each, each

    @property
    def torchrun(self) -> str:
        """The start of the command that starts the processes."""
        nodes, each = self.machines
        return f"torchrun{f' --nnodes {nodes}' if nodes > 1 else ''} --nproc-per-node {each}"

    def __str__(self) -> str:
        passes = f"{self.passes} pass" + ("es" if self.passes > 1 else "")
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        n, size = self.recipe.per_worker, self.recipe.minibatch
        return f"{processes} × {passes} × {n} images = {size} an update, {self.iterations} updates"


def schedule_code(job: Job) -> str:
    """The recipe's schedule as it is written with onehour's rules; it gives the same rates to the bit.

    >>> from onehour.planner import plan
    >>> schedule_code(Job.of(plan("resnet50", minibatch=8192)))
    'gradual_warmup(step_decay(3.2, [30, 60, 80], factor=0.1), start_lr=0.1, epochs=5)'
    """
    recipe = job.recipe
    if recipe.decay == "cosine":
        usual = f"cosine_decay({recipe.target_lr!r}, epochs={recipe.epochs})"
    else:
        drops = [int(milestone) if milestone.isdecimal() else milestone for milestone in recipe.milestones]
        usual = f"step_decay({recipe.target_lr!r}, {drops}, factor={recipe.decay_factor!r})"
    if not job.warmup_epochs:
        return usual
    return f"{recipe.warmup}_warmup({usual}, start_lr={recipe.base_lr!r}, epochs={job.warmup_epochs})"


def rules_in(code: str) -> list[str]:
    """The names of what it calls, to import them.

    >>> rules_in("gradual_warmup(step_decay(3.2, [30], factor=0.1), start_lr=0.1, epochs=5)")
    ['gradual_warmup', 'step_decay']
    """
    return re.findall(r"\w+(?=\()", code)


def comment(text: str, first: str = "# ", others: str = "# ") -> str:
    """Text as comment lines of at most 110 characters."""
    return textwrap.fill(
        text, 110, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def numbered(tool: str, limits: str) -> str:
    """What a tool does otherwise, as numbered comments.

    Args:
        limits: separated by empty lines, each with its remedy behind an arrow.

    >>> print(numbered("torch", "It pads.\\n→ Do not."))
    # What torch does not do by itself, and the remedy:
    # 1. It pads.
    #    → Do not.
    """
    lines = [f"# What {tool} does not do by itself, and the remedy:"]
    for number, limit in enumerate(limits.strip().split("\n\n"), start=1):
        what, remedy = " ".join(limit.split()).split(" → ")
        lines += [comment(what, f"# {number}. ", "#    "), comment(remedy, "#    → ", "#      ")]
    return "\n".join(lines)
