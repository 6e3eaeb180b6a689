"""Blocks of the digits' figure and of what belongs to it: arms, pitfalls and their costs, verdicts, speed.

Verdicts are made anew of each run's error in the results, so that they are those of the code as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parts import RESULTS, claims, mean, missing, source, table

from onehour.config import Recipe
from onehour.study.figures import minibatch_picture
from onehour.study.findings import Findings, Row, findings_of
from onehour.study.paper import paper_verdicts
from onehour.study.results import Result, study_of
from onehour.study.spec import parse_arm
from onehour.study.verdict import points
from onehour.study.wording import broke_words, error_text, multiple, size_label

CHANCE = 90.0
"""The error of digits by guessing, with which a run that is not finite counts."""


def judged(rows: list[dict[str, Any]], recipe: Recipe | None = None) -> Findings:
    """The study that results hold: each run's error by its seed, for every entry."""
    found = []
    for row in rows:
        (arm,) = parse_arm(row["arm"]) if row.get("arm") else [()]
        for seed, error in row["errors"].items():
            lost = bool(row["non_finite"]) and error == CHANCE
            name, outcome = f"{row.get('arm', '')}-{row['minibatch']}-s{seed}", "non-finite" if lost else "finished"
            found.append(Result(name, arm, row["minibatch"], int(seed), outcome, error))
    return findings_of(study_of(found, recipe))


def of_figure(results: dict[str, Any]) -> Findings:
    """The digits' figure."""
    return judged(results["entries"], Recipe.from_dict({"name": "digits"} | results["recipe"]))


def lines(rows: tuple[Row, ...]) -> list[tuple[str, ...]]:
    """Entries with their error, how many runs broke, and the verdict."""
    return [
        (
            row.name,
            error_text(row.entry.mean, row.entry.std),
            "{} ({})".format(*broke_words(row)),
            f"broke: {points(row.cost)} on average"
            if row.broke
            else row.verdict.text
            if row.verdict
            else "the reference",
        )
        for row in rows
    ]


HEAD = ("error %, mean ± std", "broke", "points [90 % interval]")


def figure(results: dict[str, Any], group: str, stem: str = "digits_figure") -> str:
    """A group of a figure: what each entry costs, and the verdict."""
    findings = of_figure(results)
    if group == "minibatch":
        return f"{table(('minibatch', *HEAD), lines(findings.sizes))}\n\n{source(stem, results)}{_kept(results)}"
    rows = next((rows for (_, kind), rows in findings.groups.items() if kind == group), ())
    if not rows:
        return missing(stem)
    return table(("the recipe with", *HEAD), lines(rows))


def draw_figures(folder: Path) -> None:
    """The figure of each task, of its committed results, beside the paper's; the README shows the digits'."""
    for path in sorted(RESULTS.glob("*_figure.json")):
        task = path.stem.partition("_")[0]
        results = json.loads(path.read_text(encoding="utf-8"))
        (picture,) = minibatch_picture(of_figure(results), papers=True)
        for name, content in picture.files().items():
            if not name.endswith("pdf"):
                (folder / f"{task}{Path(name).suffix}").write_bytes(content)


def _kept(results: dict[str, Any]) -> str:
    """The minibatches whose runs another commit, or another machine, has made."""
    kept: dict[str, list[str]] = {}
    own = results["provenance"]["commit"]
    for row in results["entries"]:
        if row["group"] == "minibatch" and row.get("commit", own) != own:
            kept.setdefault(f"commit {row['commit'][:7]}, {row['made_on']}", []).append(str(row["minibatch"]))
    return "".join(f" The runs at {', '.join(sizes)} are of {made}." for made, sizes in kept.items())


def figure_n(results: dict[str, Any], stem: str = "digits_figure") -> str:
    """Error against BatchNorm's n, with the recipe's own n among them."""
    shown = {row["minibatch"] for row in results["entries"] if row["group"] == "n"}
    own = Recipe.from_dict({"name": "digits"} | results["recipe"]).per_worker
    rows = {
        own if row["group"] == "minibatch" else int(row["arm"].partition("=")[2]): row
        for row in results["entries"]
        if row["group"] == "n" or (row["group"] == "minibatch" and row["minibatch"] in shown)
    }
    if not shown:
        return missing(stem)
    shown_rows = [(str(n), mean(row), str(row["n"])) for n, row in sorted(rows.items())]
    return table((f"n, at minibatch {shown.pop()}", "error %, mean ± std", "seeds"), shown_rows)


