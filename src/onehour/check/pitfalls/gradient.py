"""The gradient of an update: one for each (§2.1, eq 2), and in it the weight 1/kn for each sample (§3, Remark 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.finding import Finding, pitfall
from onehour.check.story import MicroBatch, Story, Update, alike, first_of, is_mean, losses, ratio
from onehour.check.tape import BackwardPass, LossTerm, OptimizerStep

EXACT = 1e-3

WEIGHT = "a gradient is the mean over all kn samples, each with the weight 1/kn"


@pitfall(
    "error",
    "§3, Remark 3",
    why=WEIGHT,
    remedy="divide the loss by the number of batches that an update accumulates",
    write=("(loss / {a}).backward()",),
)
def accumulation_not_divided(case: Case) -> Finding | None:
    """Batches gathered as if each were the whole minibatch: a times too large."""
    for update in windows(case):
        gathered, c = update.microbatches, factor(update)
        a = len(gathered)
        if a < 2 or a != case.story.window or not _alike(gathered):
            continue
        means = [[c * term.total for term in loss] for loss in losses(gathered) if is_mean(loss)]
        if first_of((1, 1 / a), means) == 1:
            return accumulation_not_divided.found(
                measured=f"{a} batches an update, each with the weight 1: the gradient is {a} times the mean",
                expected=f"each with the weight 1/{a}",
                where=_backward_line(gathered),
                a=a,
            )
    return None


@pitfall(
    "warning",
    "§3, Remark 3",
    why=WEIGHT,
    remedy="take the last, shorter window too, and divide it by its own count of samples",
    write=(
        "gathered = min({a}, len(loader) - (i - i % {a}))",
        "(loss / gathered).backward()",
        "if (i + 1) % {a} == 0 or i + 1 == len(loader): optimizer.step(); optimizer.zero_grad()",
    ),
)
def accumulation_tail(case: Case) -> Finding | None:
    """A last window that is thrown away, goes into the next epoch's first one, or is divided by the usual count."""
    story = case.story
    a = story.window
    if a < 2 or not story.one_optimizer or story.training is None:
        return None
    unsure = {end.epoch for end in story.ends(story.training) if end.cut and not end.followed}
    # What was cleared lies in steps that were skipped, as a GradScaler does, or is thrown away, which comes below.
    whole = (update for update in windows(case) if not _clears(story, update))
    known = [update for update in whole if all(micro.terms for micro in update.microbatches)]
    full = [update for update in known if len(update.microbatches) == a and _alike(update.microbatches)]

    def found(measured: str, gathered: list[MicroBatch]) -> Finding:
        expected = "every sample in one update, all updates with the weight 1"
        return accumulation_tail.found(measured=measured, expected=expected, where=_backward_line(gathered), a=a)

    # Without the division a window's weight is that of its batches; the division is what is missing.
    for update in () if accumulation_not_divided(case) else known:
        epochs = {micro.epoch for micro in update.microbatches}
        if len(update.microbatches) == a or epochs & unsure:
            continue
        share = _share(update, full)
        if share is None or abs(share - 1) < 0.02:
            continue
        what = f"an update of {len(update.microbatches)} batches"
        return found(f"{what} has the weight {share:.3g} in all", update.microbatches)
    for update in windows(case):
        lost = _lost(story, update)
        if lost and not {micro.epoch for micro in lost} & unsure:
            return found(f"the gradients of {len(lost)} batches at the end of the epoch are thrown away", lost)
    return None


@pitfall(
    "warning",
    "§3, Remark 3",
    why=WEIGHT,
    remedy="sum the losses and divide by the count of the whole minibatch, not each part by its own",
    write=(
        'total = F.cross_entropy(output, target, reduction="sum")',
        "loss = onehour.global_mean(total, {kn})",
        "loss = total / {kn}  # without onehour",
    ),
)
def gradient_mean_of_unequal(case: Case) -> Finding | None:
    """Means over unequal counts, averaged as if the counts were equal."""
    worst, finding = 1.01, None
    for parts in _gathered(case):
        all_losses = losses([micro for part in parts for micro in part])
        loss = all_losses[-1] if all_losses else []
        terms = iter(loss)
        # Each batch divided by its own count, or each process by that of all its batches.
        for each in ([[term] for term in loss], [[next(terms) for _ in part] for part in parts if loss]):
            (light, many), (heavy, few) = _means(each)
            if heavy > worst * light:
                worst = heavy / light
                finding = gradient_mean_of_unequal.found(
                    measured=f"a sample of a batch of {few:g} weighs {worst:.3g} times one of a batch of {many:g}",
                    expected="equal weights 1/kn",
                    where=loss_line(parts[-1][-1]),
                    kn="count",  # it differs from update to update
                )
    return finding


