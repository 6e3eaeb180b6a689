"""Folders that came from elsewhere: links at every name, names that lead out, code, text for terminals and tables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from campaigns.hostile_cases import ESCAPE, RESUME, case, checkpoints, forge
from campaigns.hostile_data import pictures
from onehour.config import Recipe
from onehour.data.index import INDEX
from onehour.recipes import digits
from tests.helpers.studies import write_csv, write_sweep

REPORT = ["report", "run"]
SWEEP = ["sweep", "digits", "--seeds", "1", "--minibatch", "32", "--arm", "none", "--device", "cpu", "--out", "run"]
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a;=1", "a,@b", "＝1", '"=1', " =1")
"""What a spreadsheet computes, at a cell's beginning or behind what another one divides cells at."""


def outside(here: Path, name: str = "precious") -> Path:
    """What must not change."""
    return here.parent / "outside" / name


def linked(path: Path, target: Path) -> None:
    """A link in the place of a file or a folder."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.moved"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# Links in a run's folder, which is resumed

IN_RUNS = (
    *(".lock", "recipe.toml", "metrics.jsonl", "timing.jsonl", "environment.json", "summary.json", "outcome.json"),
    *("curve.png", "bad_images.jsonl", "trace-0.json", ".beats", ".writing", ".recipe.toml.writing", "tensorboard"),
)
for _name in IN_RUNS:

    @case(f"a link at {_name}, resumed", needs_run=True)
    def _(here: Path, name: str = _name) -> list[str]:
        linked(here / "run" / name, outside(here))
        return RESUME


# Links in a sweep's folder, which goes on

IN_SWEEPS = ("sweep.toml", ".lock", "log-0.txt", "cells", "cells/32-s0", "cells/32-s0/metrics.jsonl")
for _name in IN_SWEEPS:

    @case(f"a link at {_name}, swept")
    def _(here: Path, name: str = _name) -> list[str]:
        write_sweep(here / "run", seeds=1, minibatches=(32,), arms=(), unfinished=["32-s0"])
        linked(here / "run" / name, outside(here, "" if name in ("cells", "cells/32-s0") else "precious"))
        return SWEEP


@case("a link at .sweep.toml.writing, swept", code=0)
def _(here: Path) -> list[str]:
    write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
    linked(here / "run" / ".sweep.toml.writing", outside(here))
    return SWEEP


# Links in a folder that is reported

IN_REPORTS = {
    **dict.fromkeys(("report.html", "results.json", "results.csv", "figures", ".writing"), 2),
    **dict.fromkeys(("figures/curves.png", "figures/error-against-minibatch.svg", "base-recipe.toml"), 0),
    **dict.fromkeys((".report.html.writing", ".results.json.writing"), 0),
}
for _name, _code in IN_REPORTS.items():

    @case(f"a link at {_name}, reported", code=_code)
    def _(here: Path, name: str = _name) -> list[str]:
        write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
        linked(here / "run" / name, outside(here, "" if name in ("figures", ".writing") else "precious"))
        return REPORT


# Pipes, which would be waited for

for _name in ("metrics.jsonl", "recipe.toml", "summary.json", "environment.json"):

    @case(f"a pipe at {_name}, reported", needs_run=True)
    def _(here: Path, name: str = _name) -> list[str]:
        (here / "run" / name).unlink(missing_ok=True)
        os.mkfifo(here / "run" / name)
        return [*REPORT, "--out", "run/out"]


for _name in ("report.html", "results.json", "results.csv", "sweep.toml", "cells/32-s0/metrics.jsonl"):

    @case(f"a pipe at {_name}, reported with its sweep")
    def _(here: Path, name: str = _name) -> list[str]:
        write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
        (here / "run" / name).unlink(missing_ok=True)
        os.mkfifo(here / "run" / name)
        return REPORT


# Names in results.json, which once were deleted

NAMES = {
    "that climb": ["../../../outside/precious", "../../../outside/*", "../cells/*", ".."],
    "that match all": ["*", "**", "?*", "[a-z]*"],
    "of other kinds": [1, None, ["precious"], {"a": 1}, "\0", "\n", ""],
    "absolute": ["/../outside/precious"],
}
for _name, _figures in NAMES.items():

    @case(f"figures {_name}, reported", code=0)
    def _(here: Path, figures: list[object] = _figures) -> list[str]:
        write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
        listed = [*figures, str(outside(here)), f"{outside(here).parent}/*"]
        content = {"format": "onehour report 1", "figures": listed}
        (here / "run" / "results.json").write_text(json.dumps(content, indent=1))
        return REPORT


for _name, _content in {"a number": "7", "an object": '{"a": 1}', "nested": "[" * 9000}.items():

    @case(f"figures are {_name}, reported", code=0)
    def _(here: Path, content: str = _content) -> list[str]:
        write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
        (here / "run" / "results.json").write_text(f'{{"format": "onehour report 1", "figures": {content}}}')
        return REPORT


# Code that a folder brings along

CODE = "open('executed', 'w').close()\nfrom onehour.models.resnet import resnet8\ndef net(): return resnet8()\n"
NAMING: dict[str, dict[str, str]] = {
    "model": {"model": "run.evil:net"},
    "data": {"data": "run.evil:net"},
    "optimizer": {"optimizer": "run.evil:net"},
    "Python's own code": {"data": "os:abort"},
}


def bring(here: Path, changes: dict[str, str]) -> Path:
    """A run whose recipe names code, and whose checkpoints are of that recipe."""
    (here / "run" / "evil.py").write_text(CODE)
    (here / "run" / "__init__.py").write_text(CODE)
    path = here / "run" / "recipe.toml"
    path.write_text(Recipe.from_toml(path).replace(**changes).to_toml())  # pyright: ignore[reportArgumentType]
    return path


COMMANDS: dict[str, list[str]] = {
    "trained": ["train", "run/recipe.toml", "--out", "run/again", "--device", "cpu"],
    "trained by several": ["train", "run/recipe.toml", "--out", "run/again", "--device", "cpu", "--processes", "2"],
    "verified": ["verify", "run/recipe.toml", "--device", "cpu", "--steps", "1", "--processes", "1,2"],
    "swept": ["sweep", "run/recipe.toml", "--out", "run/again", "--device", "cpu", "--seeds", "1"],
}
for _name, _changes in NAMING.items():
    for _how, _arguments in COMMANDS.items():

        @case(f"a recipe names {_name}, {_how}", needs_run=True)
        def _(here: Path, changes: dict[str, str] = _changes, arguments: list[str] = _arguments) -> list[str]:
            bring(here, changes)
            return arguments


for _name in ("model", "data", "Python's own code"):

    @case(f"a run names {_name}, evaluated", needs_run=True)
    def _(here: Path, changes: dict[str, str] = NAMING[_name]) -> list[str]:
        digest = hashlib.sha256(bring(here, changes).read_bytes()).hexdigest()
        for folder in checkpoints(here):
            forge(folder, "", recipe=digest)
        return ["evaluate", "run", "--device", "cpu"]


# Text for terminals, pages and tables


@case("escapes in a recipe's texts, reported", code=0)
def _(here: Path) -> list[str]:
    recipe = digits(classes=10).replace(name=f"{ESCAPE}\x9b1m\u202e", model=f"{ESCAPE}:\nnet", data="<b>$\\frac$")
    write_sweep(here / "run", recipe=recipe, seeds=1, minibatches=(32,), arms=())
    return REPORT


@case("a lone surrogate in environment.json, reported", code=0)
def _(here: Path) -> list[str]:
    write_sweep(here / "run", seeds=1, minibatches=(32,), arms=())
    path = next((here / "run" / "cells").iterdir()) / "environment.json"
    path.write_text('{"sessions": [{"gpu": "\\ud800 \\u001b[2J", "\\udfff": "<script>"}]}')
    return REPORT


@case("formulas and escapes as arms and names of CSVs, reported", code=0)
def _(here: Path) -> list[str]:
    (here / "run").mkdir()
    made = [write_csv(here / "run" / f"=cmd()\x1b[2J{n}.csv", [9, 8]) for n in range(2)]
    made += [
        write_csv(here / "run" / f"{n}.csv", [9, 8], minibatch=64, arm=text.replace('"', '""'))
        for n, text in enumerate(FORMULAS)
        if not set(text) & set("\t\r,;")
    ]
    return ["report", *(os.fspath(path.relative_to(here)) for path in made), "--out", "run/out"]


# Folders of data


def data_case(name: str, code: int, arguments: list[str]) -> Callable[[Callable[[Path], None]], None]:
    """A case of a folder `run` of images."""

    def added(plant: Callable[[Path], None]) -> None:
        @case(name, code=code)
        def _(here: Path) -> list[str]:
            pictures(here / "run" / "data")
            plant(here)
            return arguments

    return added


PACK = ["data", "pack", "run/data", "run/pack", "--jobs", "1"]


@data_case("a link where an index is written first", 0, ["data", "index", "run/data"])
def _(here: Path) -> None:
    linked(here / "run" / "data" / f".{INDEX}.writing", outside(here))


@data_case("a link where an index is", 0, ["data", "index", "run/data"])
def _(here: Path) -> None:
    linked(here / "run" / "data" / INDEX, outside(here))


@data_case("a link at a pack's lock", 2, PACK)
def _(here: Path) -> None:
    linked(here / "run" / "pack" / ".lock", outside(here))


@data_case("a link at a pack's records", 2, PACK)
def _(here: Path) -> None:
    linked(here / "run" / "pack" / ".parts", outside(here, ""))


@data_case("a link where a shard is written first", 0, PACK)
def _(here: Path) -> None:
    linked(here / "run" / "pack" / ".train-00000.tar.writing", outside(here))


@data_case("records of a pack that name other files", 0, PACK)
def _(here: Path) -> None:
    for folder in (here / "run" / "pack" / ".parts", here / "run" / "pack"):
        folder.mkdir(parents=True, exist_ok=True)
    (here / "run" / "pack" / ".parts" / "thesis.txt").write_text("")
