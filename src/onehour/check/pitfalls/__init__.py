"""All pitfalls over one case, worst first, but for those that a comment silences."""

from __future__ import annotations

import difflib
import linecache
import re
from collections.abc import Collection, Sequence

from onehour.check.case import Case
from onehour.check.finding import Finding, Pitfall
from onehour.check.pitfalls import batchnorm, evaluation, gradient, optimizer, processes, rate, samples, schedule
from onehour.check.tape import Trouble

FAMILIES = (rate, schedule, gradient, optimizer, samples, evaluation, processes, batchnorm)

PITFALLS: dict[str, Pitfall] = {
    one.id: one
    for family in FAMILIES
    for one in vars(family).values()
    if isinstance(one, Pitfall) and one.judge.__module__ == family.__name__
}
"""Every pitfall by its id, in the order in which they are judged."""

SEVERITIES = ("error", "warning", "note")

_COMMENT = re.compile(r"#\s*onehour:\s*ignore(?:\[([\w\s,-]*)\])?")


def judge(case: Case, *, only: Collection[str] = (), skip: Collection[str] = ()) -> list[Finding]:
    """Every finding of a case but the symptoms of another, worst first: of the ids in `only`, or all; not in `skip`."""
    refuse_unknown([*only, *skip])
    found = [finding for look in PITFALLS.values() if (finding := look(case)) is not None]
    hidden = {symptom for finding in found for symptom in PITFALLS[finding.pitfall].symptoms}.union(skip)
    asked = only or PITFALLS
    return worst_first([each for each in found if each.pitfall in asked and each.pitfall not in hidden])


def refuse_unknown(pitfalls: Collection[str]) -> None:
    """Refuse an id that is none, and name the nearest."""
    for name in pitfalls:
        if name not in PITFALLS:
            near = difflib.get_close_matches(name, PITFALLS, n=1, cutoff=0.0)[0]
            raise ValueError(f"no pitfall is called {name!r}; expected {near!r} or another of docs/checks")


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


class Note(str):
    """Why something was not judged, and the ids of what was not."""

    pitfalls: tuple[str, ...]

    def __new__(cls, text: str, *pitfalls: str) -> Note:
        note = super().__new__(cls, text)
        note.pitfalls = pitfalls
        return note


AGAINST_BASE = ("lr-not-scaled", "lr-scaled-wrong", "no-warmup", "warmup-start")
BETWEEN_EPOCHS = ("same-order-every-epoch", "shuffle-within-shard", "warmup-per-epoch", "scheduler-never-steps")
TO_THE_END = ("lr-collapses", "scheduler-steps-k-times", "scheduler-too-slow")
WEIGHTS = (
    *("accumulation-not-divided", "accumulation-tail", "gradient-mean-of-unequal", "gradient-sum-not-mean"),
    *("loss-scaled-by-world-size", "decay-scaled-with-loss"),
)
SUMS = ("gradient-sum-not-mean", "loss-scaled-by-world-size")
ON_SEVERAL = (
    *("gradients-not-averaged", "loss-scaled-by-world-size", "different-initial-weights", "overlapping-shards"),
    *("shuffle-within-shard", "padded-training-data", "padded-evaluation", "same-augmentation-on-every-worker"),
    *("batchnorm-synced", "batchnorm-stats-of-rank-0", "batchnorm-stats-diverge"),
)


def not_judged(case: Case, asked: Collection[str] = ()) -> list[Note]:
    """What could not be judged of a case, and why: a sentence each; of ids that were asked for a missing base, too."""
    rates, story, said = case.schedule(), case.story, list[Note]()
    scaled = (*AGAINST_BASE, "decay-decoupled-scales-with-lr", *["adam-linear-scaling"] * (case.processes == 1))
    if {*asked} & {*scaled} and (case.base.lr is None or case.base.minibatch is None):
        said.append(Note("rates were not judged: that needs --base-lr and --base-minibatch", *scaled))
    alone = {*asked} if case.processes == 1 and len(asked) < len(PITFALLS) else set[str]()
    if "batchnorm-n-changed" in alone and case.base.per_worker is None:
        said.append(Note("BatchNorm's n was not judged: that needs --base-per-worker", "batchnorm-n-changed"))
    if between := [name for name in ON_SEVERAL if name in alone]:
        said.append(Note(f"{', '.join(between)}: what shows only on several processes was not judged", *between))
    for trouble in {f"{e.observer}: {e.error}": e for story in case.stories for e in story.tape.of(Trouble)}:
        said.append(Note(f"a part of the check failed, so what it watches was not judged ({trouble})", *PITFALLS))
    if case.base.lr is not None and rates.rising:
        text = f"the rate was not judged against the base: it still rises after {len(rates.seen)} updates, and nothing"
        said.append(Note(f"{text} says where to", *AGAINST_BASE))
    if story.training is None and not samples.same_order_every_epoch(case):
        text = "no DataLoader gives the training data: which samples an epoch takes was not judged"
        said.append(Note(text, "same-order-every-epoch", "drop-last-large", "overlapping-shards"))
    if story.training is not None and (epochs := len(story.trained())) < 2:
        seen = f"{'1' if epochs else 'no'} whole epoch of the training data was seen"
        said.append(Note(f"{seen}: what shows only between two was not judged", *BETWEEN_EPOCHS))
    if not story.one_optimizer:
        said.append(Note("several optimizers step: the weights of samples in a gradient were not judged", *WEIGHTS))
    elif all(gradient.weights(update) is None for update in gradient.windows(case)):
        text = "no loss of torch.nn.functional was seen: the weights of samples in a gradient were not judged"
        said.append(Note(text, *WEIGHTS))
    if rates.scheduler is not None and story.planned is None:
        text = "the loop does not say how many epochs it plans: where its schedule leads was not judged"
        said.append(Note(text, *TO_THE_END))
    idle = schedule.idle_scheduler(case)
    if idle is not None and schedule.steps_later(case, idle):
        text = f"{idle.name} was not stepped in 2 epochs; the loop steps it later, which was not judged"
        said.append(Note(text, "scheduler-never-steps", *TO_THE_END))
    if parted := processes.unequal_parameters(case)[1]:
        text = "their gradients differ between processes, which is meant for experts and shards, and they look so"
        unseen = {processes.communicated(updates) is None for updates in processes.together(case)} == {True}
        rest = "; by what their sum is divided was not judged" if unseen else ""
        said.append(Note(f"{processes.listed(parted)}: {text}{rest}", "gradients-not-averaged", *SUMS * unseen))
    if any(story.tape.full for story in case.stories):
        said.append(Note("more happened than is kept: what came after the first events was not judged", *PITFALLS))
    return said


def not_silenced(findings: Sequence[Finding]) -> list[Finding]:
    """The findings whose line, or the line above it, has no comment that names them; one without ids silences all."""
    return [finding for finding in findings if not _silenced(finding)]


def _silenced(finding: Finding) -> bool:
    file, _, line = (finding.where or "").rpartition(":")
    if not line.isdigit():
        return False
    linecache.checkcache(file)
    above = linecache.getline(file, int(line) - 1).strip()
    texts = [linecache.getline(file, int(line)), above if above.startswith("#") else ""]
    comments = [match for text in texts if (match := _COMMENT.search(text))]
    return any(match[1] is None or finding.pitfall in map(str.strip, match[1].split(",")) for match in comments)