@pitfall(
    "error",
    "§2.1, eq 2",
    why="one update takes one gradient once",
    remedy="with a GradScaler call scaler.step(optimizer) alone; remove the second optimizer.step()",
    write=("scaler.step(optimizer)  # the only step", "scaler.update()"),
)
def double_step(case: Case) -> Finding | None:
    """Two steps of one optimizer on one gradient."""
    seen: dict[int, OptimizerStep] = {}
    twice, where = 0, None
    for event in case.story.tape.events:
        if isinstance(event, BackwardPass):
            seen.clear()
        elif isinstance(event, OptimizerStep):
            moved = any(event.moved) if event.moved is not None else twice > 0  # later ones are counted by the pattern
            before = seen.get(event.optimizer)
            if before is not None and not event.closure and moved and not _replaced(before, event):
                twice, where = twice + 1, event.where or where
            seen[event.optimizer] = event
    if twice < 2:
        return None
    updates = len(case.story.steps)
    return double_step.found(
        measured=f"{updates} steps on {updates - twice} gradients",
        expected="one step for each gradient",
        where=where,
    )


def _replaced(before: OptimizerStep, step: OptimizerStep) -> bool:
    """Whether another gradient lies there at a step: torch.autograd.grad and torch.func put it there themselves."""
    final = step.final
    return bool(final) and any(final) and before.left is not None and final != before.left


@pitfall(
    "error",
    "§2.1, eq 2",
    why="an update takes the gradient of its own minibatch alone",
    remedy="call optimizer.zero_grad() before each minibatch's first backward()",
    write=("optimizer.zero_grad()  # before the first backward() of each minibatch",),
)
def step_without_zero_grad(case: Case) -> Finding | None:
    """The gradient of the update before, in that of the next one."""
    left: dict[str, list[float]] = {}
    lying: dict[str, list[list[float]]] = {}
    kept: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    where: dict[str, str | None] = {}
    for event in case.story.tape.events:
        if isinstance(event, BackwardPass):
            for name, gradients in event.before.items():
                if any(event.local.get(name, gradients)):  # other optimizers' passes say nothing of it
                    lying.setdefault(name, []).append(gradients)
        elif isinstance(event, OptimizerStep):
            name = str(event.optimizer)
            kept[name] += _kept(left.pop(name, []), lying.pop(name, []))
            if event.left is not None:
                left[name] = event.left
                steps[name] += 1
                where[name] = event.where or where.get(name)
    for name, count in kept.most_common():
        if count >= 2 and 2 * count >= steps[name] - 1:  # some are cleared at every fourth update
            return step_without_zero_grad.found(
                measured=f"after {count} of {steps[name]} steps the old gradient was still there when the next was"
                " added",
                expected="cleared gradients before each minibatch",
                where=where[name],
            )
    return None


def _kept(left: list[float], lying: list[list[float]]) -> bool:
    """Whether a step's gradient was there as its next window began, perhaps clipped, and was not cleared within it."""
    c, rest = ratio(lying[0], left) if lying else (0.0, 1.0)
    return c > 0 and rest < EXACT and all(map(any, lying))


@pitfall(
    "warning",
    "§2.1, eq 2",
    why="a gradient that no update takes trains nothing",
    remedy="give the optimizer every parameter that should learn, and requires_grad_(False) to the others",
    write=(
        "groups = onehour.parameter_groups(model, weight_decay={decay:g})  # of the whole model",
        "groups = [p for p in model.parameters() if p.requires_grad]  # without onehour",
    ),
)
def unused_gradients(case: Case) -> Finding | None:
    """Gradients for parameters that no optimizer has, cleared before the step, or an optimizer that gets none."""
    story = case.story
    decay = story.main_optimizer.weight_decay if story.main_optimizer else 0.0
    for model in story.models:
        if model.unused and story.updates:
            names = ", ".join(model.unused[:3]) + (" …" if len(model.unused) > 3 else "")
            return unused_gradients.found(
                measured=f"{len(model.unused)} of {model.parameters} trainable parameters get gradients and are in"
                f" no optimizer: {names}",
                expected="all of them",
                where=case.optimizer_line(),
                decay=decay,
            )
    main = [update for update in story.steps if update.step.final is not None]
    if len(main) < 2:
        return None
    name = str(story.main)
    cleared = [
        update
        for update in main
        if not any(update.step.final or [])
        and any(any(micro.backward.local.get(name, [])) for micro in update.microbatches)
    ]
    if len(cleared) == len(main):
        return unused_gradients.found(
            measured="the gradients are zero when the optimizer steps: cleared after backward()",
            expected="zero_grad() before backward(), or after step()",
            where=case.step_line(),
            remedy="call optimizer.zero_grad() before the backward pass, not between it and the step",
            write=("optimizer.zero_grad()", "loss.backward()", "optimizer.step()"),
        )
    if all(update.step.with_gradient == 0 for update in main) and any(update.microbatches for update in main):
        return unused_gradients.found(
            measured=f"none of the optimizer's {main[0].step.parameters} parameters has a gradient",
            expected="all of them",
            where=case.optimizer_line(),
            remedy="make the optimizer from the parameters of the model that is trained, after it was made or copied",
            decay=decay,
        )
    return None


