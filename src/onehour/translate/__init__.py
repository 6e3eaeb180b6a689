"""A plan in the words of the user's own tool: a file that imports onehour's rules, and what the tool leaves open."""

from __future__ import annotations

from string import Template

from onehour.messages import nearest
from onehour.planner import Plan
from onehour.translate.templates import ABOUT, OPEN, SHARED, TEMPLATES
from onehour.translate.values import values_of

TOOLS = tuple(TEMPLATES)


def translate(plan: Plan, tool: str) -> str:
    """The plan for `tool`, on the plan's number of processes, or a process for each worker.

    A Python file (for timm a shell script) whose rate is the plan's at every update; behind it, as comments, what the
    tool does otherwise than the paper, each with its remedy. Needs no torch.

    Args:
        plan: of a recipe with known samples.
        tool: one of `TOOLS`.

    Raises:
        ValueError: for an unknown tool (the nearest is offered), or a plan that no other tool can follow.

    >>> from onehour.planner import plan
    >>> text = translate(plan("resnet50", minibatch=8192, processes=64), "torch")
    >>> "PROCESSES, PASSES, BATCH = 64, 4, 32" in text
    True
    """
    if tool not in TOOLS:
        raise ValueError(f"no tool is called {tool!r}; expected {nearest(tool, TOOLS)}")
    values, parts = values_of(plan), {"about": ABOUT, "shared": SHARED, "open": OPEN}
    values |= {name: Template(text).substitute(values) for name, text in parts.items()}
    return Template(TEMPLATES[tool]).substitute(values)
