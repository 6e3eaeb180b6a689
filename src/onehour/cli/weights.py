"""`onehour evaluate`, `onehour predict`, `onehour recalibrate` and `onehour export`: weights outside their run."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import EXIT_BAD_INPUT, add_device, add_trust, size
from onehour.config import Recipe
from onehour.entry import asked_for
from onehour.files import is_written_into, to_json, written_at
from onehour.messages import nearest, tell
from onehour.recipes import recipe as named

if TYPE_CHECKING:
    from onehour.training.evaluate import Prediction, WeightsEvaluation


CODE = ("data", "model", "task", "collate", "train_transform")
"""Fields that may name someone's code; the last one matters to `recalibrate` alone, which has a flag for it."""
FORMATS = ("csv", "jsonl")  # of predictions


def add_source(command: Any) -> None:
    """Where weights come from, and of what model and data they are."""
    command.add_argument("source", metavar="RUN|FILE", type=Path, help="a run's folder, a .safetensors or a .pt file")
    command.add_argument("--recipe", metavar="RECIPE", help="of a file, or of a checkpoint; else --model and --data")
    command.add_argument("--data", metavar="D", help="instead of the recipe's")
    command.add_argument("--model", metavar="M", help="instead of the recipe's")
    command.add_argument("--task", metavar="T", help="instead of the recipe's")
    command.add_argument("--collate", metavar="C", help="instead of the recipe's")
    command.add_argument("--classes", type=size, help="number of labels, where the data does not say")
    add_trust(command)


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="print the error of a run's newest checkpoint, or of a file",
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
        help="write a run's weights for torchvision, timm and others, or its network as a program",
        description="Write a run's weights as a plain state dict under torch's own names (.safetensors, .pt), or the"
        " network itself for batches of any size (.pt2 by torch.export; .onnx). What was written is read back and"
        " compared before it gets its name.",
    )
    add_source(export)
    export.add_argument(
        "--to", metavar="FILE", type=Path, required=True, help="ends in .safetensors, .pt, .pt2 or .onnx"
    )
    _add_ema(export)
    export.add_argument("--force", action="store_true", help="replace an existing file")
    export.set_defaults(command=export_command)


def _add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="use a run's averaged weights instead of its weights")


def add_recalibrate(commands: Any) -> None:
    recalibrate = commands.add_parser(
        "recalibrate",
        help="compute BatchNorm's statistics from training images instead of running averages",
        description="Compute BatchNorm's means and variances over training images, augmented as in training, under the"
        " weights as they are; evaluate with them. The run stays as it is.",
    )
    add_source(recalibrate)
    recalibrate.add_argument("--train-transform", metavar="T", help="instead of the recipe's")
    add_device(recalibrate)
    recalibrate.add_argument("--images", type=size, metavar="SIZE", help="training images (8k, or all if fewer)")
    recalibrate.add_argument(
        "--to", metavar="FILE", type=Path, help="also write the weights with them; ends in .safetensors or .pt"
    )
    _add_ema(recalibrate)
    recalibrate.add_argument("--force", action="store_true", help="replace an existing file")
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
        tell(
            f"the run's curve was measured with statistics of {recipe.recalibrate} training images, and this"
            f" with the checkpoint's running averages; `{command}` evaluates as the run did",
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
    print(f"read back, its logits differ from the network's by {difference:.1e} at most")
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
    given = {name: getattr(options, name) for name in (*CODE, "classes") if name in options}
    changes = {name: value for name, value in given.items() if value}
    if "data" in changes:
        changes["samples"] = None
        changes["validation"] = recipe.validation if changes["data"] == recipe.data else 0.0
    return asked_for(recipe.replace(**changes), trust=options.trust, uses=[name for name in CODE if name in options])


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.source.is_dir():
        from onehour.training.record import RECIPE, Run

        is_run = (options.source / RECIPE).is_file()
        if is_run and options.recipe is not None:
            raise ValueError(f"{options.source} is a run, which has a recipe; leave --recipe {options.recipe} out")
        if is_run or options.recipe is None:
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


def add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="print the likeliest classes of image files",
        description="Read images as the run's validation images, and print the likeliest classes of each. An image that"
        " cannot be read is named on standard error; the others go on, and the exit code is 2.",
    )
    add_source(predict)
    predict.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="images, and folders of images")
    predict.add_argument("--top", type=size, default=1, metavar="K", help="classes of each image (1)")
    predict.add_argument("--format", default="csv", metavar="|".join(FORMATS), help="what is printed (csv)")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write here instead of standard output")
    predict.add_argument("--force", action="store_true", help="replace an existing file")
    add_device(predict)
    predict.set_defaults(command=predict_command)


def predict_command(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.format not in FORMATS:
        raise ValueError(f"--format is {options.format!r}; expected {nearest(options.format, FORMATS)}")
    to = options.output
    if to is not None and to.exists() and not options.force and not is_written_into(to):
        raise ValueError(f"{options.output} exists; choose another name, or give --force to replace it")
    from onehour.training.evaluate import Predictor, find_images

    paths = find_images(options.paths)
    predictor = Predictor(options.source, recipe=recipe_of(options), device=options.device)
    if options.top > predictor.outputs:
        raise ValueError(f"--top is {options.top}, and the model has {predictor.outputs} classes")
    line, bad = (_csv_line if options.format == "csv" else _json_line), 0
    with _output(options.output) as write, _progress(len(paths), to_file=options.output is not None) as done:
        if options.format == "csv":
            ranks = range(1, options.top + 1)
            write(_row(["path", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))]))
        for prediction in predictor.predict(paths, top=options.top, done=done):
            if prediction.problem:
                bad += 1
                tell(prediction.problem)
            else:
                write(line(prediction))
    if bad:
        tell(f"{bad} of {len(paths)} images could not be read")
    return EXIT_BAD_INPUT if bad else 0


def _csv_line(prediction: Prediction) -> str:
    values = (value for name, probability in prediction.classes for value in (name, f"{probability:.6g}"))
    return _row([str(prediction.path), *values])


def _json_line(prediction: Prediction) -> str:
    classes = [{"class": name, "probability": float(f"{value:.6g}")} for name, value in prediction.classes]
    return to_json({"path": str(prediction.path), "classes": classes}) + "\n"


def _row(values: list[str]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[str], object]]:
    if path is None:
        yield lambda text: print(text, end="", flush=True)
        return
    with written_at(path) as file:
        yield lambda text: file.write(text.encode("utf-8", "surrogateescape"))


@contextmanager
def _progress(images: int, *, to_file: bool) -> Iterator[Callable[[int], object]]:
    """A bar on standard error, where that is a terminal and no lines come to one."""
    if not sys.stderr.isatty() or (sys.stdout.isatty() and not to_file):
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True, soft_wrap=True), transient=True, redirect_stdout=False)
    with bar:
        task = bar.add_task("images", total=images)
        yield lambda images: bar.update(task, advance=images)
