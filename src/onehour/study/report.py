"""`onehour report`: everything that a study shows, in a folder: a page, figures, and the results as data."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from onehour.files import open_inside, opened, replace_all, to_json
from onehour.leaving import undisturbed
from onehour.study import wording
from onehour.study.advice import advice_of_study
from onehour.study.curves import curve_pictures
from onehour.study.figures import arm_pictures, minibatch_picture, per_worker_pictures, seconds_picture
from onehour.study.findings import Findings, Row, curve_of, findings_of
from onehour.study.picture import FORMATS, Picture
from onehour.study.reproduce import BASE, commands, environment_of, left_over, more_seeds, unfinished
from onehour.study.results import Result, read_paths
from onehour.study.spec import GROUPS, SPEC
from onehour.study.verdict import points
from onehour.training.record import TOP1_ERROR

TEMPLATES = Path(__file__).parent / "templates"
PAGE, JSON, CSV, FIGURES = "report.html", "results.json", "results.csv", "figures"
FORMAT = "onehour report 2"
MARKS = {
    PAGE: '<meta name="generator" content="onehour report ',
    JSON: '"format": "onehour report ',
    CSV: "arm,minibatch,per_worker,",
}
"""By which files of ours are known, of earlier formats too, so that nobody else's are overwritten."""

COLUMNS = (
    *("arm", "minibatch", "per_worker", "workers", "target_lr", "seed", "outcome", "error"),
    *("seconds", "together", "source"),
)
OWN_COLUMNS = ("metric", "higher_is_better")  # behind them, where the metric is not the top-1 error

FORMULA = re.compile(r'((?:^|[,;|])[ "]*)([=+\-@＝＋－＠])')  # what a spreadsheet computes, where a cell begins


@dataclass(frozen=True)
class WrittenReport:
    """What a report shows, the page to open, and everything as data."""

    findings: Findings
    page: Path
    results: Path


def write_report(
    paths: Sequence[Path], out: Path | None = None, margin: float | None = None, looks: int = 1
) -> WrittenReport:
    """Read, judge, draw and write; nothing is written before all of it is known to be right.

    Args:
        out: the folder to write into; None is the sweep's own, else `report` beside the first path.
        margin, looks: of the verdicts (`onehour.study.findings.findings_of`).
    """
    findings = findings_of(read_paths(paths), margin, looks)
    folder = out or (paths[0] if (paths[0] / SPEC).is_file() else paths[0].parent / "report")
    _refuse_others(folder)
    page, pictures = render(findings)
    recipe = findings.study.recipe
    files: dict[str, str | bytes] = {
        **{f"{FIGURES}/{name}": content for picture in pictures for name, content in picture.files().items()},
        PAGE: page,
        JSON: results_json(findings, [picture.name for picture in pictures], metadata.version("onehour")),
        CSV: results_csv(findings),
    }
    if BASE in page and recipe is not None:
        files[BASE] = recipe.to_toml()
    try:
        with undisturbed():
            replace_all(folder, files, gone=[name for name in _old_figures(folder) if name not in files])
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; what was there is as it was") from error
    return WrittenReport(findings, folder / PAGE, folder / JSON)


def _refuse_others(folder: Path) -> None:
    for name, mark in MARKS.items():
        text = _text(folder, name)
        if text is not None and mark not in text[:2000]:
            raise ValueError(
                f"{folder / name} was not written by a report and would be overwritten; choose another --out"
            )
    with suppress(FileNotFoundError), opened(folder, FIGURES):
        pass  # it is no link


def _old_figures(folder: Path) -> list[str]:
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