def halves(results: dict[str, Any]) -> str:
    """Which verdicts on a minibatch would be others if half of the base's seeds were all that it has."""
    base, *others = sorted((row for row in results["entries"] if row["group"] == "minibatch"), key=_minibatch)
    recipe, seeds = Recipe.from_dict({"name": "digits"} | results["recipe"]), sorted(base["errors"], key=int)
    middle = len(seeds) // 2
    first, second = (
        judged([base | {"errors": {seed: base["errors"][seed] for seed in half}}, *others], recipe).sizes
        for half in (seeds[:middle], seeds[middle:])
    )
    differ = [row.name for row, other in zip(first, second, strict=True) if row.state != other.state]
    found = f"another verdict on {', '.join(differ)}" if differ else "the same verdict on every minibatch"
    return f"The first {middle} and the other {len(seeds) - middle} of the base's seeds, each alone, give {found}."


def _minibatch(row: dict[str, Any]) -> int:
    return row["minibatch"]


def figure_claims(results: dict[str, Any]) -> str:
    """What is promised of the figure, and whether it shows it."""
    return claims(("claim", "points", "measured", "holds"), results["claims"], lambda row: f"{row['points']:+.2f}")


def figure_wide(results: dict[str, Any]) -> str:
    """A variant of digits on which the rule was claimed to hold further, and what was seen."""
    said = table(
        ("claimed beforehand", "true"), [(row["claim"], "yes" if row["holds"] else "NO") for row in results["claims"]]
    )
    rows = lines(judged(results["rows"]).sizes)
    return "\n\n".join([table(("minibatch", *HEAD), rows), said, source("digits_wide", results)])


def noise(results: dict[str, Any]) -> str:
    """What the gradient noise is claimed to be."""
    covers, cost = results["coverage"], results["cost"]
    seen = (
        f"in {covers['covered']} of {covers['problems']} problems, and B is estimable in {covers['estimable']} of them"
    )
    share = f"{100 * cost['mean']:.1f} % ({len(cost['shares'])} runs)"
    return (
        f"The interval has the true B {seen}. Measuring takes {share} of the processor's time for the rest of the"
        f" training.\n\n{source('noise', results)}"
    )


def foreseen(results: dict[str, Any]) -> str:
    """What was predicted of each task."""
    rows = [
        (
            row["case"],
            _size(row["advice"]["noise_scale"]),
            f"{_size(row['advice']['low'])} … {_size(row['advice']['high'])}",
            f"{_size(row['break_from'])} … {_size(row['break_to'])}",
            str(row["advice"]["points"]),
        )
        for row in results["rows"]
    ]
    head = ("task", "B", "95 %", "the break is predicted between", "points")
    return f"{table(head, rows)}\n\n{source('foresee', results)}"


def foreseen_sweeps(results: dict[str, Any]) -> str:
    """What the sweeps then showed."""
    said = {True: "hit", False: "MISS", None: "open"}
    rows = [
        (
            row["case"],
            _size(row["noise_scale"]),
            _size(row["break"]),
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            said[row["hit"]],
        )
        for row in results["rows"]
    ]
    return f"{table(('task', 'B', 'the break', 'break / B', ''), rows)}\n\n{source('foresee_sweeps', results)}"


def past_the_break(results: dict[str, Any]) -> str:
    """Error, updates and images of each arm beyond the break, and of the reference."""
    rows = []
    for row in results["rows"]:
        spans = [_span(row[what]) for what in ("updates", "images")]
        rate = f"{row['base_lr']:g}{' *' * row['at_an_end']}"
        name = f"{row['arm']} {', '.join(row['ramp'])}".strip()
        rows.append((row.get("task", "digits"), f"{row['minibatch']} ({row['times']}×)", name, rate, mean(row), *spans))
    head = ("task", "minibatch", "arm", "rate at 1×", "error %, mean ± std", "updates", "images")
    note = "\\* the lowest or the highest of those that were tried: there may be a better one beyond."
    return f"{table(head, rows)}\n\n{note}\n\n{source('past_the_break', results)}"


