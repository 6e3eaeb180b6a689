"""`onehour report`: everything that a study shows, in a folder: a page, figures, and the results as data."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.files import open_inside, opened, replace_all
from onehour.leaving import undisturbed
from onehour.study.charts.picture import Picture
from onehour.study.export import FORMAT, results_csv, results_json
from onehour.study.others import read_paths
from onehour.study.reproduce import BASE, commands, environment_of, left_over, more_seeds, unfinished
from onehour.study.spec import SPEC
from onehour.study.tables import Findings, Row, findings_of
from onehour.study.text import GROUPS, error_text, joined, number, p_text, points, printable, seconds_text, size_label
from onehour.study.verdict import Verdict
from onehour.study.wording import Sentence, headline, multiple

if TYPE_CHECKING:
    from onehour.study.charts.picture import Picture

__all__ = ["Report", "context_of", "folder_for", "render", "verdict_words", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
PAGE, JSON, CSV, FIGURES = "report.html", "results.json", "results.csv", "figures"
MARK = f'<meta name="generator" content="{FORMAT}">'
"""By which a page of ours is known, so that nobody else's file is overwritten."""


@dataclass(frozen=True)
class Report:
    """A written report."""

    folder: Path
    findings: Findings

    @property
    def page(self) -> Path:
        """The page to open."""
        return self.folder / PAGE

    @property
    def results(self) -> Path:
        """Everything as data."""
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
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a report needs {' and '.join(missing)}: pip install 'onehour[report]'")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from onehour.study.charts.arms import arm_pictures
    from onehour.study.charts.curves import curve_pictures
    from onehour.study.charts.seconds import seconds_picture
    from onehour.study.charts.sizes import minibatch_picture, per_worker_pictures
    from onehour.study.report import context_of

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


def context_of(findings: Findings, pictures: dict[str, list[Picture]], written_by: str) -> dict[str, Any]:
    """The template's variables; every text is plain and is escaped there.

    Args:
        pictures: by section: "sizes", "arms", "per_worker", "curves", "seconds".
        written_by: the version that writes it.
    """
    study = findings.study
    recipe = study.recipe
    name = f"{recipe.name}: " if recipe else ""
    title = "error against minibatch" if findings.reference else "error over epochs"
    return {
        "title": f"{name}{title}" if name else title.capitalize(),
        "about": _about(findings),
        "headline": [
            {"sentence": sentence, "command": _command(findings, sentence)} for sentence in headline(findings)
        ],
        "margin": f"{findings.margin:g}",
        "last": _last(findings),
        "pictures": pictures,
        "sizes": [_size_row(findings, row) for row in findings.sizes],
        "derived": recipe is not None,
        "early": any(math.isfinite(row.early) for row in (*findings.sizes, *findings.arms)),
        "groups": [_group(findings, size, kind, rows) for (size, kind), rows in findings.groups.items()],
        "times": _times(findings),
        "environment": environment_of(study),
        "seeds": _seeds(findings),
        "commands": commands(study),
        "base_file": BASE,
        "recipe": recipe.to_toml() if recipe else "",
        "unfinished": unfinished(study),
        "left_over": left_over(study),
        "written_by": written_by,
    }


def verdict_words(verdict: Verdict | None) -> tuple[str, str]:
    """A verdict as a table's cell holds it: a word, and what is left out where there is little room.

    >>> verdict_words(None), verdict_words(Verdict("worse", 8.4, p=0.004))
    (('reference', ''), ('worse', 'p = 0.004'))
    """
    if verdict is None:
        return "reference", ""
    if verdict.state == "holds" and verdict.family == 1:
        return "holds", f"at most {points(verdict.upper)}"
    if verdict.state == "undecided":
        more = verdict.more_seeds
        return "undecided", f"{more} more seed{'s' * (more != 1)}" if more else "over 100 more seeds"
    if verdict.state in ("holds", "worse"):
        return verdict.state, p_text(verdict.p if verdict.state == "worse" else verdict.p_holds)
    return {"untested": "not tested", "one seed": "no verdict"}[verdict.state], ""


