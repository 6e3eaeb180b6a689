"""`onehour verify`: both claims about p, on the user's own machine, model and data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import uuid
from typing import TYPE_CHECKING, Any

from onehour.config import Recipe
from onehour.dist.signals import EXIT_STOPPED, STOPPED, StopSignals
from onehour.recipes import recipe as named
from onehour.rules.checks import positive_int

if TYPE_CHECKING:
    from onehour.train.verify import Finding

__all__ = ["trace_command", "verify_command"]


def verify_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run a few iterations on every number of processes, compare, print; 1 when a claim fails."""
    from onehour.dist.launch import LaunchError, launch
    from onehour.leaving import scratch
    from onehour.train.build import pick_device
    from onehour.train.verify import compare

    processes = _processes(options.processes)
    steps = positive_int("steps", options.steps)
    recipe = _grown(_recipe(options), max(processes))
    pick_device(options.device)
    with StopSignals(text=STOPPED) as stop, scratch("onehour-verify-") as folder:
        (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        (folder / "verify.json").write_text(json.dumps({"steps": steps, "device": options.device}), encoding="utf-8")
        for p in processes:
            if not options.json:
                print(f"{steps} iterations on {p} process{'es' * (p > 1)} …", flush=True)
            try:
                launch(
                    ["trace-for-verify", str(folder)],
                    processes=p,
                    port=0,
                    threads=recipe.canonical_threads,
                    job=uuid.uuid4().hex,
                    stop=stop,
                )
            except LaunchError as error:
                print(f"onehour: {STOPPED if stop.asked else error}", file=sys.stderr)
                return EXIT_STOPPED if stop.asked and not stop.again else error.code
            stop.end_at_once()
        findings = compare(folder, processes)
    print(_as_json(recipe, steps, findings) if options.json else _as_text(recipe, steps, findings))
    return int(any(finding.holds is False for finding in findings))


def trace_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """One process's part of `verify`, started by it."""
    from onehour.dist.group import joined
    from onehour.dist.launch import end_with_launcher, report_failure
    from onehour.train.build import pick_device
    from onehour.train.verify import trace

    end_with_launcher()
    setting = json.loads((options.folder / "verify.json").read_text(encoding="utf-8"))
    try:
        with joined(pick_device(setting["device"])) as group:
            recipe = Recipe.from_toml(options.folder / "recipe.toml")
            trace(recipe, steps=setting["steps"], group=group, folder=options.folder)
    except ValueError as error:
        if not report_failure(str(error)):
            raise
        return 2
    return 0


def _processes(text: str) -> list[int]:
    try:
        processes = [positive_int("processes", int(part)) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--processes is {text!r}; expected numbers such as 1,2,4") from None
    if len(set(processes)) < 2:
        raise ValueError("--processes needs two different numbers at least, for example 1,2,4")
    return processes


def _recipe(options: argparse.Namespace) -> Recipe:
    changes: dict[str, Any] = {
        key: value
        for key, value in vars(options).items()
        if key in ("model", "data", "minibatch", "per_worker") and value
    }
    if options.recipe is not None:
        return named(options.recipe, **changes)
    if "model" not in changes or "data" not in changes:
        raise ValueError("verify needs a RECIPE, or --model and --data; for example `onehour verify digits`")
    return Recipe(name="verify", **changes)


def _grown(recipe: Recipe, processes: int) -> Recipe:
    """k grows to the largest p where the recipe's is smaller."""
    return recipe.replace(minibatch=max(recipe.minibatch, processes * recipe.per_worker))


def _as_json(recipe: Recipe, steps: int, findings: list[Finding]) -> str:
    content = {"recipe": recipe.as_dict(), "steps": steps, "findings": [dataclasses.asdict(f) for f in findings]}
    return json.dumps(content, indent=2, ensure_ascii=False)


def _as_text(recipe: Recipe, steps: int, findings: list[Finding]) -> str:
    workers = recipe.workers
    lines = [f"{recipe.name}: {workers.workers} workers × {workers.per_worker}, {steps} iterations"]
    for f in findings:
        verdict = {True: "holds", False: "FAILS", None: "for information"}[f.holds]
        if f.mode == "canonical":
            what = f"one SHA-256: {next(iter(f.sha256.values()))}" if f.holds else "different SHA-256"
        else:
            what = f"largest relative difference {f.difference:.1e}"
        lines.append(f"{f.mode:<9} {f.precision}  {verdict:<15}  {what}")
        if f.first:
            lines.append(f"{'':<26} first: {f.first}")
    fast, canonical = findings[1], findings[2]
    cost = ", ".join(f"{canonical.seconds[p] / fast.seconds[p]:.2f}× on {p}" for p in fast.seconds)
    lines.append(f"canonical costs {cost} process(es) of the fast mode's time a step")
    return "\n".join(lines)