def render(findings: Findings) -> tuple[str, list[Picture]]:
    """The page as text, and its pictures."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a report needs {' and '.join(missing)}: pip install 'onehour[report]'")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    per_worker = per_worker_pictures(findings)
    sections = {
        "sizes": minibatch_picture(findings),
        "arms": arm_pictures(findings, elsewhere=["n"] if per_worker else []),
        "per_worker": per_worker,
        "curves": curve_pictures(findings),
        "seconds": seconds_picture(findings),
    }
    pictures = [picture for section in sections.values() for picture in section]
    classes: dict[str, str] = {}
    svgs = {p.name: [Markup(p.inline(kind, classes)) for kind in ("wide", "narrow")] for p in pictures}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": wording.number, "seconds": wording.seconds_text}
    environment.filters |= {"tied": _tied, "verdict": wording.verdict_words, "broke": wording.broke_words}
    environment.filters["multiple"] = partial(wording.multiple, findings)
    environment.filters["points"] = partial(points, digits=findings.digits)
    environment.filters["error"] = lambda row: wording.error_text(row.entry.mean, row.entry.std, findings.digits)
    rules = [f".{name} {{ {style} }}\n" for style, name in classes.items()]
    page = environment.get_template("report.html.j2").render(
        style=Markup("".join([(TEMPLATES / "report.css").read_text(encoding="utf-8"), *rules])),
        mark=Markup(f'<meta name="generator" content="{FORMAT}">'),
        pictures=sections,
        svgs=svgs,
        written_by=metadata.version("onehour"),
        **_context(findings),
    )
    return wording.printable(page), pictures


def _context(findings: Findings) -> dict[str, Any]:
    """What the template says of a study, beside its rows; every text is plain and is escaped there."""
    study, recipe = findings.study, findings.study.recipe
    metric = findings.metric
    title = f"{metric.short} against minibatch" if findings.reference else f"{metric.short} over epochs"
    start = findings.reference.mean_seconds if findings.reference else math.nan
    return {
        "title": f"{recipe.name}: {title}" if recipe else title.capitalize(),
        "about": _about(findings),
        "headline": [(sentence, more_seeds(findings, sentence.seeds)) for sentence in wording.headline(findings)],
        "findings": findings,
        "metric": metric,
        "own": metric != TOP1_ERROR,
        "amount": wording.margin_text(findings),
        "error": metric.short_label,
        "worse": "points" if metric == TOP1_ERROR else ", ".join(filter(None, ("worse by", metric.points))),
        "broken": wording.broken_words(findings),
        "advice": advice_of_study(study),
        "last": _last(findings),
        "groups": [_group(findings, size, kind, rows) for (size, kind), rows in findings.groups.items()],
        "times": [(row, start / row.mean_seconds) for row in findings.timed],
        "spread": lambda row: 100 * statistics.stdev(row.seconds) / row.mean_seconds,
        "environment": environment_of(study),
        "seeds": _seeds(findings),
        "commands": commands(study),
        "recipe": recipe.to_toml() if recipe else "",
        "unfinished": unfinished(study),
        "left_over": left_over(study),
    }


def _tied(text: str) -> str:
    """With spaces that no line breaks at, before a unit and around ±."""
    return re.sub(r" (?=%)|(?<=\d) (?=(?:s|min|h)\b)|(?<=±) | (?=±)", "\u00a0", text)


def _about(findings: Findings) -> str:
    study, recipe = findings.study, findings.study.recipe
    asked = len(list(study.spec.cells())) if study.spec else 0
    ended = sum(result.error is not None for result in study.results)
    parts = [f"{recipe.model} on {recipe.data}", f"{recipe.epochs:g} epochs"] if recipe else []
    parts += [f"{len(findings.sizes)} minibatch{'es' * (len(findings.sizes) != 1)}"] if findings.sizes else []
    parts += [f"{len(findings.arms)} change{'s' * (len(findings.arms) != 1)} to the recipe"] if findings.arms else []
    return " · ".join([*parts, f"{ended} of {max(asked, len(study.results))} runs ended"])


def _last(findings: Findings) -> str:
    """What a run's error is the median of; a curve may have several lines an epoch, or skip some."""
    curves = [result.curve[-5:] for result in findings.study.results]
    gaps = {b.epoch - a.epoch for curve in curves for a, b in itertools.pairwise(curve)}
    return "five epochs" if gaps <= {1} else "five evaluations"


