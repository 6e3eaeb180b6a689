"""`onehour report`: everything that a study shows, in a folder: a page, figures, and the results as data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from onehour.files import replace_whole
from onehour.leaving import undisturbed
from onehour.study.export import FORMAT, results_csv, results_json
from onehour.study.others import read_paths
from onehour.study.reproduce import BASE
from onehour.study.spec import SPEC
from onehour.study.tables import Findings, findings_of

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
    old = _old_figures(folder)
    page, pictures = render(findings)
    names = tuple(picture.name for picture in pictures)
    recipe = findings.study.recipe
    files = {PAGE: page, JSON: results_json(findings, names, _version()), CSV: results_csv(findings)}
    if BASE in page and recipe is not None:
        files[BASE] = recipe.to_toml()
    with undisturbed():
        for name in old:
            for path in (folder / FIGURES).glob(f"{name}.*"):
                path.unlink()
        for picture in pictures:
            picture.save(folder / FIGURES)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_whole(folder / name, text)
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
    return template.render(style=style, mark=Markup(MARK), svgs=svgs, **context), drawn


def _old_figures(folder: Path) -> list[str]:
    """Names of the figures of an earlier report there.

    Raises:
        ValueError: if one of the files that a report writes is somebody else's.
    """
    first = {PAGE: MARK, JSON: f'"format": "{FORMAT}"', CSV: "arm,minibatch,per_worker,"}
    for name, mark in first.items():
        path = folder / name
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ValueError(f"{path} is not of a report, and would be overwritten; choose another --out")
    path = folder / JSON
    try:
        return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else []
    except (ValueError, KeyError):  # cut in the middle: it is written anew
        return []


def _tied(text: str) -> str:
    """With spaces that no line breaks at, before a unit and around ±."""
    return re.sub(r" (?=%)|(?<=\d) (?=(?:s|min|h)\b)|(?<=±) | (?=±)", "\u00a0", text)


def _version() -> str:
    return metadata.version("onehour")
