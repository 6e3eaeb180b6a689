"""How often verdicts are wrong, and how often they come: simulated sweeps whose true differences are known.

    python benchmarks/verdicts.py [--sweeps 20000]

All sweeps of a scenario are judged at once with numpy; a test shows that the study's functions say the same of each. A
share comes with its exact 95 % binomial interval. Errors are normal, heavy-tailed (Student's t with 3 degrees of
freedom) or skewed (exponential), with one std. Writes results/verdicts.json.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
from scipy import special, stats

from onehour.study.verdict import ERROR, MOST
from results import write

MARGIN = 0.5
STATES = ("within", "above", "beyond", "undecided")
LAWS = ("normal", "heavy-tailed", "skewed")
STDS = ((0.12, 0.12), (0.2, 0.2), (0.3, 0.3), (0.12, 0.3), (0.3, 0.12))
"""Of the reference and of what is compared with it: the paper's and digits' lie between .08 and .3."""

SEEDS = ((5, 5), (5, 10), (10, 10), (10, 20))
"""Of an entry and of its reference."""

CORRELATIONS = (0.0, 0.5, 0.99)
"""Of an arm with its recipe over seeds: measured between −.4 and .99 on digits."""


def noise(generator: np.random.Generator, shape: tuple[int, ...], law: str = "normal") -> np.ndarray:
    """Deviations with mean 0 and std 1."""
    if law == "heavy-tailed":
        return generator.standard_t(3, shape) / 3**0.5
    return generator.exponential(1, shape) - 1 if law == "skewed" else generator.normal(size=shape)


def pairs_of(
    generator: np.random.Generator,
    sweeps: int,
    difference: float,
    seeds: tuple[int, int],
    stds: tuple[float, float] = (0.2, 0.2),
    law: str = "normal",
) -> tuple[np.ndarray, np.ndarray]:
    """Errors (sweeps, seeds) of an entry this many points above its reference, and of the reference."""
    other = 3.5 + stds[0] * noise(generator, (sweeps, seeds[1]), law)
    return 3.5 + difference + stds[1] * noise(generator, (sweeps, seeds[0]), law), other


def welch(
    errors: np.ndarray, others: np.ndarray, looks: int = 1, more: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The difference and both ends of Welch's interval; with `more` seeds as if means and stds stayed."""
    n = errors.shape[1] + more
    n_other = others.shape[1] * n // errors.shape[1]
    first, second = errors.var(axis=1, ddof=1) / n, others.var(axis=1, ddof=1) / n_other
    freedom = (first + second) ** 2 / (first**2 / (n - 1) + second**2 / (n_other - 1))
    half = special.stdtrit(freedom, 1 - ERROR / looks) * np.sqrt(first + second)
    difference = errors.mean(axis=1) - others.mean(axis=1)
    return difference, difference - half, difference + half


