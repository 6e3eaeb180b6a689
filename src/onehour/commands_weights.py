"""`onehour evaluate` and `onehour export`."""

from __future__ import annotations

import argparse
import dataclasses
import math

from onehour.config import Recipe
from onehour.entry import asked_for
from onehour.files import to_json
from onehour.recipes import recipe as named

__all__ = ["evaluate_command", "export_command"]


def evaluate_command(options: argparse.Namespace, arguments: list[str]) -> int:
    """The error of a run's newest checkpoint, or of a file's weights, on validation data."""
    from onehour.training.weights import evaluate_weights

    recipe = _recipe(options)
    changes = {name: getattr(options, name) for name in ("data", "model", "classes") if getattr(options, name)}
    if "data" in changes:
        changes["samples"] = None
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
