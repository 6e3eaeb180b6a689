"""Which findings have a mechanical remedy, and the edit of each."""

from __future__ import annotations

from collections.abc import Callable

from onehour.check.remedies import on_gradient, on_model, on_rate, on_samples, on_schedule
from onehour.check.remedies.fix import Fix

__all__ = ["EDITS"]

EDITS: dict[str, Callable[[Fix], None]] = {
    "accumulation-not-divided": on_gradient.divide_by_window,
    "accumulation-tail": on_gradient.divide_tail,
    "adam-linear-scaling": on_rate.scale_rate_by_root,
    "batchnorm-n-changed": on_model.keep_n,
    "batchnorm-stats-diverge": on_model.average_statistics,
    "batchnorm-stats-of-rank-0": on_model.keep_statistics,
    "batchnorm-synced": on_model.own_statistics,
    "decay-decoupled-scales-with-lr": on_rate.scale_decay,
    "decay-in-loss": on_model.decay_in_optimizer,
    "decay-on-batchnorm": on_model.parameter_groups,
    "decay-scaled-with-loss": on_model.decay_with_rate,
    "different-initial-weights": on_model.one_start,
    "double-step": on_gradient.one_step,
    "drop-last-large": on_samples.drop_nothing,
    "dropped-evaluation": on_samples.drop_nothing,
    "gradient-sum-not-mean": on_gradient.mean_of_processes,
    "loss-scaled-by-world-size": on_gradient.unscaled_loss,
    "lr-collapses": on_schedule.step_at_epochs,
    "lr-not-scaled": on_rate.scale_rate,
    "lr-scaled-wrong": on_rate.scale_rate,
    "momentum-outside-corrected": on_schedule.velocity_as_it_is,
    "no-warmup": on_rate.add_warmup,
    "overlapping-shards": on_samples.share_the_samples,
    "padded-evaluation": on_samples.every_sample_once,
    "same-augmentation-on-every-worker": on_samples.other_seeds,
    "same-order-every-epoch": on_samples.shuffle,
    "scheduler-never-steps": on_schedule.begin_scheduler,
    "scheduler-steps-k-times": on_schedule.step_at_updates,
    "scheduler-too-slow": on_schedule.step_at_updates,
    "shuffle-within-shard": on_samples.share_what_is_shuffled,
    "step-without-zero-grad": on_gradient.clear_gradients,
    "unused-gradients": on_gradient.clear_later,
    "warmup-per-epoch": on_rate.fractional_epoch,
    "warmup-start": on_rate.start_warmup,
}
