"""Write the figures in README.md and in docs from benchmarks/results/*.json, so that none is typed by hand.

    python docs/tables.py

What stands between <!-- results:NAME --> and <!-- /results --> is replaced by what `BLOCKS[NAME]` makes of its results.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.models.load import load_model
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.initialize import init_weights_
from onehour.study.outcome import reference_of
from onehour.training.console import effects

sys.path.insert(0, str(Path(__file__).parent))
from figure_blocks import (
    COSTS,
    adam,
    beside,
    choice,
    cluster_model,
    cost,
    draw_figures,
    figure,
    figure_claims,
    figure_n,
    figure_wide,
    foreseen,
    foreseen_sweeps,
    gaps,
    halves,
    noise,
    papers,
    past_the_break,
    power,
    sweep,
    wrong,
)
from parts import RESULTS, ROOT, claims, missing, source, table

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
    head = ("minibatch", "error %, mean ± std", "lowest … highest", "seeds", "the first trial")
    return f"{table(head, rows)}\n\n{source('digits', results)}"


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
            effects(r, convert_batchnorm(init_weights_(load_model(r.model, channels=1, classes=10)), r.per_worker)),
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
    by_pass: dict[int, list[str]] = {}
    for step in results["steps"]:
        by_pass.setdefault(step.get("canonical_pass", 1), []).append(f"{step['ratio']:.2f}× on {step['processes']}")
    said = "; ".join(f"with canonical_pass = {together}: {', '.join(steps)}" for together, steps in by_pass.items())
    times = f"A whole step of digits takes this many times as long as in the fast mode, on so many processes; {said}."
    return f"{table(head, rows)}\n\n{times}\n\n{source('reduce', results)}"


def peers(results: dict[str, Any]) -> str:
    """Speed beside the loops that people would write or take."""
    names = {"ours": "onehour", "earlier": "onehour 0.1", "dataloader": "DataLoader", "timm_shaped": "timm's shape"}
    names |= {"accelerate": "Accelerate", "lightning": "Lightning", "transformers": "HF Trainer"}
    shown = [name for name in names if any(name in row["sides"] for row in results["rows"])]
    head = ("case", "processes", "rounds", "bare loop, images a CPU second", *(names[side] for side in shown))
    parts = []
    for what, title in (("cpu", "Speed by CPU time"), ("wall", "Speed by the clock"), ("memory", "Peak memory")):
        rows = [
            (
                *(row["case"], str(row["processes"]), str(row["rounds"])),
                str(row["sides"]["bare"]["images_per_cpu_second"]),
                *(_ratio(row["sides"].get(side), what) for side in shown),
            )
            for row in results["rows"]
        ]
        parts.append(f"{title}:\n\n{table(head, rows)}")
    if results["not_installed"]:
        missing = ", ".join(names[name] for name in results["not_installed"])
        parts.append(f"Not installed where this was measured: {missing}.")
    parts.append(claims(("promise", "bound", "measured", "holds"), results["claims"], lambda r: f"{r['measured']:.2f}"))
    return "\n\n".join([*parts, source("peers", results)])


def _ratio(side: dict[str, Any] | None, what: str) -> str:
    if side is None:
        return ""
    low, high = side[what]["interval"] or (None, None)
    return f"{side[what]['median']:.2f}" + (f" ({low:.2f} … {high:.2f})" if low is not None else "")


def check_matrix(results: dict[str, Any]) -> str:
    """How many of the loops that the check is tested on it judges rightly."""
    styles = {
        None: "torch alone",
        "accelerate": "Accelerate",
        "hf": "HF Trainer",
        "lightning": "Lightning",
        "timm": "timm",
    }
    groups = [
        (name, [r for r in results["rows"] if r["framework"] == key and r["kind"] != "right"])
        for key, name in styles.items()
    ]
    groups += [("right loops of many styles", [r for r in results["rows"] if r["kind"] == "right"])]
    rows = []
    for name, loops in groups:
        broken = [row for row in loops if row["kind"] == "broken"]
        clean = [row for row in loops if row["kind"] != "broken"]
        rows.append(
            (
                name,
                str(len(broken) or ""),
                str(sum(row["found"] == row["expected"] for row in broken) if broken else ""),
                str(sum(row["where_ok"] is True for row in broken) if broken else ""),
                str(len(clean)),
                str(sum(bool(row["found"]) for row in clean)),
                f"{sum(row['seconds'] for row in loops) / max(len(loops), 1):.1f}",
            )
        )
    head = ("loops", "broken", "exactly their id", "line of the user", "right", "false alarms", "seconds each")
    bad = [
        f"`{row['loop']}` ({', '.join(row['found'] + row['problems']) or 'nothing found'})"
        for row in results["rows"]
        if not row["ok"]
    ]
    releases = ", ".join(f"{package} {release}" for package, release in results["frameworks"].items() if release)
    said = f"Not as they should be: {'; '.join(bad)}." if bad else "Every loop is judged as it should be."
    missing = f" {len(results['not_run'])} loops were not run." if results["not_run"] else ""
    return f"{table(head, rows)}\n\n{said}{missing} With {releases}.\n\n{source('check_matrix', results)}"


def public_scripts(results: dict[str, Any]) -> str:
    """What was found in each public script as it is, and which of the faults planted in it."""
    rows = []
    for row in results["rows"]:
        page = f"https://github.com/{row['repository']}/blob/{row['commit']}/{row['path']}"
        found = [
            f"[{one['id']}](checks/{one['id']}.md): {row['right'].get(one['id'], 'a false alarm')}"
            for one in row["findings"]
        ]
        seen = [fault["id"] for fault in row["faults"] if fault["found"]]
        missed = [fault["id"] for fault in row["faults"] if not fault["found"]]
        planted = (
            f"{len(seen)} of {len(row['faults'])}: {', '.join(seen)}" + "; not " * bool(missed) + ", ".join(missed)
        )
        said = "; ".join(found) or row["error"] or "nothing"
        rows.append((f"[{row['repository']}, {row['path']}]({page})", said, planted))
    counts, packages = results["summary"], ", ".join(f"{name} {of}" for name, of in results["packages"].items())
    missing = f" {len(results['not_run'])} scripts were not run." if results["not_run"] else ""
    return (
        f"{table(('script', 'found as it is', 'planted and found'), rows)}\n\n{counts['found']} of {counts['planted']}"
        f" planted faults are found; of {counts['findings']} findings in the scripts as they are,"
        f" {counts['false_alarms']} are false alarms.{missing} With {packages}.\n\n{source('public_scripts', results)}"
    )


def input_rates(results: dict[str, Any]) -> str:
    """Images a second of each way to read them."""
    names = {"ours": "onehour, files", "ours_packed": "onehour, a pack", "torchvision": "torchvision on PIL"}
    names |= {"pillow": "lean Pillow"}
    columns = ("cpu", "loader_cpu", "loader_wall")
    rows = [(names[name], *(f"{rates[what]:.0f}" for what in columns)) for name, rates in results["rates"].items()]
    loaders = f"{results['loaders']} loader process{'es' * (results['loaders'] > 1)}"
    head = ("images/s", "a CPU second of one thread", f"a CPU second of all, {loaders}", "a second by the clock")
    missing = "" if "torchvision" in results["rates"] else "\n\ntorchvision was not there to be measured."
    return f"{table(head, rows)}{missing}\n\n{source('input', results)}"


def input_claims(results: dict[str, Any]) -> str:
    """What is promised of the input, and whether it holds."""
    return claims(("promise", "bound", "measured", "holds"), results["claims"], lambda row: f"{row['measured']:.3g}")


def fuzz(results: dict[str, Any]) -> str:
    """What became of the damaged files."""
    found, p = results["outcomes"], results["provenance"]
    return (
        f"{results['images']:,} damaged files: {found['decoded']:,} decoded, {found['refused']:,} refused with one"
        f" message, {len(results['findings'])} tracebacks, hangs or crashes; the slowest took"
        f" {results['slowest'][0]:.1f} s of CPU time, the most memory was {results['peak_mib']} MiB.\n\n"
        f"`benchmarks/results/fuzz.json`, by `campaigns/fuzz_images.py`: {p['date']}, commit {p['commit'][:7]}."
    )


def check(results: dict[str, Any]) -> str:
    """What a watch adds to a step."""
    rows = [
        (
            row["case"],
            str(row["processes"]),
            f"{row['bare_ms']:.1f}",
            *(f"{100 * (row[f'{part}_cpu_ratio'] - 1):+.1f} %" for part in ("watched", "after")),
        )
        for row in results["rows"]
    ]
    head = ("case", "processes", "ms a step", "CPU time, watched", "CPU time, afterwards")
    return f"{table(head, rows)}\n\n{source('check', results)}"


def check_start(results: dict[str, Any]) -> str:
    """What a check of a small script costs."""
    (row,) = results["rows"]
    said = (
        f"A script of ten updates takes {row['script_cpu_s']:.1f} s of CPU alone and {row['check_cpu_s']:.1f} s"
        f" checked: a check costs {row['above_import_torch_s']:.1f} s above one `import torch`"
        f" ({row['lowest_s']:.1f} to {row['highest_s']:.1f} s in {row['rounds']} rounds)."
    )
    return f"{said}\n\n{source('check_start', results)}"


def checkpoint(results: dict[str, Any]) -> str:
    """What a save costs, each way, and what verifying it does."""
    rows = [
        (
            row["way"],
            f"{row['held_ms']:.1f}",
            f"{row['beside_cpu_ms']:.1f}",
            f"{row['slower_ms']:.0f}",
            f"{row['cost_percent_at_one_a_minute']:.2f} %",
        )
        for row in results["rows"]
    ]
    v = results["verifying"]
    head = ("way", "ms held", "ms of CPU beside it", "ms later by the clock", "cost at one a minute")
    verified = (
        f"Writing {v['bytes'] / 1e6:.0f} MB takes {v['write_ms']:.0f} ms, verifying them {v['verify_ms']:.0f} ms."
        f" An update that follows at once waits {v['held_ms_if_an_update_follows_at_once']:.0f} ms, for the copy."
    )
    return f"{table(head, rows)}\n\n{verified}\n\n{source('checkpoint', results)}"


def faults(results: dict[str, Any]) -> str:
    """What was killed, stopped, corrupted or filled up, how often it did harm, and on which commits."""
    rows = [
        (
            name,
            f"{row['runs']:,}",
            str(row["failures"]),
            _happened(row),
            ", ".join(commit[:7] + "+" * commit.endswith("+") for commit in row["commits"]),
        )
        for name, row in results["campaigns"].items()
    ]
    made = f"`benchmarks/results/faults.json`, by `make faults`: {results['provenance']['date']}."
    return f"{table(('campaign', 'runs', 'failures', 'what happened in them', 'commits'), rows)}\n\n{made}"


def _happened(campaign: dict[str, Any]) -> str:
    kinds = [f"{count} {kind}" for kind, count in campaign.get("kinds", {}).items()]
    times = [f"{campaign[key]:.1f} s {name}" for key, name in TIMES.items() if key in campaign]
    return ", ".join([*(kinds if len(kinds) <= MANY else []), *times])


TIMES = {"median_s": "median", "p95_s": "95th percentile", "slowest": "the slowest"}


def cluster(results: dict[str, Any]) -> str:
    """Runs on a real Slurm, and whether each ended with the undisturbed weights."""
    rows = [
        (each["case"], "yes" + (", at the second try" if "first_try" in each else "") if each["ok"] else "NO")
        for each in results["cases"]
    ]
    return f"{table(('on Slurm', 'the undisturbed weights'), rows)}\n\n{source('cluster', results)}"


FAR = 1e-9
"""From k separate passes, for rounding in float64 alone."""


def networks(results: dict[str, Any]) -> str:
    """How many of timm's families train, and how far ghost BatchNorm is from k separate passes in them."""
    rows = results["rows"]
    ghost, keep = ([row for row in rows if row.get("batchnorm") == kind] for kind in ("ghost", "keep"))
    apart = {row["model"]: max(row["outputs_apart"], row["gradients_apart"]) for row in ghost}
    shown = ("outputs_apart", "outputs_rounded", "gradients_apart", "gradients_rounded")
    others = [
        f"{row['model']} ({', '.join(f'{row[key]:.0e}' for key in shown)})"
        for row in ghost
        if apart[row["model"]] > FAR
    ]
    said = (
        f"Of {len(rows)} networks, at least one of each family with BatchNorm in timm {results['timm']}, {len(ghost)}"
        f" are converted and trained for an iteration. Outputs and gradients in float64 are within"
        f" {max(far for far in apart.values() if far <= FAR):.0e} of"
        f" {results['k']} separate passes of {results['n']} images; the outputs of one BatchNorm over all are"
        f" {min(row['pooled_apart'] for row in ghost):.0e} away or more."
    )
    if others:
        said += (
            " Further off, in outputs and in gradients, each beside how far separate passes are from themselves when"
            f" images are a last bit larger: {', '.join(others)}. Some of their BatchNorms see two values a channel,"
            " which become ±1."
        )
    if keep:
        said += f" With `--batchnorm keep` alone: {', '.join(row['model'] for row in keep)}."
    failed = [row["model"] for row in rows if "failed" in row]
    if failed:
        said += f" Not: {', '.join(failed)}."
    return f"{said}\n\n{source('networks', results)}"