def _span(values: list[int]) -> str:
    """The one value that all runs have, or from the lowest to the highest."""
    if not values:
        return "none ended"
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} … {max(values)}"


def _size(size: float | None) -> str:
    return "not seen" if size is None else f"{size:.0f}"


def adam(results: dict[str, Any]) -> str:
    """Adam's rule at many times the minibatch, and the rate alone."""
    base = results["rows"][0]["minibatch"]
    names = [
        (f"{row['minibatch']}, " + ("the rate alone" if row["arm"] else "all of the rule"))
        if row["minibatch"] != base
        else f"{base}, the base"
        for row in results["rows"]
    ]
    rows = [(name, mean(row), str(row["n"])) for name, row in zip(names, results["rows"], strict=True)]
    return f"{table(('AdamW on digits at', 'error %, mean ± std', 'seeds'), rows)}\n\n{source('adam_rule', results)}"


def choice(results: dict[str, Any]) -> str:
    """What a recipe was chosen from, on images that were held out of the training images."""
    rows = [
        (
            "-".join(map(str, row["widths"])),
            f"{row['base_lr']:g}",
            f"{row['weight_decay']:g}",
            str(row["epochs"]),
            "half of the time" if row["flipped"] else "no",
            f"{row['mean']:.2f}" + ("" if row["std"] is None else f" ± {row['std']:.2f}"),
            str(row["n"]),
            f"{row['epoch_seconds']:.0f}",
        )
        for row in results["candidates"]
    ]
    head = ("widths", "rate at 64", "weight decay", "epochs", "flipped", "error %, held out", "seeds", "s an epoch")
    return f"{table(head, rows)}\n\n{source('fashion_choice', results)}"


def cluster_model(results: dict[str, Any]) -> str:
    """Iterations on several processes as a plan foresees them, beside what they took."""
    rows = [
        (
            row["case"],
            f"{row['from']} → {row['processes']}",
            f"{row['gigabits']:g}",
            f"{row['foreseen_s']:.3f} ({row['foreseen_reduction_s']:.3f})",
            f"{row['measured_s']:.3f} ({row['measured_reduction_s']:.3f})",
            f"{100 * (row['ratio'] - 1):+.1f} %",
        )
        for row in results["rows"]
    ]
    head = ("gradients", "processes", "Gbit/s", "foreseen, s (reduction)", "measured, s (reduction)", "off by")
    return f"{table(head, rows)}\n\n{source('cluster_model', results)}"


def power(results: dict[str, Any]) -> str:
    """What is said of a minibatch half the margin above the reference."""
    states = {"within": "within", "above": "above, margin open", "undecided": "undecided"}
    rows = [
        (f"{row['std']:g}", f"{row['seeds']}, {row['reference_seeds']}", *(_percent(row[state]) for state in states))
        for row in results["power"]
        if row["difference"] == 0.25 and row["law"] == "normal"
    ]
    return table(("std of the errors", "seeds, of the reference", *states.values()), rows)


