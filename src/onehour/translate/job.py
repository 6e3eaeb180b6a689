"""What every tool must be told of a plan: the recipe, its samples, and who computes which part of a minibatch."""

from __future__ import annotations

from dataclasses import dataclass

from onehour.config import ADAPTIVE, Recipe
from onehour.planner import Plan

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """A recipe on p processes that each take `passes` passes of n images an update: kn = p · passes · n.

    >>> from onehour.planner import plan
    >>> job = Job.of(plan("resnet50", minibatch=8192, processes=64))
    >>> job.processes, job.passes, job.batch
    (64, 4, 32)
    """

    recipe: Recipe
    samples: int
    processes: int
    passes: int

    @classmethod
    def of(cls, plan: Plan) -> Job:
        """The job of a plan; a process for each worker where the plan names no number of processes.

        Raises:
            ValueError: if the samples are unknown, the workers do not divide evenly, or no other tool has it.

        >>> from onehour.planner import plan
        >>> Job.of(plan("digits", minibatch=64)).processes
        4
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
    def batch(self) -> int:
        """n, images a pass: what BatchNorm sees.

        >>> from onehour.planner import plan
        >>> Job.of(plan("digits")).batch
        16
        """
        return self.recipe.per_worker

    @property
    def iterations(self) -> int:
        """⌈E·N / kn⌉, updates of the whole run.

        >>> from onehour.planner import plan
        >>> Job.of(plan("digits")).iterations
        6144
        """
        return self.recipe.workers.iterations(self.samples, self.recipe.epochs)

    @property
    def warmup_epochs(self) -> int:
        """Epochs of warmup; 0 where the rate does not grow.

        >>> from onehour.planner import plan
        >>> Job.of(plan("digits")).warmup_epochs, Job.of(plan("digits", minibatch=64)).warmup_epochs
        (0, 5)
        """
        return self.recipe.warmup_epochs if self.recipe.warms_up else 0

    @property
    def torchrun(self) -> str:
        """The start of the command that starts the processes, at most 8 a machine.

        >>> from onehour.planner import plan
        >>> Job.of(plan("resnet50", minibatch=8192)).torchrun
        'torchrun --nnodes 32 --nproc-per-node 8'
        """
        nodes, each = self.machines
        return (
            f"torchrun --nproc-per-node {each}" if nodes == 1 else f"torchrun --nnodes {nodes} --nproc-per-node {each}"
        )

    @property
    def machines(self) -> tuple[int, int]:
        """Machines, and processes on each: as many as divide evenly, at most the paper's 8 (§4).

        >>> from onehour.planner import plan
        >>> Job.of(plan("resnet50", minibatch=8192, processes=4)).machines
        (1, 4)
        """
        each = max(g for g in range(1, 9) if self.processes % g == 0)
        return self.processes // each, each

    def __str__(self) -> str:
        passes = f"{self.passes} pass" + ("es" if self.passes > 1 else "")
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        size = self.recipe.minibatch
        return f"{processes} × {passes} × {self.batch} images = {size} an update, {self.iterations} updates"
