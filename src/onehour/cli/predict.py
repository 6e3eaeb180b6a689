"""`onehour predict`."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import EXIT_BAD_INPUT, add_device, size
from onehour.cli.weights import add_source, recipe_of
from onehour.files import to_json, written
from onehour.messages import nearest, say

if TYPE_CHECKING:
    from onehour.training.predict import Prediction


FORMATS = ("csv", "jsonl")


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
    if options.output is not None and options.output.exists() and not options.force:
        raise ValueError(f"{options.output} exists; choose another name, or give --force to replace it")
    from onehour.training.predict import Predictor, find_images

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
                say(f"onehour: {prediction.problem}", sys.stderr)
            else:
                write(line(prediction))
    if bad:
        say(f"onehour: {bad} of {len(paths)} images could not be read", sys.stderr)
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
    """Takes lines: to standard output as they come, or to a file, whole or not at all."""
    if path is None:
        yield lambda text: print(text, end="", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path.parent, path.name) as file:
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
