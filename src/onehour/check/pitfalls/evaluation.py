"""Evaluations (§5.1): every validation sample once, and a count divided once, not a mean of rates."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.pitfalls.samples import Shares
from onehour.check.tape import EpochEnded, MetricsGathered, ValueSeen

COUNT = "the error is a count over the validation samples, each once"


@pitfall(
    "warning",
    "§5.1",
    why=COUNT,
    remedy="evaluate the samples range(rank, N, world_size), and sum the counts over processes",
    write=(
        "share = Subset(validation, range(rank, {samples}, {p}))",
        "torch.distributed.all_reduce(correct)",
        "error = 1 - correct / {samples}",
    ),
)
def padded_evaluation(case: Case) -> Finding | None:
    """Validation samples counted twice, to make the processes' shares equal."""
    for shares in _evaluated(case):
        whole = all(len(order) == shares.samples for order in shares.taken)
        repeated = shares.total - shares.different
        gathered = any(case.story.tape.of(MetricsGathered))  # which leaves the repetitions out
        if not whole and repeated and not gathered:
            return padded_evaluation.found(
                measured=f"{shares.total} samples are evaluated, {repeated} of them twice ({shares.loader.sampler})",
                expected=f"{shares.samples} samples, each once",
                where=shares.loader.where,
                **shares.divided,
            )
    return None


@pitfall(
    "warning",
    "§5.1",
    why=COUNT,
    remedy="leave drop_last out of the validation loader",
    write=("loader = DataLoader(validation, batch_size={batch})  # without drop_last",),
)
def dropped_evaluation(case: Case) -> Finding | None:
    """Validation samples that are left out."""
    for shares in _evaluated(case):
        missing = (shares.samples or 0) - shares.different
        batch = shares.loader.batch_size or 1
        if shares.loader.drop_last and 0 < missing < batch * case.processes + case.processes:
            return dropped_evaluation.found(
                measured=f"{shares.different} of {shares.samples} validation samples are evaluated (drop_last)",
                expected="all, each once",
                where=shares.loader.where,
                batch=batch,
            )
    return None


def _evaluated(case: Case) -> list[Shares]:
    """Of the loaders that never train anything, and are evaluated on every process that is here."""
    story = case.story
    trained = {micro.loader for update in story.updates for micro in update.microbatches}
    trained |= {event.loader for event in story.tape.of(EpochEnded) if event.trained}
    evaluated = {event.loader for event in story.tape.of(EpochEnded)}
    shares = [Shares(case, loader) for loader in sorted(evaluated - trained) if loader in story.loaders]
    return [share for share in shares if share.known and share.one and share.samples]


@pitfall(
    "warning",
    "§5.1",
    why=COUNT,
    remedy="sum the correct predictions and divide once by the number of samples",
    write=(
        "correct += (output.argmax(1) == target).sum().item()",
        "accuracy = correct / {samples}  # once, after all batches",
    ),
)
def mean_of_rates_evaluation(case: Case) -> Finding | None:
    """A variable of the loop that is the mean of the batches' rates, where the last batch is smaller."""
    everyone = [[event for event in story.tape.of(EpochEnded) if not event.trained] for story in case.stories]
    for each in zip(*everyone, strict=False):
        shares = [[sum(column) for column in zip(*one.counts, strict=True)] for one in each]
        finding = (
            _mean_of(case, each[0], [share for share in shares if share], "processes'")
            or _mean_of(case, each[0], [pair for pair in each[0].counts if pair[1]], "batches'")
            or _mean_of_losses(case, each[0])
        )
        if finding is not None:
            return finding
    return None


def _mean_of(case: Case, evaluation: EpochEnded, counts: list[list[int]], what: str) -> Finding | None:
    """A value that is the mean of parts' rates, and of no right number."""
    sizes = [n for _, n in counts]
    if len({*sizes}) < 2:
        return None
    pairs = _pairs(counts, evaluation)
    # A part's own rate may be their mean by chance.
    known = [right for parts in (counts, *([part] for part in counts)) for right, *_ in _pairs(parts, evaluation)]
    for seen in _made_of(case, evaluation):
        if any(_near(seen.value, number) for number in known):
            continue
        for right, wrong, count, samples in pairs:
            if _near(seen.value, wrong):
                return mean_of_rates_evaluation.found(
                    measured=f"{_named(seen)}{seen.value:.6g} is the mean of the {what} rates; one of"
                    f" {min(sizes)} samples weighs as much as one of {max(sizes)}",
                    expected=f"{right:.6g}, of {count} in {samples} on what was evaluated here",
                    where=seen.where,
                    samples=samples,
                )
    return None


def _mean_of_losses(case: Case, evaluation: EpochEnded) -> Finding | None:
    counts = [count for _, count in evaluation.losses]
    if len({*counts}) < 2:
        return None
    right = math.fsum(value * count for value, count in evaluation.losses) / math.fsum(counts)
    total = math.fsum(value for value, _ in evaluation.losses)
    means = [total / parts for parts in (len(counts), evaluation.batches) if parts]
    for seen in _made_of(case, evaluation):
        if not _near(seen.value, right) and any(_near(seen.value, mean) for mean in means):
            return mean_of_rates_evaluation.found(
                measured=f"{_named(seen)}{seen.value:.6g} is the mean of the batches' mean losses; one over"
                f" {min(counts):g} values weighs as much as one over {max(counts):g}",
                expected=f"{right:.6g}, each sample once, on what was evaluated here",
                where=seen.where,
                remedy="multiply each batch's mean by its samples, and divide the sum once by the number of all",
                write=("total += loss.item() * len(target)", "loss = total / {samples}  # once, after all batches"),
                samples=evaluation.samples or "samples",
            )
    return None


def _made_of(case: Case, evaluation: EpochEnded) -> Iterator[ValueSeen]:
    values = case.story.tape.of(ValueSeen)
    return (seen for seen in values if (seen.loader, seen.epoch) == (evaluation.loader, evaluation.epoch))


def _named(seen: ValueSeen) -> str:
    name = seen.name.rpartition(":")[2].removesuffix(" 0")
    return "" if name.startswith("line ") else f"{name}: "


def _pairs(counts: list[list[int]], evaluation: EpochEnded) -> list[tuple[float, float, int, int]]:
    """What the loop comes to if it is right, and if it is not, as a share or in percent; how many of how many.

    Of right answers or of wrong ones; of the samples and batches that were seen, or that there are where a pass is cut.
    """
    seen = sum(n for _, n in counts)
    pairs: list[tuple[float, float, int, int]] = []
    for hits in ([c for c, _ in counts], [n - c for c, n in counts]):
        rates = math.fsum(hit / n for hit, (_, n) in zip(hits, counts, strict=True))
        for samples, parts in (
            (seen, len(counts)),
            (evaluation.samples or seen, evaluation.batches or len(counts)),
        ):
            for unit in (1, 100):
                pairs.append((unit * sum(hits) / samples, unit * rates / parts, sum(hits), samples))
    return pairs


def _near(number: float, value: float) -> bool:
    return bool(value) and abs(number - value) < 2e-6 * abs(value)
