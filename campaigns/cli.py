"""Thousands of seeded command lines and recipe files: never a traceback, only exit codes that docs/reference.md names.

    python -m campaigns.cli [--cases N]

Every subcommand, its flags read from the parser itself, with values that fit, that nearly fit and that are junk, and
recipe files with lines changed, doubled, dropped and bytes flipped. They run in this process, in a folder of their own;
where something would train, check a script or start processes, it ends there. A line of the ledger is a hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from campaigns.cli_words import JUNK, PATHS, TOML_VALUES, WORDS
from campaigns.ledger import run
from onehour import cli
from onehour.cli.parser import Parser

CAMPAIGN = "cli"
BLOCK = 100
CODES = {0, 1, 2, 4, 75}
SECONDS = 30
RECIPE = "digits"


class Late(BaseException):
    """A command took too long."""


def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every subcommand's parser, by its words."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}

    def walk(words: tuple[str, ...], parser: Parser) -> None:
        for name, child in parser.commands.items():
            walk((*words, name), child)
        if not parser.commands:
            found[words] = parser

    walk((), cli.make_parser())
    return found


def value(draw: random.Random, action: argparse.Action) -> str:
    """Something for a flag: mostly what fits its name, sometimes another's, sometimes junk."""
    kind = draw.random()
    if action.type is Path:
        return draw.choice(PATHS)
    fits = WORDS.get(action.dest, WORDS["number"])
    if action.choices is not None and not isinstance(action.choices, dict):
        fits = [str(choice) for choice in action.choices]
    if kind < 0.7:
        return draw.choice(fits)
    if kind < 0.85:
        return draw.choice(WORDS[draw.choice(sorted(WORDS))])
    return mutated(draw, draw.choice(fits)) if kind < 0.93 else draw.choice(JUNK)


def mutated(draw: random.Random, text: str) -> str:
    """A text with one character changed, dropped or doubled."""
    if not text:
        return draw.choice(JUNK)
    at = draw.randrange(len(text))
    other = draw.choice([text[at] * 2, "", chr(draw.randrange(1, 0x2FF)), "٣", "-", ".", ",", "=", " "])
    return text[:at] + other + text[at + 1 :]


def arguments(draw: random.Random, commands: dict[tuple[str, ...], argparse.ArgumentParser]) -> list[str]:
    """A command line."""
    words = draw.choice(sorted(commands))
    given: list[str] = []
    for action in commands[words]._actions:
        if action.option_strings:
            if "--help" in action.option_strings or draw.random() > 2.5 / len(commands[words]._actions):
                continue
            flag = draw.choice(action.option_strings)
            flag = mutated(draw, flag) if draw.random() < 0.03 else flag
            if action.nargs == 0:
                given.append(flag)
            elif draw.random() < 0.3:
                given.append(f"{flag}={value(draw, action)}")
            else:
                given += [flag, *([value(draw, action)] if draw.random() > 0.02 else [])]
        elif draw.random() > 0.05:
            given += [value(draw, action) for _ in range(draw.choice((1, 1, 1, 2)) if action.nargs == "+" else 1)]
    if words == ("sweep",):
        given.append("--dry-run")
    if draw.random() < 0.03:
        draw.shuffle(given)
    if draw.random() < 0.02:
        given.insert(draw.randrange(len(given) + 1), draw.choice(["--help", "--", "-", "--workers=3", *JUNK]))
    return [*([mutated(draw, word) for word in words] if draw.random() < 0.01 else words), *given]


def recipe_text(draw: random.Random, whole: str) -> str:
    """A recipe file with something wrong in it, or nothing."""
    lines = whole.splitlines()
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(lines))
        key = lines[at].partition("=")[0].strip()
        lines[at : at + 1] = draw.choice(
            [
                [f"{key} = {draw.choice(TOML_VALUES)}"],
                [f"{key} = {draw.choice(TOML_VALUES)}"],
                [lines[at], lines[at]],
                [],
                [f"{mutated(draw, key)} = 1"],
                [mutated(draw, lines[at])],
                [f"[{key}]", lines[at]],
            ]
        ) or [""]
    return "\n".join(lines)


@cache
def whole_recipe() -> str:
    """The file of a recipe."""
    from onehour.recipes import recipe

    return recipe(RECIPE).replace(samples=8192, classes=10).to_toml()


