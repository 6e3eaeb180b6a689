"""How often verdicts are wrong, and how often they come: simulated sweeps whose true differences are known.

    python benchmarks/verdicts.py [--sweeps 2000]

All sweeps of a scenario are judged at once with numpy; a test shows that the study's functions say the same of each. A
share comes with its exact 95 % binomial interval. Errors are normal unless said otherwise; `step` is what they are
rounded to: 100/4096 points for digits' 4,096 validation images, 0.1 for 1,000. Writes results/verdicts.json.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from results import write

MARGIN = 0.5
ALPHA = 0.05
STEPS = (0.0, 100 / 4096, 0.1)
STDS = ((0.12, 0.12), (0.2, 0.2), (0.3, 0.3), (0.12, 0.3), (0.3, 0.12))
"""Of the reference and of what is compared with it: the paper's and digits' lie between .08 and .3."""

LONG = 100


def draw(
    generator: np.random.Generator,
    sweeps: int,
    differences: Sequence[float],
    seeds: int,
    stds: tuple[float, float] = (0.2, 0.2),
    step: float = 0.0,
) -> np.ndarray:
    """Errors (sweeps, 1 + entries, seeds) around 3.5 %; entry 0 is the reference."""
    means = 3.5 + np.array([0.0, *differences])
    spread = np.array([stds[0], *[stds[1]] * len(differences)])
    errors = generator.normal(means[:, None], spread[:, None], (sweeps, len(means), seeds))
    return np.round(errors / step) * step if step else errors


def p_holds(errors: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """Welch's p (sweeps, entries) that the difference is under the margin."""
    means, parts = errors.mean(axis=-1), errors.var(axis=-1, ddof=1) / errors.shape[-1]
    distances = means[:, :1] + margin - means[:, 1:]
    total = parts[:, 1:] + parts[:, :1]
    alike = total < 1e-20  # all runs have one error: rounding is all that is left
    total = np.where(alike, 1, total)
    freedom = (errors.shape[-1] - 1) * total**2 / np.where(alike, 1, parts[:, 1:] ** 2 + parts[:, :1] ** 2)
    return np.where(alike, distances <= 1e-9, stats.t.sf(distances / np.sqrt(total), freedom))


def p_worse(errors: np.ndarray) -> np.ndarray:
    """The rank test's exact p (sweeps, entries): up to 6 seeds over all arrangements, else without ties."""
    seeds = errors.shape[-1]
    reference = np.broadcast_to(errors[:, :1], errors[:, 1:].shape)
    if seeds > 6:
        return stats.mannwhitneyu(errors[:, 1:], reference, axis=-1, alternative="greater", method="exact").pvalue
    ranks = stats.rankdata(np.concatenate([errors[:, 1:], reference], axis=-1), axis=-1)
    chosen = np.array([np.isin(range(2 * seeds), some) for some in itertools.combinations(range(2 * seeds), seeds)])
    return (ranks @ chosen.T >= ranks[..., :seeds].sum(axis=-1, keepdims=True)).mean(axis=-1)


def holm(ps: np.ndarray) -> np.ndarray:
    """Adjusted p along the last axis."""
    order = np.argsort(ps, axis=-1, kind="stable")
    factors = ps.shape[-1] - np.arange(ps.shape[-1])
    ordered = np.maximum.accumulate(np.minimum(1, factors * np.take_along_axis(ps, order, -1)), axis=-1)
    adjusted = np.empty_like(ps)
    np.put_along_axis(adjusted, order, ordered, -1)
    return adjusted


