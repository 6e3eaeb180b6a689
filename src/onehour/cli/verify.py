"""`onehour verify`: both claims about p, on the user's own machine, model and data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import EXIT_BAD_INPUT, add_device, add_trust, size
from onehour.config import Recipe
from onehour.dist.launch import LaunchError, end_with_launcher, launch, report_failure
from onehour.dist.launched import refuse_several
from onehour.dist.signals import EXIT_STOPPED, STOPPED, StopSignals
from onehour.entry import asked_for
from onehour.files import to_json
from onehour.leaving import scratch
from onehour.messages import tell
from onehour.recipes import recipe as named
from onehour.rules.arguments import positive_int

if TYPE_CHECKING:
    from onehour.sweeps.verify import Comparison


USUAL = "1,2,4"


def add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="check on this machine that the number of processes does not matter",
        description="Run a few iterations on several numbers of processes and compare weights, statistics, velocity.",
    )
    verify.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe, or give --model and --data")
    verify.add_argument("--processes", metavar="P,P,…", help="numbers of processes (1,2,4)")
    verify.add_argument("--steps", type=int, default=20, metavar="I", help="iterations (20)")
    verify.add_argument("--model", metavar="M", help="instead of the recipe's")
    verify.add_argument("--data", metavar="D", help="instead of the recipe's")
    verify.add_argument("--minibatch", type=size, metavar="SIZE", help="kn; grows to the largest p times n")
    verify.add_argument("--per-worker", type=size, metavar="SIZE", help="n")
    add_device(verify)
    verify.add_argument("--json", action="store_true", help="print JSON")
    add_trust(verify)
    verify.set_defaults(command=verify_command)
    traced = commands.add_parser("trace-for-verify", hidden=True)  # and without help, so that it is not listed
    traced.add_argument("folder", type=Path)
    add_trust(traced)
    traced.set_defaults(command=trace_command)


def verify_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.sweeps.verify import compare

    refuse_several("verify")
    processes, options.device = _on_devices(options.processes, options.device)
    steps = positive_int("steps", options.steps)
    recipe = asked_for(_recipe(options), trust=options.trust)
    fewest = max(processes) * recipe.canonical_pass * recipe.per_worker  # k of the largest p
    # Whether p matters does not depend on the rate, and rules may not hold for other optimizers at what it grows to.
    scaling = "fixed" if fewest > recipe.minibatch and recipe.optimizer != "sgd" else recipe.scaling
    recipe = recipe.replace(ramp=(), minibatch=max(recipe.minibatch, fewest), scaling=scaling)
    recipe.replace(reduce="canonical")  # whether it can be
    with StopSignals(text=STOPPED) as stop, scratch("onehour-verify-") as folder:
        (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        (folder / "verify.json").write_text(json.dumps({"steps": steps, "device": options.device}), encoding="utf-8")
        for p in processes:
            if not options.json:
                print(f"{steps} iterations on {p} process{'es' * (p > 1)} …", flush=True)
            try:
                launch(
                    ["trace-for-verify", str(folder), "--trust"],
                    processes=p,
                    port=0,
                    threads=recipe.canonical_threads,
                    job=uuid.uuid4().hex,
                    stop=stop,
                )
            except LaunchError as error:
                tell(STOPPED if stop.asked else error)
                return EXIT_STOPPED if stop.asked and not stop.again else error.code
            stop.end_at_once()
        findings = compare(folder, processes)
    print(_as_json(recipe, steps, findings) if options.json else _as_text(recipe, steps, findings))
    return int(any(finding.holds is False for finding in findings))


def trace_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """One process's part of `verify`, started by it."""
    from onehour.dist.devices import pick_device
    from onehour.dist.group import joined
    from onehour.sweeps.verify import trace

    end_with_launcher()
    setting = json.loads((options.folder / "verify.json").read_text(encoding="utf-8"))
    try:
        with joined(pick_device(setting["device"])) as group:
            recipe = asked_for(Recipe.from_toml(options.folder / "recipe.toml"), trust=options.trust)
            trace(recipe, steps=setting["steps"], group=group, folder=options.folder)
    except ValueError as error:
        if not report_failure(str(error)):
            raise
        return EXIT_BAD_INPUT
    return 0


def _on_devices(typed: str | None, device: str) -> tuple[list[int], str]:
    """The numbers of processes, and where: a machine of one GPU has no two to compare, its CPU has."""
    from onehour.dist.devices import pick_device, refuse_too_few_gpus

    picked = pick_device(device)
    if typed is not None or picked == "cpu":
        processes = _processes(USUAL if typed is None else typed)
        refuse_too_few_gpus(max(processes), picked)
        return processes, picked
    import torch

    gpus = torch.cuda.device_count()
    fits = [p for p in _processes(USUAL) if p <= gpus]
    if len(fits) > 1:
        return fits, picked
    if device == "cuda":
        refuse_too_few_gpus(2, picked)
    print("torch sees 1 GPU here, too few for two processes, so this runs on the CPU", file=sys.stderr)
    return _processes(USUAL), "cpu"


def _processes(text: str) -> list[int]:
    try:
        processes = [positive_int("processes", int(part)) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--processes is {text!r}; expected numbers such as 1,2,4") from None
    if len(set(processes)) < 2:
        raise ValueError("--processes needs at least two different numbers, for example 1,2,4")
    return processes


def _recipe(options: argparse.Namespace) -> Recipe:
    fields = ("model", "data", "minibatch", "per_worker")
    changes: dict[str, Any] = {key: value for key, value in vars(options).items() if key in fields and value}
    if options.recipe is not None:
        return named(options.recipe, **changes)
    if "model" not in changes or "data" not in changes:
        raise ValueError("verify needs a RECIPE, or --model and --data; for example `onehour verify digits`")
    return Recipe(name="verify", **changes)


def _as_json(recipe: Recipe, steps: int, findings: list[Comparison]) -> str:
    content = {"recipe": recipe.as_dict(), "steps": steps, "findings": [dataclasses.asdict(f) for f in findings]}
    return to_json(content, indent=2)


def _as_text(recipe: Recipe, steps: int, findings: list[Comparison]) -> str:
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
    lines.append(f"time per step, canonical / fast: {cost} process(es)")
    return "\n".join(lines)
