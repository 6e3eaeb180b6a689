"""The ledger of the fault campaigns: a line for each case in runs/faults/NAME.jsonl, all of them in one result.

    python -m campaigns.ledger

A line has "campaign", "case" and "ok"; a case that stands for several has "runs" and "failures" too. Of a case that ran
again the last line counts. Writes benchmarks/results/faults.json: per campaign its runs, failures, seeds and commits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["OUT", "add", "lines", "percentile", "run", "summarise"]

ROOT = Path(__file__).parents[1]
OUT = Path("runs") / "faults"
NAMED = 20
"""Cases that failed and are named in the result, at most."""


def run(stem: str, cases: Iterable[tuple[str, int | str, Callable[[], dict[str, Any]]]]) -> int:
    """What a campaign does when it is started: run the cases that its ledger does not have, or that failed there.

    Args:
        stem: the ledger's name.
        cases: of each the campaign, its number or name, and what to do, which returns "ok" and what happened.

    Returns:
        1 if any case failed, else 0.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="campaigns or cases whose name has this in it")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="so many at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case later than this")
    options = parser.parse_args()
    path, until, left = (OUT / f"{stem}.jsonl").absolute(), time.monotonic() + 60 * options.minutes, options.cases
    done = {(entry["campaign"], entry["case"]) for entry in lines(path) if entry["ok"]}
    for campaign, case, act in cases:
        if not left or time.monotonic() > until:
            break
        if (campaign, case) not in done and options.only in f"{campaign} {case}":
            add(path, campaign, case, **act())
            left -= 1
    found = totals(lines(path))
    for name, about in found.items():
        kinds = "".join(f", {count} {kind}" for kind, count in about.get("kinds", {}).items())
        print(f"{name}: {about['runs']} runs, {about['failures']} failures{kinds}")
        for failed in about["failed"]:
            print(f"  failed: {failed}")
    return int(any(about["failures"] for about in found.values()))


def lines(path: Path) -> list[dict[str, Any]]:
    """The cases of a ledger, the last of each."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    found = {}
    for line in text[: text.rfind("\n") + 1].splitlines():  # the last one may be half written
        entry = json.loads(line)
        found[entry["campaign"], str(entry["case"])] = entry
    return list(found.values())


def add(path: Path, campaign: str, case: int | str, *, ok: bool, **about: Any) -> None:
    """Append a case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"campaign": campaign, "case": case, "ok": ok, "commit": commit(), **about}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Per campaign: runs, failures, the kinds of what happened, seeds, commits."""
    found: dict[str, Any] = {}
    for entry in entries:
        about = found.setdefault(
            entry["campaign"], {"runs": 0, "failures": 0, "failed": [], "cases": [], "commits": []}
        )
        about["runs"] += entry.get("runs", 1)
        about["failures"] += entry.get("failures", int(not entry["ok"]))
        about["cases"].append(entry["case"])
        if not entry["ok"] and len(about["failed"]) < NAMED:
            said = str(entry.get("said", "")).replace(f"{Path.cwd()}/", "")  # the result says nothing of the machine
            about["failed"].append(f"{entry['case']}: {said}"[:300])
        if entry.get("commit") not in (None, *about["commits"]):
            about["commits"].append(entry["commit"])
        for kind in [entry["kind"]] if "kind" in entry else entry.get("kinds", {}):
            kinds = about.setdefault("kinds", {})
            kinds[kind] = kinds.get(kind, 0) + entry.get("kinds", {}).get(kind, 1)
        about.setdefault("seconds", []).extend(entry["seconds"] if isinstance(entry.get("seconds"), list) else ())
        if "slowest" in entry:
            about["slowest"] = max(about.get("slowest", 0.0), entry["slowest"])
    for about in found.values():
        about["seeds"] = seeds(about.pop("cases"))
        if measured := about.pop("seconds"):
            about |= {"median_s": percentile(measured, 0.5), "p95_s": percentile(measured, 0.95)}
    return found


def percentile(values: list[float], part: float) -> float:
    """The smallest value that so large a part of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def seeds(cases: list[int | str]) -> str:
    """Of what the cases were drawn: their own numbers as "0-2, 4", or how many names there are."""
    numbers = sorted(case for case in cases if isinstance(case, int))
    if len(numbers) < len(cases):
        return f"{len(cases)} named cases"
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


def summarise(out: Path = OUT, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """All ledgers in a folder.

    Args:
        before: campaigns of the result that is there; those without a ledger here stay, and name their own commits.
    """
    found = totals([entry for path in sorted(out.glob("*.jsonl")) for entry in lines(path)])
    campaigns = dict(sorted({**(before or {}), **found}.items()))
    runs, failures = (sum(about[name] for about in campaigns.values()) for name in ("runs", "failures"))
    return {"runs": runs, "failures": failures, "campaigns": campaigns}


@cache
def commit() -> str:
    """Of what is run, with a + where files differ from it."""
    known = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(known, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Write the result; 1 if any case of any campaign failed."""
    from benchmarks import results  # which imports torch, and needs a clone

    result = results.RESULTS / "faults.json"
    content = summarise(before=json.loads(result.read_text())["campaigns"] if result.exists() else None)
    results.write(__file__, "faults", content)
    print(f"{content['runs']} runs, {content['failures']} failures")
    return int(content["failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
