"""Large minibatches on many workers without losing accuracy: Goyal et al. 2017, exact.

Names load on first use, so that `onehour.plan` and `onehour --help` never wait for torch.
"""

from __future__ import annotations

TYPE_CHECKING = False
"""As typing's own, which takes as long to import as Python to start; a Ctrl-C at that moment is Python's alone."""

if TYPE_CHECKING:
    from onehour.api import sweep as sweep
    from onehour.api import train as train
    from onehour.config import Recipe as Recipe
    from onehour.data.dataset import KeyedDataset as KeyedDataset
    from onehour.planner import plan as plan
    from onehour.recipes import recipe as recipe
    from onehour.rules.adam import adam_scaling as adam_scaling
    from onehour.rules.aggregate import global_mean as global_mean
    from onehour.rules.batchnorm import GhostBatchNorm1d as GhostBatchNorm1d
    from onehour.rules.batchnorm import GhostBatchNorm2d as GhostBatchNorm2d
    from onehour.rules.batchnorm import GhostBatchNorm3d as GhostBatchNorm3d
    from onehour.rules.batchnorm import accumulate as accumulate
    from onehour.rules.batchnorm import convert_batchnorm as convert_batchnorm
    from onehour.rules.decay import parameter_groups as parameter_groups
    from onehour.rules.initialize import init_weights_ as init_weights_
    from onehour.rules.initialize import initialize as initialize
    from onehour.rules.initialize import last_batchnorms as last_batchnorms
    from onehour.rules.keys import seed_for as seed_for
    from onehour.rules.minibatch import Minibatch as Minibatch
    from onehour.rules.minibatch import fixed_scaling as fixed_scaling
    from onehour.rules.minibatch import linear_scaling as linear_scaling
    from onehour.rules.minibatch import sqrt_scaling as sqrt_scaling
    from onehour.rules.momentum import correct_momentum as correct_momentum
    from onehour.rules.momentum import momentum_form as momentum_form
    from onehour.rules.sampler import StreamBatchSampler as StreamBatchSampler
    from onehour.rules.sampler import StreamSampler as StreamSampler
    from onehour.rules.schedule import constant_warmup as constant_warmup
    from onehour.rules.schedule import cosine_decay as cosine_decay
    from onehour.rules.schedule import gradual_warmup as gradual_warmup
    from onehour.rules.schedule import scaled_step_schedule as scaled_step_schedule
    from onehour.rules.schedule import step_decay as step_decay
    from onehour.rules.scheduler import ScheduleLR as ScheduleLR
    from onehour.rules.shuffle import SampleStream as SampleStream
    from onehour.training.task import Sums as Sums

__version__ = "0.1.0"

_HOMES = {
    "api": ["sweep", "train"],
    "config": ["Recipe"],
    "data.dataset": ["KeyedDataset"],
    "planner": ["plan"],
    "recipes": ["recipe"],
    "rules.adam": ["adam_scaling"],
    "rules.aggregate": ["global_mean"],
    "rules.batchnorm": ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "accumulate", "convert_batchnorm"],
    "rules.decay": ["parameter_groups"],
    "rules.initialize": ["init_weights_", "initialize", "last_batchnorms"],
    "rules.keys": ["seed_for"],
    "rules.minibatch": ["Minibatch", "fixed_scaling", "linear_scaling", "sqrt_scaling"],
    "rules.momentum": ["correct_momentum", "momentum_form"],
    "rules.sampler": ["StreamBatchSampler", "StreamSampler"],
    "rules.schedule": ["constant_warmup", "cosine_decay", "gradual_warmup", "scaled_step_schedule", "step_decay"],
    "rules.scheduler": ["ScheduleLR"],
    "rules.shuffle": ["SampleStream"],
    "training.task": ["Sums"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_PARTS = ("check", "noise")
"""Packages and modules that come with the first use of their name."""

_UNLISTED = {"StreamSampler", "initialize", "GhostBatchNorm1d", "GhostBatchNorm3d"}
"""Neither listed nor imported by a star: two for one version more, and two that `convert_batchnorm` makes."""

__all__ = sorted({*_HOME_OF} - _UNLISTED)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    import importlib

    if name in _PARTS:
        return importlib.import_module(f"onehour.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'onehour' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"onehour.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
