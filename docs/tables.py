"""Write the figures in README.md and docs/*.md from benchmarks/results/*.json, so that none is typed by hand.

    python docs/tables.py

What stands between <!-- results:NAME --> and <!-- /results --> is replaced by what `BLOCKS[NAME]` makes of its results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.models.load import load_model
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.initialize import initialize
from onehour.study.outcome import reference_of
from onehour.train.build import effects

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
SHOWN = 256
"""The minibatch of `make train`."""


def digits(results: dict[str, Any]) -> str:
    """Error against minibatch."""
    base = results["table"][0]["minibatch"]
    rows = []
    for row in results["table"]:
        errors = [run["final_error"] for run in results["runs"] if run["minibatch"] == row["minibatch"]]
        rows.append(
            (
                f"{row['minibatch']} ({row['minibatch'] // base}×)",
                f"{row['mean']:.2f} ± {row['std']:.2f}",
                f"{min(errors):.2f} … {max(errors):.2f}",
                str(row["n"]),
                f"{row['prototype_mean']:.2f} ± {row['prototype_std']:.2f}",
            )
        )
    head = ("minibatch", "error %, mean ± std", "lowest … highest", "seeds", "prototype")
    return f"{_table(head, rows)}\n\n{_source('digits', results)}"


def outcome(results: dict[str, Any]) -> str:
    """What `onehour train` prints for the first of the committed seeds."""
    run = next(run for run in results["runs"] if run["minibatch"] == SHOWN)
    r = Recipe.from_dict(results["recipe"]).replace(minibatch=SHOWN, seed=run["seed"])
    reference = reference_of(r.name)
    assert reference is not None
    assert r.samples is not None
    folder = f"runs/{r.name}-{SHOWN}-s{r.seed}"
    return "\n".join(
        [
            "```text",
            f"{r.name}: minibatch {SHOWN} = {r.workers.workers} workers × {r.per_worker} on 2 processes,"
            f" rate {r.base_lr:g} → {r.target_lr:g}, {r.epochs} epochs,"
            f" {r.workers.iterations(r.samples, r.epochs)} iterations, seed {r.seed}",
            f"writes {folder}",
            effects(r, convert_batchnorm(initialize(load_model(r.model, channels=1, classes=10)), r.per_worker)),
            "…",
            f"final error  {run['final_error']:.2f} % (median of the last 5 epochs)",
            f"reference    {reference.mean:.2f} ± {reference.std:.2f} % at minibatch {reference.minibatch}"
            f" ({reference.seeds} seeds), 95 % of runs between {reference.low:.2f} and {reference.high:.2f} %",
            f"verdict      {reference.verdict(run['final_error'])}",
            "speed        … images/s; most time goes to …",
            f"run          {folder}",
            f"curve        {folder}/curve.png",
            "```",
        ]
    )


def reduce(results: dict[str, Any]) -> str:
    """What the canonical sum costs."""
    rows = [
        (
            str(row["processes"]),
            str(row["megabytes"]),
            f"{row['all_reduce_ms']:.1f}",
            f"{row['canonical_ms']:.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in results["rows"]
    ]
    head = ("processes", "MB", "all-reduce, ms", "canonical, ms", "canonical / all-reduce")
    steps = "; ".join(f"{step['ratio']:.2f}× on {step['processes']} processes" for step in results["steps"])
    return f"{_table(head, rows)}\n\nA whole step of digits, overlap included: {steps}.\n\n{_source('reduce', results)}"


def trainer(results: dict[str, Any], name: str = "trainer") -> str:
    """Speed against a bare loop."""
    rows = [
        (
            row["case"],
            str(row["processes"]),
            str(row["threads"]),
            *(f"{row[f'{what}_ratio']:.2f}" for what in ("cpu", "wall", "memory")),
        )
        for row in results["rows"]
    ]
    head = ("case", "processes", "threads each", "speed by CPU time", "speed by wall time", "peak memory")
    return f"{_table(head, rows)}\n\n{_source(name, results)}"


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits": ("digits", digits),
    "outcome": ("digits", outcome),
    "reduce": ("reduce", reduce),
    "trainer": ("trainer", trainer),
    "trainer_resnet50": ("trainer_resnet50", partial(trainer, name="trainer_resnet50")),
}
"""For each name: the results' file, and what is made of it."""


def pages() -> list[Path]:
    """The files that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """A page's text with every block written anew; one whose results are missing says so."""
    return BLOCK.sub(lambda match: f"{match[1]}{_block(match[2])}\n{match[3]}", text)


def _block(name: str) -> str:
    stem, make = BLOCKS[name]
    path = RESULTS / f"{stem}.json"
    if not path.exists():
        return f"_Not measured yet: `python benchmarks/{stem.partition('_')[0]}.py`._"
    return make(json.loads(path.read_text(encoding="utf-8")))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _source(stem: str, results: dict[str, Any]) -> str:
    p = results["provenance"]
    device = p["gpu"] or f"{p['processor']}, {p['cores']} cores"
    script = stem.partition("_")[0]
    return (
        f"`benchmarks/results/{stem}.json`, by `benchmarks/{script}.py`: {p['date']}, commit {p['commit'][:7]},"
        f" torch {p['torch']}, {device}."
    )


def main() -> None:
    """Rewrite the pages that are not up to date."""
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