def paired(errors: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of the differences seed by seed."""
    differences, n = errors - others, errors.shape[1]
    half = special.stdtrit(n - 1, 1 - ERROR) * differences.std(axis=1, ddof=1) / n**0.5
    difference = differences.mean(axis=1)
    return difference, difference - half, difference + half


def states(interval: tuple[np.ndarray, np.ndarray, np.ndarray], margin: float = MARGIN) -> np.ndarray:
    """The state of each sweep."""
    _, lower, upper = interval
    return np.select([upper < margin, lower > margin, lower > 0], ["within", "beyond", "above"], "undecided")


def share(events: Any) -> dict[str, Any]:
    """How often, with the exact 95 % binomial interval, of events (sweeps,)."""
    count = int(events.sum())
    interval = stats.binomtest(count, len(events)).proportion_ci(0.95, method="exact")
    return {"share": count / len(events), "low": float(interval.low), "high": float(interval.high), "n": len(events)}


def false_states(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """What lies exactly at the margin is said to be within or beyond it; what lies at zero is said to be above zero."""
    rows = []
    for law, stds, seeds in itertools.product(LAWS, STDS, SEEDS):
        at_margin = states(welch(*pairs_of(generator, sweeps, MARGIN, seeds, stds, law)))
        at_zero = states(welch(*pairs_of(generator, sweeps, 0.0, seeds, stds, law)))
        row = {"law": law, "reference_std": stds[0], "std": stds[1], "seeds": seeds[0], "reference_seeds": seeds[1]}
        rows.append({**row, "interval": "Welch's", **_wrong(at_margin, at_zero)})
    for law, correlation, seeds in itertools.product(LAWS, CORRELATIONS, (5, 10)):
        found = []
        for difference in (MARGIN, 0.0):
            other, own = noise(generator, (2, sweeps, seeds), law)
            errors = 3.5 + difference + 0.2 * (correlation * other + (1 - correlation**2) ** 0.5 * own)
            found.append(states(paired(errors, 3.5 + 0.2 * other)))
        row = {"law": law, "correlation": correlation, "reference_std": 0.2, "std": 0.2, "seeds": seeds}
        rows.append({**row, "reference_seeds": seeds, "interval": "paired", **_wrong(*found)})
    return rows


def _wrong(at_margin: np.ndarray, at_zero: np.ndarray) -> dict[str, Any]:
    wrong = {"within": at_margin == "within", "beyond": at_margin == "beyond"}
    wrong |= {"above": np.isin(at_zero, ["above", "beyond"])}
    return {name: share(events) for name, events in wrong.items()}


def power(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """What is said of a minibatch truly equal, a quarter of a point above (half the margin), and 1 point above."""
    rows = []
    for law, std, seeds, difference in itertools.product(LAWS[:2], (0.12, 0.2, 0.3), SEEDS, (0.0, 0.25, 1.0)):
        found = states(welch(*pairs_of(generator, sweeps, difference, seeds, (std, std), law)))
        row = {"law": law, "difference": difference, "std": std, "seeds": seeds[0], "reference_seeds": seeds[1]}
        rows.append(row | {state: float((found == state).mean()) for state in STATES})
    return rows


def claims(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """It is claimed that the rule holds to a minibatch at the margin: six in sequence, of which the first are equal."""
    rows = []
    for law, equal in itertools.product(LAWS[:2], range(6)):
        others = pairs_of(generator, sweeps, 0.0, (5, 10), law=law)[1]
        within = []
        for place in range(6):
            errors = pairs_of(generator, sweeps, MARGIN * (place >= equal), (5, 10), law=law)[0]
            within.append(states(welch(errors, others)) == "within")
        claimed = np.logical_and.accumulate(within)[equal]
        rows.append({"law": law, "truly_equal": equal, "truly_at_margin": 6 - equal, **share(claimed)})
    return rows


def looks(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """What lies at the margin is called within at either of two looks: at 5 seeds, and with as many more as advised."""
    rows = []
    for law, planned in itertools.product(LAWS[:2], (1, 2)):
        errors, others = pairs_of(generator, sweeps, MARGIN, (5 + MOST, 10 + 2 * MOST), law=law)
        first = states(welch(errors[:, :5], others[:, :10], planned))
        advised = np.zeros(sweeps, int)
        for more in range(MOST, 0, -1):  # the fewest that decide if means and stds stay
            later = states(welch(errors[:, :5], others[:, :10], planned, more))
            advised[np.isin(later, ["within", "beyond"])] = more
        second = np.full(sweeps, "undecided")
        for more in range(1, MOST + 1):
            again = np.isin(first, ["above", "undecided"]) & (advised == more)
            if again.any():
                few, many = errors[again, : 5 + more], others[again, : 10 + 2 * more]
                second[again] = states(welch(few, many, planned))
        one, two = first == "within", (first == "within") | (second == "within")
        decided = np.isin(second[advised > 0], ["within", "beyond"]).mean()
        rows.append(
            {"law": law, "looks": planned, "first": share(one), "either": share(two), "decided": float(decided)}
        )
    return rows


def breaks(generator: np.random.Generator, sweeps: int) -> list[dict[str, Any]]:
    """A run in ten breaks: how often that is not seen, and the minibatch is called within the margin."""
    rows = []
    for seeds in (5, 10, 20):
        found = states(welch(*pairs_of(generator, sweeps, 0.0, (seeds, 2 * seeds))))
        broke = generator.binomial(seeds, 0.1, sweeps)
        said = {"within": share((broke == 0) & (found == "within")), "broke": share(broke > 0)}
        rows.append({"seeds": seeds, "rate": 0.1, **said})
    return rows


def simulate(sweeps: int, seed: int = 1) -> dict[str, Any]:
    """Every scenario, each with a generator of its own."""
    scenarios = (false_states, power, claims, looks, breaks)
    generators = np.random.default_rng(seed).spawn(len(scenarios))
    rows = {run.__name__: run(generator, sweeps) for run, generator in zip(scenarios, generators, strict=True)}
    return {"sweeps": sweeps, "seed": seed, "margin": MARGIN, **rows}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweeps", type=int, default=20_000)
    found = simulate(parser.parse_args().sweeps)
    for law, kind, state in itertools.product(LAWS, ("Welch's", "paired"), ("within", "beyond", "above")):
        shares = [row[state]["share"] for row in found["false_states"] if (row["law"], row["interval"]) == (law, kind)]
        print(f"falsely {state}, {law} errors, {kind}: {np.mean(shares):.3f}, at most {max(shares):.3f}")
    for row in found["looks"]:
        ends = f"one look {row['first']['share']:.3f}, either of two {row['either']['share']:.3f}"
        print(f"falsely within, {row['law']}, --looks {row['looks']}: {ends}; the second decides {row['decided']:.2f}")
    for row in found["breaks"]:
        print(f"a run in ten breaks, {row['seeds']} seeds: within {row['within']['share']:.3f}")
    write(__file__, "verdicts", found)


if __name__ == "__main__":
    main()