def _group(findings: Findings, size: int, kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    own = next((row for row in findings.sizes if row.entry.minibatch == size and row.entry.n), None)
    notes = []
    if own is None:
        notes.append(f"The recipe itself has no run at {wording.size_label(size)} to compare these with.")
    if any(row.verdict and row.verdict.paired for row in rows):
        notes.append("Points and their interval are of the same seeds with and without the change.")
    if any(row.paper is not None for row in rows):
        notes.append("The paper’s differences are those at 8k on ImageNet (T1, T2).")
    title = f"{GROUPS[kind]}, at minibatch {wording.size_label(size)}"
    return {"title": title, "own": own, "rows": rows, "notes": notes}


def _seeds(findings: Findings) -> str:
    found = sorted({result.seed for result in findings.study.results if result.seed is not None})
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return wording.joined([str(seed) for seed in found])


def results_json(findings: Findings, pictures: Sequence[str] = (), written_by: str = "") -> str:
    """Everything that the page says, and each run's curve, as JSON; what is not known is null."""
    study, advice = findings.study, advice_of_study(findings.study)
    groups = [("", findings.sizes), *((group, rows) for (_, group), rows in findings.groups.items())]
    content = {
        "format": FORMAT,
        "written_by": written_by,
        "margin": findings.margin,
        "looks": findings.looks,
        **({} if findings.metric == TOP1_ERROR else {"metric": asdict(findings.metric)}),
        "verdict": [{"text": sentence.text, "state": sentence.state} for sentence in wording.headline(findings)],
        "recipe": study.recipe.as_dict() if study.recipe else None,
        "reference": findings.reference.entry.minibatch if findings.reference else None,
        "entries": [_entry(row, group) for group, rows in groups for row in rows],
        "curves": [{"label": entry.label, "runs": [_run(run) for run in entry.results]} for entry in findings.loose],
        "figures": list(pictures),
        **({} if advice is None else {"advice": advice.as_dict()}),
    }
    return wording.printable(to_json(content, indent=1)) + "\n"


def results_csv(findings: Findings) -> str:
    """A line a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric = findings.metric
    columns = COLUMNS if metric == TOP1_ERROR else (*COLUMNS, *OWN_COLUMNS)
    own = {"metric": metric.written, "higher_is_better": str(metric.higher_is_better).lower()}
    writer.writerow(columns)
    for row in [*findings.sizes, *findings.arms, *(Row(entry, "") for entry in findings.loose)]:
        for result in row.entry.results:
            values = {"arm": row.entry.label, **_derived(row), **_run(result), **own}
            writer.writerow([_cell(values[name]) for name in columns])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Others' text as a spreadsheet shows it: on one line, and no formula wherever its program divides the line."""
    return FORMULA.sub(r"\1'\2", wording.short(value, most=len(value))) if isinstance(value, str) else value


def _derived(row: Row) -> dict[str, Any]:
    recipe = row.recipe
    derived = (recipe.per_worker, recipe.workers.workers, recipe.target_lr) if recipe else (None, None, None)
    return {"minibatch": row.entry.minibatch} | dict(zip(("per_worker", "workers", "target_lr"), derived, strict=True))


def _entry(row: Row, group: str) -> dict[str, Any]:
    verdict = row.verdict
    return {
        "arm": row.entry.label,
        "name": row.name,
        "group": group,
        **_derived(row),
        "n": row.entry.n,
        "mean": row.entry.mean,
        "std": row.entry.std,
        "non_finite": row.non_finite,
        "broke": row.broke,
        "difference": row.cost,
        "verdict": row.state,
        "text": verdict.text if verdict else "",
        **{name: getattr(verdict, name, None) for name in ("lower", "upper", "paired", "more_seeds")},
        "paper_difference": row.paper,
        "early_gap": row.early,
        "mean_seconds": row.mean_seconds,
        "curve": curve_of(row.entry),
        "runs": [_run(result) for result in row.entry.results],
    }


def _run(result: Result) -> dict[str, Any]:
    place = PurePath(result.source)
    return {
        **{name: getattr(result, name) for name in ("seed", "outcome", "error", "seconds", "together")},
        # The end of the path alone: a report may be shown to others.
        "source": f"cells/{place.name}" if place.parent.name == "cells" else place.name,
        "curve": [[point.epoch, point.error, point.train_error] for point in result.curve],
    }
