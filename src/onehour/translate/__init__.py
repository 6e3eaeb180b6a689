"""A plan in the words of the user's own tool: its flags, or a file to paste, and what it leaves open. No torch."""

from __future__ import annotations

from onehour.messages import nearest
from onehour.planner import Plan
from onehour.translate.job import Job
from onehour.translate.templates import TEMPLATES, python
from onehour.translate.timm_command import for_timm

__all__ = ["TOOLS", "translate"]

TOOLS = ("torch", "timm", *list(TEMPLATES)[1:])


def translate(plan: Plan, tool: str) -> str:
    """The plan for `tool`, on the plan's number of processes, or a process for each worker.

    A Python file (for timm a shell script) whose rate is the plan's at every update, or that says by how much it is
    not; behind it, as comments, what the tool does otherwise than the paper, each with its remedy.

    Args:
        plan: of a recipe with known samples.
        tool: one of `TOOLS`.

    Raises:
        ValueError: for an unknown tool (the nearest is offered), or a plan that the tool cannot follow.

    >>> from onehour.planner import plan
    >>> text = translate(plan("resnet50", minibatch=8192, processes=64), "torch")
    >>> "PROCESSES, PASSES, BATCH = 64, 4, 32" in text
    True
    """
    if tool not in TOOLS:
        raise ValueError(f"no tool is called {tool!r}; expected {nearest(tool, TOOLS)}")
    job = Job.of(plan)
    return for_timm(job) if tool == "timm" else python(job, tool)