MANY = 8
"""Kinds that a table still shows one by one."""


def recipe_fields(_: dict[str, Any]) -> str:
    """Every field of a recipe, with its value where nothing is said."""
    rows = []
    for field in dataclasses.fields(Recipe):
        usual = field.default
        shown = "" if usual is None or usual == "" else ", ".join(usual) if isinstance(usual, tuple) else f"{usual}"
        rows.append((f"`{field.name}`", shown.lower() if isinstance(usual, bool) else shown, field.metadata["help"]))
    return table(("field", "unless given", "what it is"), rows)


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "digits": ("digits", digits),
    "outcome": ("digits", outcome),
    "figure": ("digits_figure", partial(figure, group="minibatch")),
    "figure_rate": ("digits_figure", partial(figure, group="rate")),
    "figure_pitfalls": ("digits_figure", partial(figure, group="pitfall")),
    "figure_n": ("digits_figure", figure_n),
    "figure_claims": ("digits_figure", figure_claims),
    "figure_wide": ("digits_wide", figure_wide),
    "noise": ("noise", noise),
    "foreseen": ("foresee", foreseen),
    "foreseen_sweeps": ("foresee_sweeps", foreseen_sweeps),
    "fashion": ("fashion_figure", partial(figure, group="minibatch", stem="fashion_figure")),
    "fashion_rate": ("fashion_figure", partial(figure, group="rate", stem="fashion_figure")),
    "fashion_n": ("fashion_figure", partial(figure_n, stem="fashion_figure")),
    "fashion_halves": ("fashion_figure", halves),
    "fashion_claims": ("fashion_figure", figure_claims),
    "fashion_choice": ("fashion_choice", choice),
    "cluster_model": ("cluster_model", cluster_model),
    "past_the_break": ("past_the_break", past_the_break),
    "adam": ("adam_rule", adam),
    "power": ("verdicts", power),
    "wrong": ("verdicts", wrong),
    "papers": ("", papers),
    "beside": ("digits_figure", beside),
    "gaps": ("digits_figure", gaps),
    "sweep": ("sweep", sweep),
    "input": ("input", input_rates),
    "input_claims": ("input", input_claims),
    "fuzz": ("fuzz", fuzz),
    "checkpoint": ("checkpoint", checkpoint),
    "faults": ("faults", faults),
    "cluster": ("cluster", cluster),
    "networks": ("networks", networks),
    "recipe_fields": ("", recipe_fields),
    "reduce": ("reduce", reduce),
    "check": ("check", check),
    "check_start": ("check_start", check_start),
    "check_matrix": ("check_matrix", check_matrix),
    "public_scripts": ("public_scripts", public_scripts),
    **{f"cost_{name}": ("digits_figure", partial(cost, name=arm)) for name, arm in COSTS.items()},
    "peers": ("peers", peers),
}
"""For each name: the results' file, and what is made of it; without a file it is made of the code."""


def pages() -> list[Path]:
    """The files that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "checks").glob("*.md"))]


def render(text: str) -> str:
    """A page's text with every block written anew; one whose results are missing says so."""
    return BLOCK.sub(lambda match: f"{match[1]}{_block(match[2])}\n{match[3]}", text)


def _block(name: str) -> str:
    stem, make = BLOCKS[name]
    if not stem:
        return make({})
    path = RESULTS / f"{stem}.json"
    if not path.exists():
        return missing(stem)
    return make(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Rewrite the pages that are not up to date, and draw the README's picture."""
    draw_figures(ROOT / "docs" / "images")
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