def states_of_arms(errors: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """States (sweeps, entries) of arms against entry 0."""
    return _states(holm(p_holds(errors, margin)), holm(p_worse(errors)))


def states_of_minibatches(errors: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """States (sweeps, entries) of minibatches in the order of their size."""
    states = _states(p_holds(errors, margin), p_worse(errors))
    before = np.logical_and.accumulate(states == "holds", axis=-1)[:, :-1]
    states[:, 1:][~before] = "untested"
    return states


def _states(holds: np.ndarray, worse: np.ndarray) -> np.ndarray:
    return np.where(holds < ALPHA, "holds", np.where(worse < ALPHA, "worse", "undecided"))


def share(events: Any) -> dict[str, Any]:
    """How often, with the exact 95 % binomial interval, of events (sweeps,)."""
    count = int(events.sum())
    interval = stats.binomtest(count, len(events)).proportion_ci(0.95, method="exact")
    return {"share": count / len(events), "low": float(interval.low), "high": float(interval.high), "n": len(events)}


def false_holds(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """A minibatch exactly the margin above is said to hold; `long_run` is the share of LONG times as many sweeps.

    Welch's test is an approximation: with unequal stds its long run lies a little above 5 %.
    """
    rows = []
    for (first, second), step, seeds in itertools.product(STDS, STEPS, (5, 10)):
        row = {"reference_std": first, "std": second, "step": step, "seeds": seeds}
        few, many = (
            p_holds(draw(generator, count, [MARGIN], seeds, (first, second), step))[:, 0] < ALPHA
            for count in (sweeps, LONG * sweeps)
        )
        rows.append({**row, **share(few), "long_run": float(many.mean())})
    return rows


def false_worse(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """A minibatch no worse than the reference is said to be: by the rank test alone, and by the verdict."""
    rows = []
    for (first, second), step in itertools.product(STDS, STEPS):
        errors = draw(generator, sweeps, [0.0], 5, (first, second), step)
        row = {"reference_std": first, "std": second, "step": step, "seeds": 5}
        by_ranks = p_worse(errors)[:, 0] < ALPHA
        by_verdict = states_of_minibatches(errors)[:, 0] == "worse"
        rows.append({**row, "rank_test": share(by_ranks), "verdict": share(by_verdict)})
    return rows


def power(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """What is said of a minibatch truly .25 above, half the margin, and of one truly 1 point above."""
    rows = []
    for std, seeds, difference in itertools.product((0.12, 0.15, 0.2, 0.25, 0.3), (3, 5, 10), (0.0, 0.25, 1.0)):
        states = states_of_minibatches(draw(generator, sweeps, [difference], seeds, (std, std)))[:, 0]
        row = {"difference": difference, "std": std, "seeds": seeds, "holds": share(states == "holds")}
        if difference == 0.25:
            row["holds_by_formula"] = _power(MARGIN - difference, std, seeds)
        rows.append({**row, "worse": share(states == "worse")})
    return rows


def _power(distance: float, std: float, seeds: int) -> float:
    """P(t' > t(.95, 2n − 2)), t' noncentral by distance / (std·√(2/n)): the t-test of equal stds, near Welch's."""
    freedom = 2 * seeds - 2
    return float(stats.nct.sf(stats.t.ppf(1 - ALPHA, freedom), freedom, distance / (std * (2 / seeds) ** 0.5)))


def families(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """Any false verdict in a whole sweep of 5 seeds: fixed sequence over minibatches, Holm over arms."""
    rows = []
    for flat in range(6):  # so many minibatches truly hold before the break
        differences = [0.0] * flat + [MARGIN] * (6 - flat)
        states = states_of_minibatches(draw(generator, sweeps, differences, 5))
        wrong = (states[:, flat:] == "holds").any(axis=-1)
        rows.append({"family": "minibatches", **_counted(differences), "false": "holds", **share(wrong)})
    for arms, false, mixed in itertools.product((6, 9, 12, 15), ("holds", "worse"), (False, True)):
        true = MARGIN if false == "holds" else 0.0  # the difference at which the verdict is false
        differences = [MARGIN - true if mixed and place % 2 else true for place in range(arms)]
        states = states_of_arms(draw(generator, sweeps, differences, 5))
        wrong = (states[:, np.array(differences) == true] == false).any(axis=-1)
        rows.append({"family": "arms", **_counted(differences), "false": false, **share(wrong)})
    return rows


def _counted(differences: Sequence[float]) -> dict[str, int]:
    return {"truly_equal": differences.count(0.0), "truly_at_margin": differences.count(MARGIN)}


def rare_breaks(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """What no test of few seeds can see: a run in ten breaks, 5 points up, which puts the true mean at the margin.

    Where no break is among the seeds, nothing tells of it.
    """
    rows = []
    for seeds in (5, 10, 20):
        errors = draw(generator, sweeps, [0.0], seeds)
        broken = generator.random((sweeps, seeds)) < MARGIN / 5
        errors[:, 1] += 5 * broken
        said = p_holds(errors)[:, 0] < ALPHA
        unseen = {"false_holds": share(said), "no_break_seen": share(~broken.any(axis=-1))}
        rows.append({"difference": MARGIN, "seeds": seeds, "std": 0.2, **unseen})
    return rows


def simulate(sweeps: int, seed: int = 1) -> dict[str, Any]:
    """Every scenario, each with a generator of its own."""
    scenarios = (false_holds, false_worse, power, families, rare_breaks)
    generators = np.random.default_rng(seed).spawn(len(scenarios))
    rows = {run.__name__: run(generator, sweeps) for run, generator in zip(scenarios, generators, strict=True)}
    return {"sweeps": sweeps, "seed": seed, "margin": MARGIN, **rows}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweeps", type=int, default=2000)
    found = simulate(parser.parse_args().sweeps)
    worst = max(found["false_holds"], key=lambda row: row["share"])
    print(f"false holds: at most {worst['share']:.3f} [{worst['low']:.3f}, {worst['high']:.3f}]")
    print(f"false holds in the long run: at most {max(row['long_run'] for row in found['false_holds']):.4f}")
    for row in found["power"]:
        if row["difference"] == 0.25:
            said = f"holds {row['holds']['share']:.3f} (formula {row['holds_by_formula']:.3f})"
            print(f"truly .25 above, std {row['std']:g}, {row['seeds']} seeds: {said}")
    worst = max(found["families"], key=lambda row: row["share"])
    print(f"any false verdict in a sweep: at most {worst['share']:.3f} [{worst['low']:.3f}, {worst['high']:.3f}]")
    for row in found["rare_breaks"]:
        print(f"a run in ten breaks, {row['seeds']} seeds: false holds {row['false_holds']['share']:.3f}")
    write(__file__, "verdicts", found)


if __name__ == "__main__":
    main()