def wrong(results: dict[str, Any]) -> str:
    """How often verdicts are false, at one look and at two."""
    rows = []
    for law in dict.fromkeys(row["law"] for row in results["false_states"]):
        for kind in ("Welch's", "paired"):
            found = [row for row in results["false_states"] if (row["law"], row["interval"]) == (law, kind)]
            worst = [max(row[state]["share"] for row in found) for state in ("within", "beyond", "above")]
            rows.append((f"{law}, {kind}", *map(_percent, worst)))
    head = ("errors and interval", "at the margin, said to be within", "said to be beyond", "equal, said to be above")
    looks = [
        (row["law"], str(row["looks"]), _percent(row["first"]["share"]), _percent(row["either"]["share"]))
        for row in results["looks"]
    ]
    twice = table(("errors", "`--looks`", "falsely within at the first look", "at either of two"), looks)
    unseen = "; ".join(f"{_percent(row['within']['share'])} of sweeps with {row['seeds']}" for row in results["breaks"])
    said = f"If one run in ten breaks, the minibatch is still called within the margin in {unseen} seeds."
    return "\n\n".join([table(head, rows), twice, said, source("verdicts", results)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def papers(_: dict[str, Any]) -> str:
    """Every entry of the paper's tables with its verdict."""
    tables = ("minibatches", "T1", "T2a", "T2b", "T2c", "T3a, box AP", "T3a, mask AP")
    rows = [
        (
            "F1" if name == "minibatches" else name,
            size_label(row["minibatch"]),
            f"{row.get('label', '')}",
            f"{row['mean']:.{1 if 'AP' in name else 2}f} ± {row['std']:.{1 if 'AP' in name else 2}f}",
            verdict.text if verdict else "the reference",
        )
        for name in tables
        for row, verdict in paper_verdicts(name)
    ]
    return table(("table", "minibatch", "with", "the paper", "points [90 % interval]"), rows)


def beside(results: dict[str, Any]) -> str:
    """The paper's warmups, rates and γ beside ours, in points above the recipe at the large minibatch."""
    rows = [
        (row.name, points(row.paper), row.verdict.text)
        for row in of_figure(results).arms
        if row.paper is not None and row.verdict
    ]
    shown = next(row["minibatch"] for row in results["entries"] if row["group"] == "rate")
    head = ("the recipe with", "the paper at 8k, points", f"digits at {shown}")
    return f"{table(head, rows)}\n\n{source('digits_figure', results)}"


def sweep(results: dict[str, Any]) -> str:
    """Seeds as one network beside one by one."""
    rows = [
        (str(row["minibatch"]), str(row["seeds"]), f"{row['ratio']:.2f}", str(len(row["pairs"])))
        for row in results["table"]
    ]
    head = ("minibatch", "seeds at once", "times as fast, by CPU time", "pairs")
    whole = f"`onehour sweep digits` as a whole: {results['default_sweep_seconds'] / 60:.1f} minutes."
    return f"{table(head, rows)}\n\n{whole}\n\n{source('sweep', results)}"


def gaps(results: dict[str, Any]) -> str:
    """The early sign of each minibatch: whether its training curve lies over the base's (F3, F4)."""
    rows = [
        (str(row["minibatch"]), points(row["early_gap"]))
        for row in results["entries"]
        if row["group"] == "minibatch" and row["early_gap"] is not None
    ]
    return table(("minibatch", "mean gap of the training errors, points"), rows)


def cost(results: dict[str, Any], name: str) -> str:
    """What one thing wrong costs at the figure's large minibatch."""
    findings = of_figure(results)
    row = next(row for row in findings.arms if row.name == name)
    own = findings.study.beside(row.entry)
    assert own is not None
    assert row.verdict is not None
    return (
        f"On digits at minibatch {multiple(findings, row)}, {row.entry.n} seeds, with {name}:"
        f" {error_text(row.entry.mean, row.entry.std)} % against {error_text(own.mean, own.std)} %. The verdict:"
        f" {row.verdict.text}.\n\n{source('digits_figure', results)}"
    )


COSTS = {
    "batchnorm_n_changed": "BatchNorm over all of kn",
    "batchnorm_stats_of_rank_0": "running statistics of process 0 alone",
    "batchnorm_synced": "BatchNorm over all of kn",
    "decay_on_batchnorm": "weight decay on BatchNorm",
    "gradient_sum_not_mean": "loss divided by n, not kn",
    "lr_not_scaled": "the rate not scaled",
    "lr_scaled_wrong": "twice the rate",
    "momentum_inside_uncorrected": "rate inside the momentum, not corrected",
    "no_warmup": "no warmup",
    "overlapping_shards": "each worker shuffles for itself",
    "warmup_per_epoch": "warmup in steps of an epoch",
}
"""Pitfalls of `onehour check` that the figure has an arm for."""
