"""Blocks of the digits' figure and of what belongs to it: arms, pitfalls and their costs, verdicts, speed."""

from __future__ import annotations

from typing import Any

from parts import claims, mean, points, source, table

from onehour.config import Recipe


def figure(results: dict[str, Any], group: str, stem: str = "digits_figure") -> str:
    """A group of a figure: what each entry costs, and the verdict."""
    entries = [row for row in results["entries"] if row["group"] == group]
    several = len({row["minibatch"] for row in entries}) > 1

    def name(row: dict[str, Any]) -> str:
        if group == "minibatch":
            return str(row["minibatch"])
        return f"{row['name']}, at {row['minibatch']}" if several else row["name"]

    rows = [(name(row), mean(row), points(row), row["verdict"] or "the reference") for row in entries]
    head = ("minibatch" if group == "minibatch" else "the recipe with", "error %, mean ± std", "points", "verdict")
    return table(head, rows) + (f"\n\n{source(stem, results)}" if group == "minibatch" else "")


def figure_n(results: dict[str, Any]) -> str:
    """Error against BatchNorm's n, with the recipe's own n among them."""
    shown = {row["minibatch"] for row in results["entries"] if row["group"] == "n"}
    own = Recipe.from_dict({"name": "digits"} | results["recipe"]).per_worker
    rows = {
        own if row["group"] == "minibatch" else int(row["arm"].partition("=")[2]): row
        for row in results["entries"]
        if row["group"] == "n" or (row["group"] == "minibatch" and row["minibatch"] in shown)
    }
    lines = [(str(n), mean(row), str(row["n"])) for n, row in sorted(rows.items())]
    return table((f"n, at minibatch {shown.pop()}", "error %, mean ± std", "seeds"), lines)


def figure_claims(results: dict[str, Any]) -> str:
    """What is promised of the figure, and whether it shows it."""
    return claims(("claim", "points", "measured", "holds"), results["claims"], lambda row: f"{row['points']:+.2f}")


def figure_wide(results: dict[str, Any]) -> str:
    """A variant of digits on which the rule was claimed to hold further, and what was seen."""
    head = ("minibatch", "error %, mean ± std", "points", "verdict")
    rows = [
        (str(row["minibatch"]), mean(row), points(row), row["verdict"] or "the reference") for row in results["rows"]
    ]
    claimed = [(row["claim"], row["seen"], "yes" if row["holds"] else "NO") for row in results["claims"]]
    said = table(("claimed beforehand", "seen", "true"), claimed)
    return "\n\n".join([table(head, rows), said, source("digits_wide", results)])


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


def foreseen(results: dict[str, Any]) -> str:
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
    """How often a true difference of a quarter point is said to hold."""
    rows = [
        (f"{row['std']:g}", str(row["seeds"]), f"{100 * row['holds']['share']:.0f} %")
        for row in results["power"]
        if row["difference"] == 0.25
    ]
    return f"{table(('std of the errors', 'seeds', 'it is said to hold'), rows)}\n\n{source('verdicts', results)}"


def sweep(results: dict[str, Any]) -> str:
    """Seeds as one network beside one by one."""
    rows = [
        (str(row["minibatch"]), str(row["seeds"]), f"{row['ratio']:.2f}", str(len(row["pairs"])))
        for row in results["table"]
    ]
    head = ("minibatch", "seeds at once", "times as fast, by CPU time", "pairs")
    whole = f"`onehour sweep digits` as a whole: {results['default_sweep_seconds'] / 60:.1f} minutes."
    return f"{table(head, rows)}\n\n{whole}\n\n{source('sweep', results)}"


def cost(results: dict[str, Any], name: str) -> str:
    """What one thing wrong costs at the figure's large minibatch."""
    row = next(row for row in results["entries"] if row["name"] == name)
    same = [r for r in results["entries"] if r["group"] == "minibatch" and r["minibatch"] == row["minibatch"]]
    base = next(r["minibatch"] for r in results["entries"] if r["state"] == "reference")
    return (
        f"On digits at minibatch {row['minibatch']} ({row['minibatch'] // base}×), {row['n']} seeds, with {name}:"
        f" {mean(row)} % against {mean(same[0])} %. The verdict: {row['verdict']}."
        f"\n\n{source('digits_figure', results)}"
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