def _about(findings: Findings) -> str:
    study, recipe = findings.study, findings.study.recipe
    runs = [result for entry in study.entries for result in entry.results]
    asked = len(list(study.spec.cells())) if study.spec else len(runs)
    ended = sum(result.error is not None for result in runs)
    parts = [f"{recipe.model} on {recipe.data}", f"{recipe.epochs} epochs"] if recipe else []
    parts += [f"{len(findings.sizes)} minibatch{'es' * (len(findings.sizes) != 1)}"] if findings.sizes else []
    parts += [f"{len(findings.arms)} change{'s' * (len(findings.arms) != 1)} to the recipe"] if findings.arms else []
    return " · ".join([*parts, f"{ended} of {max(asked, len(runs))} runs ended"])


def _last(findings: Findings) -> str:
    """What a run's error is the median of; a curve may have several lines an epoch, or skip some."""
    curves = [[point.epoch for point in r.curve[-5:]] for entry in findings.study.entries for r in entry.results]
    gaps = {b - a for epochs in curves for a, b in itertools.pairwise(epochs)}
    return "five epochs" if gaps <= {1} else "five evaluations"


def _command(findings: Findings, sentence: Sentence) -> str:
    return more_seeds(findings.study, sentence.seeds) if sentence.seeds else ""


def _size_row(findings: Findings, row: Row) -> dict[str, Any]:
    return {
        "size": multiple(findings, row).partition(" ")[::2],
        "workers": str(row.recipe.workers.workers) if row.recipe else "–",
        "rate": f"{row.recipe.target_lr:.4g}" if row.recipe else "–",
        **_common(row),
        "difference": points(row.cost) if row.verdict and row.entry.n else "",
    }


def _common(row: Row) -> dict[str, Any]:
    return {
        "n": row.entry.n,
        "error": error_text(row.entry.mean, row.entry.std),
        "state": row.verdict.state if row.verdict else "reference",
        "verdict": verdict_words(row.verdict) if row.entry.n else ("no run", ""),
        "early": points(row.early),
        "non_finite": row.non_finite,
    }


def _group(findings: Findings, size: int, kind: str, rows: tuple[Row, ...]) -> dict[str, Any]:
    own = findings.beside(rows[0])
    family = max((row.verdict.family for row in rows if row.verdict), default=1)
    notes = []
    if own is None or not own.n:
        notes.append(f"The recipe itself has no run at {size_label(size)}, so there is nothing to hold these against.")
    if family > 1:
        notes.append(f"p is corrected by Holm for the {family} changes of this table.")
    if any(row.verdict and row.verdict.out_of_reach for row in rows):
        notes.append("With so few seeds nothing here could be called worse, however bad; train more.")
    if any(row.paper is not None for row in rows):
        notes.append("The paper’s differences are those at 8k on ImageNet (T1, T2).")
    return {
        "title": f"{GROUPS[kind]}, at minibatch {size_label(size)}",
        "paper": any(row.paper is not None for row in rows),
        "own": {"n": own.n, "error": error_text(own.mean, own.std)} if own and own.n else None,
        "rows": [
            {
                "name": row.name,
                "cost": points(row.cost),
                "paper": points(row.paper) if row.paper is not None else "",
                **_common(row),
            }
            for row in rows
        ],
        "notes": notes,
    }


def _times(findings: Findings) -> list[dict[str, Any]]:
    """What each halving of the reference's time costs."""
    reference = findings.reference
    if reference is None or not reference.seconds:
        return []
    rows = []
    for row in findings.sizes:
        if row.seconds and row.entry.n:
            halvings = math.log2(reference.mean_seconds / row.mean_seconds)
            std = statistics.stdev(row.seconds) / row.mean_seconds if len(row.seconds) > 1 else math.nan
            rows.append(
                {
                    "size": multiple(findings, row).partition(" ")[::2],
                    "time": seconds_text(row.mean_seconds),
                    "spread": f"± {100 * std:.0f} %" if math.isfinite(std) else "",
                    "ratio": f"{reference.mean_seconds / row.mean_seconds:.2f}×",
                    "halvings": number(halvings),
                    "error": error_text(row.entry.mean, row.entry.std),
                    "non_finite": row.non_finite,
                    "each": points(row.cost / halvings) if halvings > 0.05 else "–",
                }
            )
    return rows if len(rows) > 1 else []


def _seeds(findings: Findings) -> str:
    found = sorted({r.seed for entry in findings.study.entries for r in entry.results if r.seed is not None})
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return joined([str(seed) for seed in found]) if found else ""
