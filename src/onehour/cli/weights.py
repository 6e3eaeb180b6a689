"""`onehour evaluate`, `onehour export` and `onehour recalibrate`: weights outside their run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import add_device, add_trust, size
from onehour.config import Recipe
from onehour.entry import asked_for
from onehour.files import to_json
from onehour.messages import say
from onehour.recipes import recipe as named

if TYPE_CHECKING:
    from onehour.training.evaluate import WeightsEvaluation


CODE = ("data", "model", "task", "collate")  # fields that may name someone's code


def add_source(command: Any) -> None:
    """Where weights come from, and of what model and data they are."""
    command.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    command.add_argument("--recipe", metavar="RECIPE", help="for a file: its recipe, or give --model and --data")
    command.add_argument("--data", metavar="D", help="in place of the recipe's")
    command.add_argument("--model", metavar="M", help="in place of the recipe's")
    command.add_argument("--task", metavar="T", help="in place of the recipe's")
    command.add_argument("--collate", metavar="C", help="in place of the recipe's")
    command.add_argument("--classes", type=size, help="labels, where the data does not say")
    add_trust(command)


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="the error of a run's newest checkpoint, or of a file",
        description="Evaluate weights on validation data: integer counts, every sample once.",
    )
    add_source(evaluate)
    add_device(evaluate)
    _add_ema(evaluate)
    evaluate.add_argument("--per-class", action="store_true", help="also print the error of each class")
    evaluate.add_argument("--json", action="store_true", help="print JSON, with the error of each class")
    evaluate.set_defaults(command=evaluate_command)


def add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a run's weights for torchvision, timm and others, or its network as a program",
        description="Write a run's weights as a plain state dict under torch's own names (.safetensors, .pt), or the"
        " network itself for batches of any size (.pt2 by torch.export; .onnx). What was written is opened again and"
        " compared before it gets its name.",
    )
    add_source(export)
    export.add_argument(
        "--to", metavar="FILE", type=Path, required=True, help="ends in .safetensors, .pt, .pt2 or .onnx"
    )
    _add_ema(export)
    export.add_argument("--force", action="store_true", help="replace a file that is there")
    export.set_defaults(command=export_command)


def _add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="a run's averaged weights in place of its weights")


def add_recalibrate(commands: Any) -> None:
    recalibrate = commands.add_parser(
        "recalibrate",
        help="BatchNorm's statistics from training images, in place of the running averages",
        description="Compute BatchNorm's means and variances over training images, augmented as in training, under the"
        " weights as they are; evaluate with them. The run stays as it is.",
    )
    add_source(recalibrate)
    add_device(recalibrate)
    recalibrate.add_argument("--images", type=size, metavar="SIZE", help="training images (8k, or all if fewer)")
    recalibrate.add_argument(
        "--to", metavar="FILE", type=Path, help="also write the weights with them; ends in .safetensors or .pt"
    )
    _add_ema(recalibrate)
    recalibrate.add_argument("--force", action="store_true", help="replace a file that is there")
    recalibrate.add_argument("--json", action="store_true", help="print JSON")
    recalibrate.set_defaults(command=recalibrate_command)


def evaluate_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.training.evaluate import OpenedWeights

    recipe = recipe_of(options)
    if options.per_class and recipe.task is not None:
        raise ValueError(f"--per-class counts classes, and task {recipe.task} has none")
    result = OpenedWeights(options.source, recipe=recipe, device=options.device, ema=options.ema).evaluate()
    if options.json:
        print(to_json(_as_json(result)))
        return 0
    _print(result)
    if options.per_class:
        width = max(len("class"), *(len(row.name) for row in result.by_class))
        print(f"\n{'class':<{width}}  error")
        for row in result.by_class:
            error = "no samples" if row.error is None else f"{row.error:.2f} % ({row.errors} of {row.samples})"
            print(f"{row.name:<{width}}  {error}")
    if recipe.recalibrate is not None and options.source.is_dir():
        command = f"onehour recalibrate {options.source}{' --ema' * options.ema}"
        say(
            f"onehour: the run's curve was measured with statistics of {recipe.recalibrate} training images, and this"
            f" with the checkpoint's running averages; `{command}` evaluates as the run did",
            sys.stderr,
        )
    return 0


def export_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.training.weights import FORMATS, PROGRAMS, export_program, read_weights, refuse_place, write_weights

    refuse_place(options.to, (*FORMATS, *PROGRAMS), force=options.force)
    if options.to.suffix not in PROGRAMS:
        print(f"wrote {write_weights(read_weights(options.source, ema=options.ema), options.to)}")
        return 0
    shape, difference = export_program(options.source, options.to, recipe=recipe_of(options), ema=options.ema)
    sizes = ", ".join(["N", *map(str, shape)])
    print(f"wrote {options.to}: float32 images ({sizes}) as the network takes them, to logits")
    print(f"opened again, its logits differ from the network's by {difference:.1e} at most")
    return 0


def recalibrate_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.training.evaluate import recalibrated
    from onehour.training.weights import FORMATS, refuse_place, write_weights

    if options.to is not None:
        refuse_place(options.to, FORMATS, force=options.force)
    recipe = recipe_of(options)
    found = recalibrated(options.source, recipe=recipe, images=options.images, device=options.device, ema=options.ema)
    if options.json:
        print(to_json({**_as_json(found.after), "images": found.images, "before": _as_json(found.before)}))
    else:
        print(f"BatchNorm's statistics over {found.images} training images")
        _print(found.after)
        print(f"before       {_error(found.before)}")
    if options.to is not None:
        write_weights(found.weights, options.to)
        if not options.json:
            print(f"wrote {options.to}")
    return 0


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe of a run, or of a file as the options name it, whose model and data somebody has asked for."""
    recipe = _recipe(options)
    changes = {name: getattr(options, name) for name in (*CODE, "classes") if getattr(options, name)}
    if "data" in changes:
        changes["samples"] = None
        changes["validation"] = recipe.validation if changes["data"] == recipe.data else 0.0
    return asked_for(recipe.replace(**changes), trust=options.trust, uses=CODE)


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.source.is_dir():
        from onehour.training.record import Run

        return Run(options.source).recipe
    if options.recipe is not None:
        return named(options.recipe)
    if not options.source.exists():
        raise ValueError(f"{options.source} does not exist")
    if not (options.model and options.data):
        raise ValueError(f"{options.source} is a file: give --recipe, or --model and --data")
    return Recipe(name="evaluate")


