"""All pitfalls over one case, worst first; what one explains, another does not repeat."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Collection, Sequence

from onehour.check.case import Case
from onehour.check.catalogue import PITFALLS
from onehour.check.finding import Finding
from onehour.check.pitfalls import (
    batchnorm,
    decay,
    evaluation,
    gradient,
    momentum,
    order,
    processes,
    rate,
    schedule,
    shards,
    stepping,
)

_COMMENT = re.compile(r"#\s*onehour:\s*ignore(?:\[([\w\s,-]*)\])?")


def not_silenced(findings: Sequence[Finding]) -> list[Finding]:
    """The findings whose line, or the line above it, has no comment that names them; one without ids silences all.

    >>> not_silenced([])
    []
    """
    return [finding for finding in findings if not _silenced(finding)]


def _silenced(finding: Finding) -> bool:
    if finding.where is None:
        return False
    file, _, line = finding.where.rpartition(":")
    if not line.isdigit():
        return False
    linecache.checkcache(file)
    number = int(line)
    texts = [linecache.getline(file, number)]
    above = linecache.getline(file, number - 1).strip()
    if above.startswith("#"):
        texts.append(above)
    return any(names(text, finding.pitfall) for text in texts)


def names(text: str, pitfall: str) -> bool:
    """Whether a line's comment silences a pitfall.

    >>> names("optimizer.step()  # onehour: ignore[double-step]", "double-step")
    True
    >>> names("optimizer.step()  # onehour: ignore[double-step]", "no-warmup")
    False
    """
    match = _COMMENT.search(text)
    if match is None:
        return False
    return match[1] is None or pitfall in {part.strip() for part in match[1].split(",")}


JUDGES: dict[str, Callable[[Case], Finding | None]] = {
    "lr-not-scaled": rate.lr_not_scaled,
    "lr-scaled-wrong": rate.lr_scaled_wrong,
    "adam-linear-scaling": rate.adam_linear_scaling,
    "no-warmup": rate.no_warmup,
    "warmup-per-epoch": rate.warmup_per_epoch,
    "warmup-start": rate.warmup_start,
    "scheduler-steps-k-times": schedule.scheduler_steps_k_times,
    "scheduler-too-slow": schedule.scheduler_too_slow,
    "scheduler-never-steps": schedule.scheduler_never_steps,
    "lr-collapses": schedule.lr_collapses,
    "momentum-inside-uncorrected": momentum.momentum_inside_uncorrected,
    "momentum-outside-corrected": momentum.momentum_outside_corrected,
    "accumulation-not-divided": gradient.accumulation_not_divided,
    "accumulation-tail": gradient.accumulation_tail,
    "gradient-mean-of-unequal": gradient.gradient_mean_of_unequal,
    "double-step": stepping.double_step,
    "step-without-zero-grad": stepping.step_without_zero_grad,
    "unused-gradients": stepping.unused_gradients,
    "decay-on-batchnorm": decay.decay_on_batchnorm,
    "decay-in-loss": decay.decay_in_loss,
    "decay-scaled-with-loss": decay.decay_scaled_with_loss,
    "decay-decoupled-scales-with-lr": decay.decay_decoupled_scales_with_lr,
    "same-order-every-epoch": order.same_order_every_epoch,
    "drop-last-large": order.drop_last_large,
    "overlapping-shards": shards.overlapping_shards,
    "shuffle-within-shard": shards.shuffle_within_shard,
    "padded-training-data": shards.padded_training_data,
    "padded-evaluation": shards.padded_evaluation,
    "dropped-evaluation": shards.dropped_evaluation,
    "mean-of-rates-evaluation": evaluation.mean_of_rates_evaluation,
    "gradient-sum-not-mean": processes.gradient_sum_not_mean,
    "loss-scaled-by-world-size": processes.loss_scaled_by_world_size,
    "different-initial-weights": processes.different_initial_weights,
    "same-augmentation-on-every-worker": processes.same_augmentation_on_every_worker,
    "batchnorm-synced": batchnorm.batchnorm_synced,
    "batchnorm-stats-of-rank-0": batchnorm.batchnorm_stats_of_rank_0,
    "batchnorm-stats-diverge": batchnorm.batchnorm_stats_diverge,
    "batchnorm-n-changed": batchnorm.batchnorm_n_changed,
}

SEVERITIES = ("error", "warning", "note")


def judge(case: Case, *, only: Collection[str] = (), skip: Collection[str] = ()) -> list[Finding]:
    """Every finding of a case, worst first.

    Args:
        case: what was seen.
        only: ids to look for; all, if empty.
        skip: ids to leave out.

    Raises:
        ValueError: for an id that is none.

    >>> from onehour.check.story import Story
    >>> from onehour.check.tape import Tape
    >>> judge(Case([Story(Tape())]))
    []
    """
    refuse_unknown([*only, *skip])
    found = [
        finding
        for pitfall, look in JUDGES.items()
        if (not only or pitfall in only) and pitfall not in skip
        if (finding := look(case)) is not None
    ]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def not_judged(case: Case) -> list[str]:
    """What could not be judged of a case, and why: one sentence each.

    >>> from onehour.check.story import Story
    >>> from onehour.check.tape import Tape
    >>> not_judged(Case([Story(Tape())]))
    []
    """
    rates, said = case.schedule(), []
    if case.base.lr is not None and rates.rising:
        said.append(
            f"the rate was not judged against the base: it still rises after {len(rates.seen)} updates, and nothing"
            " says where to"
        )
    if case.stories and case.story.training is not None and (epochs := len(case.story.trained())) < 2:
        seen = (
            "1 whole epoch of the training data was seen" if epochs else "no whole epoch of the training data was seen"
        )
        said.append(f"{seen}: what shows only between two was not judged")
    idle = schedule.idle_scheduler(case) if case.stories else None
    if idle is not None and schedule.steps_later(case, idle):
        said.append(f"{idle.facts['name']} was not stepped in 2 epochs; the loop steps it later, which was not judged")
    if any(story.tape.full for story in case.stories):
        said.append("more happened than is kept: what came after the first events was not judged")
    return said


def refuse_unknown(pitfalls: Collection[str]) -> None:
    """Refuse an id that is none, and name the nearest.

    >>> refuse_unknown(["double-step"])
    """
    import difflib

    for pitfall in pitfalls:
        if pitfall not in PITFALLS:
            near = difflib.get_close_matches(pitfall, PITFALLS, n=1, cutoff=0.0)[0]
            raise ValueError(f"no pitfall is called {pitfall!r}; expected {near!r} or another of docs/checks")
