"""Runs that differ by their seed as one network: model s owns the s-th share of every layer's channels.

Convolutions get S times the groups, BatchNorm S times the channels, linear layers become batched products; what stands
between them in the model's forward works channel by channel and need not know. That this is so is tried, not assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
from torch.utils.data import TensorDataset

from onehour.config import Recipe
from onehour.data.dataset import in_memory
from onehour.data.loader import CHUNK, Batch, Feed
from onehour.data.sources import Data
from onehour.dist.devices import build_of, deterministic
from onehour.dist.group import Group
from onehour.dist.watchdog import Stopping, Watchdog, never
from onehour.rules.shuffle import SampleStream
from onehour.training.build import OPTIMIZERS, build_model
from onehour.training.checkpoint import Progress, SaveInterval
from onehour.training.console import Console
from onehour.training.decisions import Decisions, decisions_of
from onehour.training.evaluate import Evaluator
from onehour.training.feeds import draws_numbers, workers_that_fit
from onehour.training.loop import Loop
from onehour.training.record import NonFiniteError
from onehour.training.recorder import RunFolder, environment
from onehour.training.state import Network, load_optimizer
from onehour.training.step import Step

SAVE_SECONDS = 10.0
"""Between checkpoints of several seeds at least, which are taken apart for each; counted at evaluations."""


def train_seeds(
    recipes: Sequence[Recipe],
    data: Data,
    folders: Sequence[Path],
    group: Group,
    *,
    stop_asked: Callable[[], bool] = never,
) -> None:
    """Train runs of one recipe and several seeds as one network; each writes its own folder, as if it ran alone.

    Those that stand at the same iteration go on together. A run that leaves the finite numbers has come to its end.

    Args:
        recipes: completed, alike but for the seed; `refuse_joining` has nothing against them.

    Raises:
        FolderLostError: if one was moved or removed; all are saved where they can be.
        StoppedError: when asked to stop; all are saved.
    """
    assert len({recipe.replace(seed=0) for recipe in recipes}) == 1
    with deterministic(recipes[0]), ExitStack() as stack:
        found: list[_Member] = []
        for recipe, folder in zip(recipes, folders, strict=True):
            console = Console(recipe, quiet=True, warns=f"{folder.name}: ")
            run = RunFolder(folder, recipe, group, console=console)
            stack.callback(run.close)
            model = build_model(recipe, data, group.device)
            part = Network(model, decisions_of(recipe).optimizer(model))
            progress = run.load(part, build_of(group.device))
            found.append(_Member(run, part, progress))
        watchdog = stack.enter_context(Watchdog(None, rank=0, size=1, timeout=None))
        stopping = Stopping(group, stop_asked)
        for _, alike in groupby(sorted(found, key=_Member.stands, reverse=True), key=_Member.stands):
            _train_together(list(alike), data, group, stopping, watchdog)


class _Member(NamedTuple):
    """One of the runs that train as one network, and where it stands."""

    run: RunFolder
    part: Network
    progress: Progress | None

    def stands(self) -> tuple[int, bool]:
        """At which iteration, and whether it was evaluated there."""
        return (0, True) if self.progress is None else (self.progress.iteration, self.progress.evaluated)


def _train_together(members: list[_Member], data: Data, group: Group, stopping: Stopping, watchdog: Watchdog) -> None:
    """Train runs that stand at the same iteration, to their ends."""
    runs, progress = [member.run for member in members], [member.progress for member in members]
    decisions, count = [decisions_of(run.recipe) for run in runs], len(runs)
    recipe = decisions[0].recipe
    parts = [member.part for member in members]
    seeds = Seeds(decisions[0], parts)
    per_pass = min(recipe.workers.workers, workers_that_fit(recipe, data, group.device.type, seeds=count))
    places = {"processes": 1, "workers_per_pass": per_pass, "loaders": 0, "device": group.device.type}
    places["seeds_together"] = count
    streams = [decision.stream() for decision in decisions]
    with ExitStack() as stack:
        feed = SeedsFeed(data.train, seeds=count, device=group.device, streams=streams)
        validation = SeedsFeed(data.validation, seeds=count, device=group.device)
        for each in (feed, validation):
            stack.callback(each.close)
        step = Step(decisions[0], seeds, per_pass=per_pass, group=group, draws=False)  # else they were refused
        stack.enter_context(step)
        for run, _, stood in members:
            run.begin(stood, partial(environment, places), together=count)
        evaluator = Evaluator(seeds, validation, recipe, data, group=group)
        with suppress(NonFiniteError):
            loop = Loop(decisions[0], step, feed, evaluator, runs, stopping, watchdog)
            loop.run(progress, SaveInterval(None, SAVE_SECONDS / 60, between=False))


class Seeds(Network):
    """The networks of S runs, which differ by their seed alone, as one.

    Args:
        parts: of each run; what they hold is taken over.
    """

    def __init__(self, decisions: Decisions, parts: Sequence[Network]) -> None:
        joined, self._parts = join_models([part.model for part in parts]), parts
        super().__init__(joined, decisions.optimizer(joined))
        kept = [part.state()[1] for part in parts]
        together = {name: [own[name] for own in kept] for name in kept[0]}
        state = {name: torch.cat(own) if own[0].ndim else own[0].clone() for name, own in together.items()}
        load_optimizer(self.optimizer, joined, state)

    @property
    def parts(self) -> Sequence[Network]:
        return self._parts

    def give_back(self) -> None:
        """Copy each run's share into its own network and optimizer; a count is the same for all."""
        divided = [{name: _shares(t, len(self.parts)) for name, t in state.items()} for state in self.state()]
        for seed, part in enumerate(self.parts):
            part.load(*({name: shares[seed] for name, shares in state.items()} for state in divided))

    @torch.no_grad()
    def alive(self, known: Tensor) -> Tensor:
        """As `Network.alive`: weights and statistics are looked at too, which tell what no loss has told."""
        divided = [tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if tensor.ndim]
        return torch.stack([known, *(t.reshape(len(self.parts), -1).isfinite().all(1) for t in divided)]).all(0)

    @torch.no_grad()
    def clear(self, seed: int) -> None:
        """Set everything of a seed to zero, so that the others cannot meet what is not finite."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        for tensor in (*self.model.parameters(), *self.model.buffers(), *states):
            if torch.is_tensor(tensor) and tensor.ndim:
                tensor.chunk(len(self.parts))[seed].zero_()


class SeedsFeed(Feed):
    """The batches of S runs side by side: images (N, S·C, …) and labels (N, S), from tensors in memory.

    Args:
        dataset: of both sides; every seed is given all of it.
    """

    def __init__(
        self, dataset: TensorDataset, *, seeds: int, device: torch.device, streams: Sequence[SampleStream] = ()
    ) -> None:
        super().__init__(dataset, seed=0, loaders=0, device=device, stream=streams[0] if streams else None)
        self._seeds, self._streams = seeds, streams
        images, labels = dataset.tensors
        self._images, self._labels = images.to(device), labels.to(device).long()

    def passes(self, passes: list[range], *, start: int, stop: int) -> Iterator[Batch]:
        for iteration in range(start, stop):
            for workers in passes:
                indices = [torch.as_tensor(stream.indices(iteration, workers)) for stream in self._streams]
                chosen = torch.stack(indices, 1).to(self._images.device, non_blocking=True)
                images = self._images.index_select(0, chosen.flatten())
                yield images.view(*chosen.shape, *images.shape[1:]).flatten(1, 2), self._labels[chosen]

    def chunks(self, chunks: range) -> Iterator[Batch]:
        for chunk in chunks:
            images, labels = (side[chunk * CHUNK : (chunk + 1) * CHUNK] for side in (self._images, self._labels))
            channels = [1, self._seeds, *[1] * (images.ndim - 2)]
            yield images.repeat(channels), labels[:, None].expand(-1, self._seeds)


def refuse_joining(recipe: Recipe, data: Data, group: Group) -> None:
    """Say why runs of a recipe cannot be trained as one network."""
    r = recipe
    alone = {
        "the data does not lie in memory as tensors": not (in_memory(data.train) and in_memory(data.validation)),
        "the task is one's own": r.task is not None,
        "batchnorm keep, reduce canonical, compile and channels_last are for single runs": (
            r.reduce != "fast" or r.batchnorm == "keep" or r.compile or r.channels_last
        ),
        "recalibrate takes other images for each seed": r.recalibrate is not None,
        "random_erasing, mixup and cutmix draw other numbers for each seed": r.random_erasing or r.mixup or r.cutmix,
        "clip_norm and ema are for single runs": r.clip_norm is not None or r.ema is not None,
        "init and validation are for single runs: each seed divides the data for itself": r.init or r.validation,
        "each seed has gains of its own with scaling adascale": r.scaling == "adascale",
        f"optimizer {r.optimizer} may look at whole tensors": r.optimizer not in ("sgd", *OPTIMIZERS),
    }
    for reason, holds in alone.items():
        if holds:
            raise ValueError(reason)
    models = [build_model(recipe.replace(seed=seed), data, group.device) for seed in (0, 1)]
    if draws_numbers(models[0]):
        raise ValueError("the model draws random numbers")
    images = data.train.tensors[0]
    chosen = torch.arange(2 * recipe.per_worker) % len(images)
    try_joined(models, images[chosen].to(group.device).view(2, -1, *images.shape[1:]))


class JoinedLinear(nn.Module):
    """S linear layers side by side.

    Shape:
        (N, S·in) → (N, S·out).
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.models = len(layers)
        weight = _joined([layer.weight for layer in layers])
        assert weight is not None
        self.weight = weight
        self.bias = _joined([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(len(x), self.models, -1).transpose(0, 1)
        weight = self.weight.view(self.models, -1, parts.shape[2]).transpose(1, 2)
        y = torch.bmm(parts, weight).transpose(0, 1).reshape(len(x), -1)
        return y if self.bias is None else y + self.bias


def join_models(models: Sequence[nn.Module]) -> nn.Module:
    """One network of several: (N, S·C, …) → (N, S·classes), for models of convolutions, linear layers and BatchNorm."""
    named = list(models[0].named_parameters(remove_duplicate=False))
    if len(named) > len(list(models[0].parameters())):
        raise ValueError("several layers share a parameter, which cannot be joined")
    joined = copy.deepcopy(models[0])
    modules: list[tuple[str, nn.Module]] = [*joined.named_modules()]
    for path, module in modules:
        alike = [model.get_submodule(path) for model in models]
        if isinstance(module, nn.Linear):
            replaced: nn.Module = JoinedLinear(alike)  # type: ignore[arg-type]
        elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            replaced = _widen(module, alike, ("in_channels", "out_channels", "groups"))
        elif isinstance(module, _BatchNorm):
            replaced = _widen(module, alike, ("num_features",))
        elif list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
            raise ValueError(f"{path or 'the model'} is a {type(module).__name__}, which cannot be joined")
        else:
            continue
        if not path:
            return replaced
        parent, _, name = path.rpartition(".")
        setattr(joined.get_submodule(parent), name, replaced)
    return joined


@torch.no_grad()
def try_joined(models: Sequence[nn.Module], images: Tensor) -> None:
    """A trial of the joined network on each model's own images, in float64, in training and in evaluation.

    Args:
        images: (S, N, C, …), a whole number of workers.

    Raises:
        ValueError: if the models do not give the same logits alone: something in between mixes the channels.
    """
    try:
        alone = [copy.deepcopy(model).double() for model in models]
        # As weights are later: a γ of zero hides what its block does, a scale of one that it was left out.
        noise = torch.Generator().manual_seed(0)
        for parameter in (p for model in alone for p in model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter), alpha=0.1)
        joined = join_models(alone)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the model cannot be copied and joined: {type(error).__name__}") from error
    images = images.double()
    for training in (True, False):
        joined.train(training)
        try:
            together = joined(images.transpose(0, 1).flatten(1, 2))
        except Exception as error:
            raise ValueError(f"the joined network fails: {type(error).__name__}") from error
        for number, (model, own) in enumerate(zip(alone, images, strict=True)):
            expected = model.train(training)(own)
            classes = expected.shape[1]
            found = together[:, number * classes : (number + 1) * classes]
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                raise ValueError("the joined network gives other logits")


def _widen(layer: nn.Module, alike: Sequence[nn.Module], fields: tuple[str, ...]) -> nn.Module:
    wide: Any = copy.deepcopy(layer)
    for field in fields:
        setattr(wide, field, getattr(layer, field) * len(alike))
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(wide, name, _joined([getattr(other, name) for other in alike]))
        assert parameter.shape[0] * len(alike) == getattr(wide, name).shape[0]
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.ndim:
            setattr(wide, name, torch.cat([getattr(other, name) for other in alike]))
    return wide


def _joined(parameters: Sequence[Tensor | None]) -> nn.Parameter | None:
    given = [parameter.detach() for parameter in parameters if parameter is not None]
    first = parameters[0]
    return None if first is None else nn.Parameter(torch.cat(given), requires_grad=first.requires_grad)


def _shares(tensor: Tensor, models: int) -> Sequence[Tensor]:
    return tensor.chunk(models) if tensor.ndim else [tensor.clone() for _ in range(models)]
