"""`onehour report`: everything that a study shows, in a folder: a page, figures, and the results as data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from onehour.files import open_inside, opened, replace_all
from onehour.leaving import undisturbed
from onehour.study.export import FORMAT, results_csv, results_json
from onehour.study.others import read_paths
from onehour.study.reproduce import BASE
from onehour.study.spec import SPEC
from onehour.study.tables import Findings, findings_of
from onehour.study.text import printable

if TYPE_CHECKING:
    from onehour.study.charts.picture import Picture

__all__ = ["Report", "folder_for", "render", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
PAGE, JSON, CSV, FIGURES = "report.html", "results.json", "results.csv", "figures"
MARK = f'<meta name="generator" content="{FORMAT}">'
"""By which a page of ours is known, so that nobody else's file is overwritten."""


@dataclass(frozen=True)
class Report:
    """A written report.

    >>> from onehour.study.results import Study
    >>> Report(Path("runs/digits-sweep"), Findings(Study(None, ()))).page.name
    'report.html'
    """

    folder: Path
    findings: Findings

    @property
    def page(self) -> Path:
        """The page to open.

        >>> from onehour.study.results import Study
        >>> Report(Path("sweep"), Findings(Study(None, ()))).page.as_posix()
        'sweep/report.html'
        """
        return self.folder / PAGE

    @property
    def results(self) -> Path:
        """Everything as data.

        >>> from onehour.study.results import Study
        >>> Report(Path("sweep"), Findings(Study(None, ()))).results.as_posix()
        'sweep/results.json'
        """
        return self.folder / JSON


def folder_for(paths: Sequence[Path]) -> Path:
    """Where a report goes unless it is told: into the sweep's folder, else into `report` beside the first path.

    >>> folder_for([Path("runs/digits-32-s0"), Path("runs/digits-64-s0")]).as_posix()
    'runs/report'
    """
    if not paths:
        raise ValueError("nothing to report; give a sweep's folder, runs' folders, or CSVs of epoch,error")
    return paths[0] if (paths[0] / SPEC).is_file() else paths[0].parent / "report"


def write_report(paths: Sequence[Path], out: Path | None = None, margin: float = 0.5) -> Report:
    """Read, judge, draw and write; nothing is written before all of it is known to be right.

    Args:
        paths: a sweep's folder, runs' folders, CSVs.
        out: the folder to write into; `folder_for` unless given.
        margin: of the verdicts, in points.

    Raises:
        ValueError: for bad input, a missing library, or a folder that holds somebody else's files of these names.

    >>> write_report([Path("nowhere.csv")])
    Traceback (most recent call last):
    ValueError: nowhere.csv cannot be read: No such file or directory
    """
    findings = findings_of(read_paths(paths), margin)
    folder = folder_for(paths) if out is None else out
    _refuse_others(folder)
    page, pictures = render(findings)
    names = tuple(picture.name for picture in pictures)
    recipe = findings.study.recipe
    files: dict[str, str | bytes] = {
        f"{FIGURES}/{name}": content for picture in pictures for name, content in picture.files().items()
    }
    files |= {PAGE: page, JSON: results_json(findings, names, _version()), CSV: results_csv(findings)}
    if BASE in page and recipe is not None:
        files[BASE] = recipe.to_toml()
    try:
        with undisturbed():
            replace_all(folder, files, gone=[name for name in _old_figures(folder) if name not in files])
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; what was there is as it was") from error
    return Report(folder, findings)


def render(findings: Findings) -> tuple[str, list[Picture]]:
    """The page as text, and its pictures.

    Raises:
        ValueError: if matplotlib or Jinja2 is missing.

    >>> from onehour.study.results import Study
    >>> page, pictures = render(Findings(Study(None, ())))
    >>> page[:15], len(pictures)
    ('<!DOCTYPE html>', 0)
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a report needs {' and '.join(missing)}: pip install 'onehour[report]'")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from onehour.study.charts.arms import arm_pictures
    from onehour.study.charts.curves import curve_pictures
    from onehour.study.charts.minibatch import minibatch_picture
    from onehour.study.charts.per_worker import per_worker_pictures
    from onehour.study.charts.seconds import seconds_picture
    from onehour.study.page import context_of

    per_worker = per_worker_pictures(findings)
    sizes, seconds = minibatch_picture(findings), seconds_picture(findings)
    pictures = {
        "sizes": [sizes] if sizes else [],
        "arms": arm_pictures(findings, elsewhere=["n"] if per_worker else []),
        "per_worker": per_worker,
        "curves": curve_pictures(findings),
        "seconds": [seconds] if seconds else [],
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tied"] = _tied
    template = environment.get_template("report.html.j2")
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    drawn = [picture for section in pictures.values() for picture in section]
    classes: dict[str, str] = {}
    svgs = {picture.name: [picture.inline(kind, classes) for kind in ("wide", "narrow")] for picture in drawn}
    style += Markup("").join(Markup(f".{name} {{ {text} }}\n") for name, text in classes.items())
    context = context_of(findings, pictures, _version())
    return printable(template.render(style=style, mark=Markup(MARK), svgs=svgs, **context)), drawn


def _refuse_others(folder: Path) -> None:
    """Refuse to overwrite somebody else's files.

    Raises:
        ValueError: if one of the files that a report writes is not of a report, or is a link.
    """
    first = {PAGE: MARK, JSON: f'"format": "{FORMAT}"', CSV: "arm,minibatch,per_worker,"}
    for name, mark in first.items():
        text = _text(folder, name)
        if text is not None and mark not in text[:2000]:
            raise ValueError(f"{folder / name} is not of a report, and would be overwritten; choose another --out")
    with suppress(FileNotFoundError), opened(folder, FIGURES):
        pass  # it is no link


def _old_figures(folder: Path) -> list[str]:
    """Figures of an earlier report there, by the names that their files have in the folder."""
    from onehour.study.charts.picture import FORMATS

    try:
        listed = json.loads(_text(folder, JSON) or "")["figures"]
        with opened(folder, FIGURES) as held:
            found = [Path(name) for name in os.listdir(held)]
        # What a file lists may be anything: it is compared with what lies there, and leads nowhere itself.
        return [f"{FIGURES}/{path}" for path in found if path.suffix[1:] in FORMATS and path.stem in list(listed)]
    except (ValueError, TypeError, KeyError, RecursionError, FileNotFoundError):
        return []  # it was cut in the middle, or there is none: it is written anew


def _text(folder: Path, name: str) -> str | None:
    with suppress(FileNotFoundError), os.fdopen(open_inside(folder, name, os.O_RDONLY), "rb") as file:
        return file.read().decode(errors="replace")
    return None


def _tied(text: str) -> str:
    """With spaces that no line breaks at, before a unit and around ±."""
    return re.sub(r" (?=%)|(?<=\d) (?=(?:s|min|h)\b)|(?<=±) | (?=±)", "\u00a0", text)


def _version() -> str:
    return metadata.version("onehour")