def _error(result: WeightsEvaluation) -> str:
    """The top-1 error; of a task of one's own its first metric."""
    from onehour.training.record import Metric

    if result.errors is None:
        return Metric.called(next(iter(result.metrics))).of(result.error)
    return f"{result.error:.2f} % ({result.errors} of {result.samples})"


def _print(result: WeightsEvaluation) -> None:
    from onehour.training.record import Metric

    for metric, value in ((Metric.called(name), value) for name, value in result.metrics.items()):
        print(f"{metric.name:<12} {metric.of(value)}")
    if result.errors is not None:
        print(f"top-1 error  {_error(result)}")
    if result.top5_errors is not None:
        print(f"top-5 error  {result.top5_error:.2f} % ({result.top5_errors} of {result.samples})")
    loss = f"{result.loss:.4f}"
    if not math.isfinite(result.loss):
        loss = "NaN or infinite, as the model's outputs are, though the data is finite"
    print(f"loss         {loss}")


def _as_json(result: WeightsEvaluation) -> dict[str, Any]:
    if result.errors is None:
        return {"samples": result.samples, "loss": result.loss, "metrics": result.metrics}
    rows = [dataclasses.asdict(row) | {"error": row.error} for row in result.by_class]
    errors = {"top1_error": result.error, "top5_error": result.top5_error}
    plain = {name: value for name, value in dataclasses.asdict(result).items() if name != "metrics"}
    return plain | errors | {"by_class": rows}
