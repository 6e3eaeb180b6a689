"""What the blocks of tables.py have in common: a Markdown table, an entry's numbers, where results come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CAMPAIGNS = {
    "cluster": "campaigns/cluster/cases.py",
    "faults": "campaigns/ledger.py",
    "fuzz": "campaigns/fuzz_images.py",
}


def mean(row: dict[str, Any]) -> str:
    """An entry's error with its deviation."""
    broken = f" ({row['non_finite']} of {row['n']} not finite)" if row["non_finite"] else ""
    return f"{row['mean']:.2f} ± {row['std']:.2f}{broken}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims(head: tuple[str, ...], rows: list[dict[str, Any]], measured: Callable[[dict[str, Any]], str]) -> str:
    """What is promised, its bound, what was measured, and whether it holds."""
    lines = [
        (row["claim"], f"{row['relation']} {row['bound']:g}", measured(row), "yes" if row["holds"] else "NO")
        for row in rows
    ]
    return table(head, lines)


def script(stem: str) -> str:
    """What makes results/STEM.json: a script of that name, else of its first word, or a campaign."""
    if stem in CAMPAIGNS:
        return CAMPAIGNS[stem]
    whole = f"benchmarks/{stem}.py"
    return whole if (ROOT / whole).exists() else f"benchmarks/{stem.partition('_')[0]}.py"


def missing(stem: str) -> str:
    """What stands where results are not there yet."""
    path = script(stem)
    run = f"-m {path.removesuffix('.py').replace('/', '.')}" if path.startswith("campaigns/") else path
    return f"_Not measured yet: `python {run}`._"


def source(stem: str, results: dict[str, Any]) -> str:
    """Where results come from: file, script, day, commit, versions, machine."""
    p = results["provenance"]
    device = p["gpu"] or f"{p['processor']}, {p['cores']} cores"
    return (
        f"`benchmarks/results/{stem}.json`, by `{script(stem)}`: {p['date']}, commit {p['commit'][:7]},"
        f" torch {p['torch']}, {device}."
    )