def factor(update: Update) -> float:
    """By what the gradient was multiplied between the backward passes and the step, clipping left out: 1, or 1/a.

    A GradScaler's scale is taken out.
    """
    local, scales = update.local, {micro.backward.scale for micro in update.microbatches}
    if not update.step.final or local is None or len(scales) > 1:
        return 1.0
    c, rest = ratio(update.step.final, local)
    return c * scales.pop() if rest < EXACT and c else 1.0


def windows(case: Case) -> Iterator[Update]:
    """The updates whose samples' weights are known, of a loop with one optimizer."""
    if case.story.one_optimizer:
        yield from (update for update in case.story.updates if update.microbatches)


def weights(update: Update) -> list[float] | None:
    """Σ of the samples' weights of each batch that an update gathered; None where one is not known."""
    known = [micro.weight for micro in update.microbatches]
    c = factor(update)
    return None if None in known else [c * weight for weight in known if weight is not None]


def _alike(gathered: list[MicroBatch]) -> bool:
    """Whether batches are parts of one minibatch: of one loader, through one loss. A batch of each task is not."""
    losses = {(micro.term.name, micro.term.where) for micro in gathered if micro.term}
    return len({micro.loader for micro in gathered}) <= 1 and len(losses) <= 1


def _gathered(case: Case) -> Iterator[list[list[MicroBatch]]]:
    """What an update takes, by process."""
    if all(story.one_optimizer for story in case.stories):
        for updates in zip(*[story.updates for story in case.stories], strict=False):
            if all(update.microbatches and _alike(update.microbatches) for update in updates):
                yield [_taken(story, update) for story, update in zip(case.stories, updates, strict=True)]


def _share(update: Update, full: list[Update]) -> float | None:
    """An update's weight, in that of a full window; None where no loss weighs the same in all full windows."""
    updates, summed = [*full, update], None
    for loss in losses([micro for each in updates for micro in each.microbatches]):
        terms = iter(loss)
        *whole, own = ([factor(each) * next(terms).total for _ in each.microbatches] for each in updates)
        sums = [math.fsum(each) for each in whole]
        if sums and min(sums) > 0 and alike(sums):
            share = math.fsum(own) / sums[0]
            if all(alike(each) for each in whole):
                return share
            # Batches of different counts may differ, and their windows not; one window says nothing.
            summed = share if summed is None and len(sums) > 1 else summed
    return summed


def _means(parts: list[list[LossTerm]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The weight of a sample and the count where it is least and where it is largest, of means over their own counts.

    Both zero where parts are no such means: weights of different kinds are another thing than unequal counts.
    """
    terms = [term for part in parts for term in part]
    known = all(term.count and term.low > 0 and term.reduction != "none" for term in terms)
    if len(parts) < 2 or not known or not all(alike([term.low for term in part]) for part in parts):
        return (0.0, 0.0), (0.0, 0.0)
    counts = [math.fsum(term.count or 0 for term in part) for part in parts]
    totals = [math.fsum(term.total for term in part) for part in parts]
    each = [(total / count, count) for total, count in zip(totals, counts, strict=True)]
    return (min(each), max(each)) if alike(totals, 0.01) else ((0.0, 0.0), (0.0, 0.0))


def _clears(story: Story, update: Update) -> list[int]:
    """Before which of an update's batches the gradients that lay there were cleared, so that no step takes them."""
    later = [micro.backward.before.get(str(update.optimizer)) for micro in update.microbatches[1:]]
    # Where none ever lies there, as in `fully_shard` without its reduction, it is kept elsewhere.
    kept = story.window == 1 or any(any(lying) for lying in later if lying)
    return [at for at, lying in enumerate(later, 1) if kept and lying is not None and not any(lying)]


def _taken(story: Story, update: Update) -> list[MicroBatch]:
    return update.microbatches[max(_clears(story, update), default=0) :]


def _lost(story: Story, update: Update) -> list[MicroBatch]:
    """Batches at the end of an epoch whose gradients were cleared before the next one's, without the step for them."""
    gathered, clears = update.microbatches, _clears(story, update)
    own = [micro.backward.local.get(str(update.optimizer)) for micro in gathered]
    for first, at in reversed(list(zip([0, *clears], clears, strict=False))):
        # A step is skipped after a whole window, or where a gradient is not finite, which projections have as zeros.
        finite = all(numbers is None or any(numbers) for numbers in own[:at])
        if gathered[at - 1].epoch != gathered[at].epoch and at - first < story.window and finite:
            return gathered[first:at]
    return []


def _backward_line(gathered: list[MicroBatch]) -> str | None:
    micro = gathered[-1]
    return micro.backward.where if micro.backward.direct else loss_line(micro)


def loss_line(micro: MicroBatch) -> str | None:
    """Where a batch's loss is computed, or else where its backward pass is called."""
    return (micro.term.where if micro.term else None) or micro.backward.where
