"""Every pitfall by its id: how bad, where in the paper, why, and what to do."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PITFALLS", "About"]


class About(NamedTuple):
    """What is known of a pitfall before any loop was seen.

    Args:
        severity: "error", "warning" or "note".
        section: of the paper.
        why: the rule that is broken, in a line.
        remedy: what to change.
        write: at most three lines to write instead, with onehour's rule and without; {names} stand for what a finding
            has measured.

    >>> PITFALLS["double-step"].severity
    'error'
    """

    severity: str
    section: str
    why: str
    remedy: str
    write: tuple[str, ...]


_RATE = "set it to base_lr · kn / base_minibatch (onehour.linear_scaling)"
_KN = "a gradient is the mean over all kn samples, each with the weight 1/kn"
_SHUFFLE = "one permutation of all samples an epoch, divided among the workers"

_SCALED = (
    "lr = onehour.linear_scaling({lr:g}, {base}, {kn})",
    "lr = {lr:g} * {kn} / {base}  # without onehour",
)
_WARMUP = (
    "schedule = onehour.gradual_warmup(schedule, start_lr={start:g}, epochs=5)",
    "scheduler = onehour.ScheduleLR(optimizer, schedule, samples={samples}, minibatch={kn})",
    "warmup = LinearLR(optimizer, {start:g} / {target:g}, total_iters={steps})  # without onehour, at every update",
)
_DIVIDED = (
    "minibatch = onehour.Minibatch(per_worker={n}, workers={p})",
    "sampler = onehour.StreamBatchSampler({samples}, minibatch, seed=0, epochs=epochs)",
    "loader = DataLoader(data, batch_sampler=sampler)",
)
_AVERAGED = (
    "for name, buffer in model.named_buffers():  # before evaluating and saving",
    '    if name.endswith(("running_mean", "running_var")):',
    "        torch.distributed.all_reduce(buffer); buffer /= {p}",
)

PITFALLS: dict[str, About] = {
    "lr-not-scaled": About(
        "error",
        "§2.1",
        "the rate belongs to its minibatch: k times the minibatch, k times the rate",
        _RATE,
        _SCALED,
    ),
    "lr-scaled-wrong": About(
        "error",
        "§2.1",
        "the rate belongs to its minibatch: k times the minibatch, k times the rate",
        _RATE,
        _SCALED,
    ),
    "adam-linear-scaling": About(
        "warning",
        "§2.1",
        "the linear rule's argument needs steps that grow with the gradient; this optimizer divides by its size",
        "tune the rate for this minibatch, or start from base_lr · √(kn / base_minibatch) (onehour.sqrt_scaling)",
        (
            "lr = onehour.sqrt_scaling({lr:g}, {base}, {kn})  # where to start tuning",
            "lr = {lr:g} * ({kn} / {base}) ** 0.5  # without onehour",
        ),
    ),
    "no-warmup": About(
        "warning",
        "§2.2",
        "a rate far above the base's fails early in training, when weights change fast",
        "grow the rate from the base's at every iteration of the first 5 epochs (onehour.gradual_warmup)",
        _WARMUP,
    ),
    "warmup-per-epoch": About(
        "warning",
        "§2.2",
        "the warmup adds a constant amount at every iteration, so that the rate never jumps",
        "step the warmup after every optimizer.step(), with its length in iterations",
        _WARMUP,
    ),
    "warmup-start": About(
        "note",
        "§2.2",
        "the warmup starts at the base's own rate, which is right for the base's minibatch",
        "start the warmup at the base rate",
        _WARMUP,
    ),
    "scheduler-steps-k-times": About(
        "error",
        "§2.1, §5.1",
        "a schedule is a function of the epoch: it must not end k times too early",
        "call scheduler.step() once after each optimizer.step(), or plan the schedule in the steps that it takes",
        ("optimizer.step()", "scheduler.step()  # only here: {steps} steps in the run"),
    ),
    "scheduler-too-slow": About(
        "error",
        "§2.1, §5.1",
        "a schedule is a function of the epoch: planned in iterations, it must be stepped at each",
        "call scheduler.step() after every optimizer.step()",
        ("optimizer.step()", "scheduler.step()  # in the loop over batches: {steps} steps in the run"),
    ),
    "scheduler-never-steps": About(
        "error",
        "§5.1",
        "the rate must fall as training goes on",
        "call scheduler.step(), or remove the scheduler",
        ("scheduler.step()  # after every optimizer.step(), or at the end of every epoch",),
    ),
    "lr-collapses": About(
        "error",
        "§5.1",
        "the rate of the whole run decides what is learned, not that of its first epochs",
        "give the schedule the length of the run, in the unit in which it is stepped",
        (
            "scheduler = CosineAnnealingLR(optimizer, T_max={epochs})  # stepped once an epoch",
            "scheduler = CosineAnnealingLR(optimizer, T_max={steps})  # stepped at every update",
        ),
    ),
    "momentum-inside-uncorrected": About(
        "error",
        "§3, Remark 2",
        "a velocity that holds the rate must be scaled with it: v′ = m·(η′/η)·v + η′·g",
        "set the rate with onehour.correct_momentum, or use torch.optim.SGD, which keeps the rate outside",
        (
            "onehour.correct_momentum(optimizer, lr={rate:g})",
            "velocity.mul_({rate:g} / {before:g})  # without onehour, as the rate changes",
        ),
    ),
    "momentum-outside-corrected": About(
        "error",
        "§3, Remark 2",
        "a velocity that does not hold the rate must stay when the rate changes: u′ = m·u + g",
        "remove the correction: this optimizer multiplies by the rate outside its velocity",
        (
            "onehour.correct_momentum(optimizer, lr={rate:g})  # scales only a velocity that holds the rate",
            'group["lr"] = {rate:g}  # without onehour: nothing else changes',
        ),
    ),
    "gradient-sum-not-mean": About(
        "error",
        "§3, Remark 3",
        _KN,
        "divide the loss by kn before backward, or the sum over processes by their count",
        (
            'loss = onehour.global_mean(F.cross_entropy(output, target, reduction="sum"), {kn})  # then sum gradients',
            "p.grad /= {p}  # without onehour, after the all_reduce",
        ),
    ),
    "gradient-mean-of-unequal": About(
        "warning",
        "§3, Remark 3",
        _KN,
        "sum the losses and divide by the count of the whole minibatch, not each part by its own",
        (
            'total = F.cross_entropy(output, target, reduction="sum")',
            "loss = onehour.global_mean(total, {kn})",
            "loss = total / {kn}  # without onehour",
        ),
    ),
    "accumulation-tail": About(
        "warning",
        "§3, Remark 3",
        _KN,
        "take the last, shorter window too, and divide it by its own count of samples",
        (
            "gathered = min({a}, len(loader) - (i - i % {a}))",
            "(loss / gathered).backward()",
            "if (i + 1) % {a} == 0 or i + 1 == len(loader): optimizer.step(); optimizer.zero_grad()",
        ),
    ),
    "accumulation-not-divided": About(
        "error",
        "§3, Remark 3",
        _KN,
        "divide the loss by the number of batches that an update gathers",
        ("(loss / {a}).backward()",),
    ),
    "loss-scaled-by-world-size": About(
        "error",
        "§3, Remark 3",
        _KN,
        "do not multiply the loss by the world size: scale the rate instead",
        ("loss.backward()  # the mean, without the factor {p}", "lr = {p} * lr  # if the rate was for 1 process"),
    ),
    "double-step": About(
        "error",
        "§2.1, eq 2",
        "one update takes one gradient once",
        "with a GradScaler call scaler.step(optimizer) alone; remove the second optimizer.step()",
        ("scaler.step(optimizer)  # the only step", "scaler.update()"),
    ),
    "step-without-zero-grad": About(
        "error",
        "§2.1, eq 2",
        "an update takes the gradient of its own minibatch alone",
        "call optimizer.zero_grad() before each minibatch's first backward()",
        ("optimizer.zero_grad()  # before the first backward() of each minibatch",),
    ),
    "unused-gradients": About(
        "warning",
        "§2.1, eq 2",
        "a gradient that no update takes trains nothing",
        "give the optimizer every parameter that should learn, and requires_grad_(False) to the others",
        (
            "groups = onehour.parameter_groups(model, weight_decay={decay:g})  # of the whole model",
            "groups = [p for p in model.parameters() if p.requires_grad]  # without onehour",
        ),
    ),
    "decay-on-batchnorm": About(
        "warning",
        "§5.1",
        "no weight decay on BatchNorm's γ and β",
        "give them a group of their own with weight_decay 0 (onehour.parameter_groups)",
        (
            "groups = onehour.parameter_groups(model, weight_decay={decay:g})",
            "rest = [p for p in model.parameters() if p.ndim < 2]  # without onehour, and the others alike",
            'groups = [{{"params": others, "weight_decay": {decay:g}}}, {{"params": rest, "weight_decay": 0}}]',
        ),
    ),
    "decay-in-loss": About(
        "warning",
        "§3, Remark 1, eq 8",
        "weight decay belongs to the update, so that it follows the rate and not the loss",
        "remove the penalty from the loss and give the optimizer weight_decay",
        (
            "groups = onehour.parameter_groups(model, weight_decay={decay:.3g})",
            "optimizer = torch.optim.SGD(groups, lr=lr)",
            "optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay={decay:.3g})  # without onehour",
        ),
    ),
    "decay-scaled-with-loss": About(
        "error",
        "§3, Remark 1, eq 8",
        "scaling the loss is not scaling the rate: the decay does not follow",
        "leave the loss a mean over the minibatch and scale the rate",
        ("loss.backward()  # the mean, without the factor {factor:.4g}", "lr = {factor:.4g} * lr"),
    ),
    "decay-decoupled-scales-with-lr": About(
        "warning",
        "§3, Remark 1, eq 8",
        "decay an epoch must stay when the minibatch grows; a decay that knows only η/η₀ takes k times fewer steps",
        "multiply weight_decay by kn / base_minibatch, or use an optimizer whose decay is η·λ",
        ("weight_decay = {k:g} * weight_decay  # of the base recipe",),
    ),
    "same-order-every-epoch": About(
        "warning",
        "§3, Remark 4",
        "each epoch has a random permutation of its own",
        "shuffle: shuffle=True, or sampler.set_epoch(epoch) before each epoch",
        (
            "loader = DataLoader(data, batch_size={batch}, shuffle=True)",
            "sampler.set_epoch(epoch)  # with a DistributedSampler, before each epoch",
        ),
    ),
    "overlapping-shards": About(
        "error",
        "§3, Remark 4",
        _SHUFFLE,
        "use a DistributedSampler with one seed for all, or onehour.StreamBatchSampler",
        _DIVIDED,
    ),
    "shuffle-within-shard": About(
        "warning",
        "§3, Remark 4",
        _SHUFFLE,
        "shuffle all samples with one seed first, then take every k-th",
        _DIVIDED,
    ),
    "padded-training-data": About(
        "note",
        "§3, Remark 4",
        "nothing is repeated to make the workers' shares equal",
        "use onehour.StreamBatchSampler, which straddles epochs in place of padding",
        _DIVIDED,
    ),
    "drop-last-large": About(
        "warning",
        "§3, Remark 4",
        "an epoch is all samples: a large minibatch must not drop a large rest",
        "use a minibatch that divides the samples, drop_last=False, or onehour.StreamBatchSampler",
        _DIVIDED,
    ),
    "padded-evaluation": About(
        "warning",
        "§5.1",
        "the error is a count over the validation samples, each once",
        "evaluate the samples range(rank, N, world_size), and sum the counts over processes",
        (
            "share = Subset(validation, range(rank, {samples}, {p}))",
            "torch.distributed.all_reduce(correct)",
            "error = 1 - correct / {samples}",
        ),
    ),
    "dropped-evaluation": About(
        "warning",
        "§5.1",
        "the error is a count over the validation samples, each once",
        "leave drop_last out of the validation loader",
        ("loader = DataLoader(validation, batch_size={batch})  # without drop_last",),
    ),
    "mean-of-rates-evaluation": About(
        "warning",
        "§5.1",
        "the error is a count over the validation samples, each once",
        "sum the correct predictions and divide once by the number of samples",
        (
            "correct += (output.argmax(1) == target).sum().item()",
            "accuracy = correct / {samples}  # once, after all batches",
        ),
    ),
    "batchnorm-synced": About(
        "warning",
        "§2.3",
        "statistics are of n samples of one worker; over all workers they are another loss",
        "leave BatchNorm local: remove convert_sync_batchnorm",
        ("model = onehour.convert_batchnorm(model, per_worker={n})  # instead of convert_sync_batchnorm",),
    ),
    "batchnorm-n-changed": About(
        "warning",
        "§2.3",
        "n, the samples that BatchNorm normalises over, is part of the loss and stays when k changes",
        "keep n: onehour.convert_batchnorm(model, per_worker=n), or another batch size for each process",
        (
            "model = onehour.convert_batchnorm(model, per_worker={n})",
            "loader = DataLoader(data, batch_size={n})  # without onehour, on each process",
        ),
    ),
    "batchnorm-stats-of-rank-0": About(
        "warning",
        "§2.3",
        "running statistics estimate the training data; one worker's see 1/k of it",
        "average the running statistics over the processes before evaluating and saving (broadcast_buffers=False)",
        _AVERAGED,
    ),
    "batchnorm-stats-diverge": About(
        "error",
        "§2.3",
        "the model that is evaluated must be the model that is saved",
        "average the running statistics over the processes before evaluating and saving",
        _AVERAGED,
    ),
    "same-augmentation-on-every-worker": About(
        "warning",
        "§3, Remark 4",
        "kn samples are kn independent draws, their augmentation too",
        "seed each process with seed + rank after the weights are made",
        ("torch.manual_seed(seed + rank)  # once the model is made",),
    ),
    "different-initial-weights": About(
        "error",
        "§3",
        "k workers compute the gradient of one model",
        "broadcast the initial weights from process 0 (DistributedDataParallel does)",
        (
            "for tensor in [*model.parameters(), *model.buffers()]:",
            "    torch.distributed.broadcast(tensor.data, src=0)",
        ),
    ),
}