@contextmanager
def nothing_starts(draw: random.Random) -> Iterator[None]:
    """Where training, a script or processes would start, the command ends in one of the ways in which these end."""
    import onehour.runs as runs
    from onehour.check.run.forkserver import CheckError
    from onehour.data import sources
    from onehour.dist.launch import LaunchError

    real_check, real_load = runs.check_start, sources.load_data

    def check(recipe: Any, execution: Any) -> Any:
        return real_check(recipe, execution) if draw.random() < 0.1 else None

    def data(name: str, form: Any, **options: Any) -> Any:
        return loaded(real_load, name, form, tuple(sorted(options.items())))

    def fail(error: Exception) -> Callable[..., Any]:
        def failing(*_: Any, **__: Any) -> Any:
            raise error

        return failing

    patches: list[tuple[str, Any]] = [
        ("onehour.cli.train._train_here", lambda *_: draw.choice((4, 75))),
        *((f"onehour.cli.{name}.launch", fail(LaunchError("a process failed", 1))) for name in ("train", "verify")),
        ("onehour.check.run.checking.check_script", fail(CheckError("not checked here"))),
        ("onehour.runs.check_start", check),
        ("onehour.training.record.move_aside", lambda folder: None),
        ("onehour.sweeps.sweep.expected_seconds", lambda *_, **__: 60.0),
    ]
    with ExitStack() as stack:
        for name, replacement in patches:
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(mock.patch.object(sources, "load_data", data))
        yield


@cache
def loaded(load: Callable[..., Any], name: str, form: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """The data of a name, once."""
    return load(name, form, **dict(options))


def furnish(folder: Path) -> None:
    """A place with what commands ask for: a finished run, weights, curves, images."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from onehour.models.resnet import resnet8

    (folder / "recipe.toml").write_text(whole_recipe(), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        from onehour.api import train

        train(RECIPE, minibatch=1024, epochs=1, warmup_epochs=1, out=folder / "run", device="cpu")
    shutil.copytree(folder / "run", folder / "half")
    (folder / "half" / "summary.json").unlink()
    (folder / "half" / "metrics.jsonl").write_text('{"recipe": {}}\n{"epoch": "one"}\n', encoding="utf-8")
    save_file(resnet8().state_dict(), folder / "net.safetensors")
    torch.save(resnet8().state_dict(), folder / "net.pt")
    (folder / "bad.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    (folder / "curve.csv").write_text("epoch,error\n1,50\n2,40\n", encoding="utf-8")
    (folder / "bad.csv").write_text("epoch;error\n1;x\n", encoding="utf-8")
    for side in ("train", "val"):
        for label in "ab":
            (folder / "images" / side / label).mkdir(parents=True)
            pixels = np.zeros((8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / side / label / "0.png")


def tried(line: list[str]) -> str:
    """What is wrong with how a command line ends; "" for nothing."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "backslashreplace")
    )

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(list(line))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            out.flush()
    except Late:
        return f"takes over {SECONDS} s"
    except BaseException:
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    err.flush()
    said = err.buffer.getvalue().decode()  # pyright: ignore[reportAttributeAccessIssue]
    if code not in CODES:
        return f"leaves with {code}"
    if "Traceback" in said:
        return said[-1500:]
    if code == 2 and not said.strip().splitlines()[-1:][0:1]:
        return "leaves with 2 and says nothing"
    return ""


def block(numbers: range, folder: Path) -> dict[str, Any]:
    """Some command lines, each with a recipe file of its own."""
    commands = parsers()
    wrong = []
    for number in numbers:
        draw = random.Random(f"{CAMPAIGN} {number}")
        (folder / "mine.toml").write_text(recipe_text(draw, whole_recipe()), encoding="utf-8")
        line = arguments(draw, commands)
        with nothing_starts(draw):
            fault = tried(line)
        if fault:
            wrong.append(f"{line}: {fault}")
    return {"ok": not wrong, "runs": len(numbers), "failures": len(wrong), "said": "\n".join(wrong)[:20000]}


@contextmanager
def furnished() -> Iterator[Path]:
    """The place, with this process in it."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        furnish(Path(name))
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def blocks() -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    """All ten thousand command lines."""
    with furnished() as folder:
        for case in range(10_000 // BLOCK):
            yield CAMPAIGN, case, partial(block, range(case * BLOCK, (case + 1) * BLOCK), folder)


if __name__ == "__main__":
    sys.exit(run(CAMPAIGN, blocks()))
