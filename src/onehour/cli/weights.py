"""`onehour evaluate` and `onehour export`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from onehour.cli.parser import add_trust, size
from onehour.config import Recipe
from onehour.entry import asked_for
from onehour.files import to_json
from onehour.recipes import recipe as named

__all__ = ["add_evaluate", "add_export", "evaluate_command", "export_command"]


def add_evaluate(commands: Any) -> None:
    """Add the command to the command line's parsers."""
    evaluate = commands.add_parser(
        "evaluate",
        help="the error of a run's newest checkpoint, or of a file",
        description="Evaluate weights on validation data: integer counts, every sample once.",
        allow_abbrev=False,
    )
    evaluate.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    evaluate.add_argument("--recipe", metavar="RECIPE", help="for a file: its recipe, or give --model and --data")
    evaluate.add_argument("--data", metavar="D", help="in place of the recipe's")
    evaluate.add_argument("--model", metavar="M", help="in place of the recipe's")
    evaluate.add_argument("--classes", type=size, help="labels, where the data does not say")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (auto)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_trust(evaluate)
    evaluate.set_defaults(command=evaluate_command)


def add_export(commands: Any) -> None:
    """Add the command to the command line's parsers."""
    export = commands.add_parser(
        "export",
        help="a run's weights for torchvision, timm and others",
        description="Write a run's weights as a plain state dict under torch's own names.",
        allow_abbrev=False,
    )
    export.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    export.add_argument("--to", metavar="FILE", type=Path, required=True, help="ends in .safetensors or .pt")
    export.set_defaults(command=export_command)


def evaluate_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """The error of a run's newest checkpoint, or of a file's weights, on validation data."""
    from onehour.training.weights import evaluate_weights

    recipe = _recipe(options)
    changes = {name: getattr(options, name) for name in ("data", "model", "classes") if getattr(options, name)}
    if "data" in changes:
        changes["samples"] = None
        changes["validation"] = recipe.validation if changes["data"] == recipe.data else 0.0
    recipe = asked_for(recipe.replace(**changes), trust=options.trust, uses=("model", "data"))
    result = evaluate_weights(options.source, recipe=recipe, device=options.device)
    if options.json:
        print(to_json(dataclasses.asdict(result) | {"top1_error": result.top1_error}))
    else:
        print(f"top-1 error  {result.top1_error:.2f} % ({result.errors} of {result.samples})")
        loss = f"{result.loss:.4f}"
        if not math.isfinite(result.loss):
            loss = "NaN or infinite, as the model's outputs are, though the data is finite"
        print(f"loss         {loss}")
    return 0


def export_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """A run's weights as a file that other libraries load."""
    from onehour.training.weights import export_weights

    print(f"wrote {export_weights(options.source, options.to)}")
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.source.is_dir():
        from onehour.training.record import Run

        return Run(options.source).recipe
    if options.recipe is not None:
        return named(options.recipe)
    if not (options.model and options.data):
        raise ValueError(f"{options.source} is a file: give --recipe, or --model and --data")
    return Recipe(name="evaluate")
