"""From a recipe to its weights: what a run is made of, and the loop that takes it to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.loader import PATIENCE, Feed
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.dist.signals import StopSignals
from onehour.execution import Execution
from onehour.models.load import MODELS
from onehour.rules.keys import seed_for
from onehour.training.agreement import agree, environment, facts_of_model
from onehour.training.build import (
    OPTIMIZERS,
    build_model,
    build_of,
    classes_of,
    deterministic,
    draws_numbers,
    effects,
    pick_loaders,
    pick_share,
    pick_workers_per_pass,
)
from onehour.training.checkpoint import SaveInterval
from onehour.training.console import Console, Loggers, load_logger
from onehour.training.decisions import decisions_of
from onehour.training.loop import Feeds, Loop, Stopping, never
from onehour.training.measure import StepTimer
from onehour.training.record import NonFiniteError
from onehour.training.recorder import Progress, RunFolder, look_for_folder
from onehour.training.refusals import in_words, refuse_optimizer
from onehour.training.seeds import Part, Seeds, SeedsFeed, workers_per_pass
from onehour.training.step import Step
from onehour.training.watchdog import Watchdog

__all__ = ["open_feeds", "train_run", "train_seeds"]

SAVE_SECONDS = 10.0
"""Between checkpoints of several seeds at least, which are taken apart for each; counted at evaluations."""


def train_run(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    group: Group,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    stop_asked: Callable[[], bool] = never,
    signals: StopSignals | None = None,
) -> None:
    """Train to the end and write the run's folder; every process calls it with its group.

    Args:
        recipe: completed by `complete`.
        model: an object or a function in place of the recipe's name.
        stop_asked: read at every iteration; when any process's says yes, all save the same iteration and stop.
        signals: ask for the same, and are looked for during evaluations too.

    Raises:
        ValueError: for bad input.
        NonFiniteError: when the run has left the finite numbers.
        StoppedError: when it was asked to stop.
    """
    if recipe.reduce == "canonical" and execution.threads not in (None, recipe.canonical_threads):
        raise ValueError(
            f"a canonical run computes with the recipe's canonical_threads {recipe.canonical_threads}, since they are"
            f" part of its bits; leave --threads {execution.threads} out, or change canonical_threads"
        )
    folder = execution.folder(recipe)
    watch = Watchdog(None, rank=group.rank, size=group.size, timeout=execution.hang_timeout)
    with deterministic(recipe), watch as watchdog, ExitStack() as stack:
        try:
            with in_words(folder):
                console = Console(recipe, quiet=group.rank > 0)
                loggers = Loggers(load_logger(execution.log) if group.rank == 0 else None)
                run = RunFolder(folder, recipe, group, console=console, loggers=loggers)
                stack.callback(run.close)  # also where what comes next fails: another try needs the folder
                watchdog.folder = run.inside
                decisions = decisions_of(recipe)
                network = build_model(recipe, data, group.device, model)
                rules = effects(recipe, network)  # before a checkpoint is loaded, whose γ are no longer zero
                if recipe.optimizer not in ("sgd", *OPTIMIZERS):
                    refuse_optimizer(decisions.optimizer, group.device)
                seeds = Seeds(decisions, [Part(network, decisions.optimizer(network))])
                loaders = pick_loaders(execution, data)
                warn = console.warn if group.rank == 0 else None
                feeds = open_feeds(recipe, data, execution, network, group.device, loaders=loaders, warn=warn)
                stack.callback(feeds.close)
                per_pass = pick_workers_per_pass(execution, recipe, data, network, group.device.type)
                step = Step(
                    decisions,
                    *seeds.parts[0],
                    passes=passes(pick_share(recipe, group), per_pass),
                    group=group,
                    timer=StepTimer(group.device),
                    replaced=feeds.training.skipped if recipe.bad_images == "skip" else None,
                    before_update=run.checkpoints.detach,
                    draws=draws_numbers(network) or model is not None or recipe.model not in MODELS,
                    warn=console.warn,
                )
                stack.enter_context(step)
                interval = SaveInterval(execution.save_every, execution.save_minutes)
                stopping = Stopping(group, stop_asked, signals)
                loop = Loop(decisions, seeds, step, feeds, [run], stopping, watchdog, interval)
        except ValueError as error:
            agree(group, failed=error)
            raise
        with in_words(folder, per_pass):
            if group.size > 1:
                agree(group, facts_of_model(*seeds.parts[0]))
            look_for_folder(folder, group, inside=run.inside)
            progress = run.load(*seeds.parts[0], build_of(group.device))
            places = {
                "processes": group.size,
                "workers_per_pass": per_pass,
                "loaders": loaders,
                "device": group.device.type,
            }
            run.begin(progress, partial(environment, places))
            start = progress.iteration if progress is not None else 0
            console.start(start, decisions.iterations, processes=group.size, folder=folder, rules=rules)
            loop.run([progress], profile=execution.profile)


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
        folders: of each; new or unfinished.

    Raises:
        ValueError: for a folder of something else, or a sample because of which a loss is not finite.
        FolderLostError: if one was moved or removed; all are saved where they can be.
        StoppedError: when asked to stop; all are saved.
    """
    assert len({recipe.replace(seed=0) for recipe in recipes}) == 1
    with deterministic(recipes[0]), ExitStack() as stack:
        found: list[_Member] = []
        for recipe, folder in zip(recipes, folders, strict=True):
            console = Console(recipe, quiet=True, warns=f"{folder.name}: ")
            run = RunFolder(folder, recipe, group, console=console, loggers=Loggers(None))
            stack.callback(run.close)
            network = build_model(recipe, data, group.device)
            part = Part(network, decisions_of(recipe).optimizer(network))
            found.append(_Member(run, part, run.load(*part, build_of(group.device))))
        watchdog = stack.enter_context(Watchdog(None, rank=0, size=1, timeout=None))
        stopping = Stopping(group, stop_asked)
        for _, alike in groupby(sorted(found, key=_Member.stands, reverse=True), key=_Member.stands):
            _train_together(list(alike), data, group, stopping, watchdog)


class _Member(NamedTuple):
    """One of the runs that train as one network, and where it stands."""

    run: RunFolder
    part: Part
    progress: Progress | None

    def stands(self) -> tuple[int, bool]:
        """At which iteration, and whether it was evaluated there."""
        return (0, True) if self.progress is None else (self.progress.iteration, self.progress.evaluated)


def _train_together(members: list[_Member], data: Data, group: Group, stopping: Stopping, watchdog: Watchdog) -> None:
    """Train runs that stand at the same iteration, to their ends."""
    runs, progress = [member.run for member in members], [member.progress for member in members]
    decisions, count = [decisions_of(run.recipe) for run in runs], len(runs)
    recipe = decisions[0].recipe
    seeds = Seeds(decisions[0], [member.part for member in members])
    per_pass = workers_per_pass(recipe, data, seeds=count, device=group.device.type)
    places = {
        "processes": 1,
        "workers_per_pass": per_pass,
        "loaders": 0,
        "device": group.device.type,
        "seeds_together": count,
    }
    streams = [decision.stream() for decision in decisions]
    with ExitStack() as stack:
        feeds = Feeds(
            SeedsFeed(data.train, seeds=count, device=group.device, streams=streams),
            SeedsFeed(data.validation, seeds=count, device=group.device),
        )
        stack.callback(feeds.close)
        step = Step(
            decisions[0],
            seeds.model,
            seeds.optimizer,
            passes=passes(range(recipe.workers.workers), per_pass),
            group=group,
            timer=StepTimer(group.device),
            seeds=count,
            draws=False,  # else they were refused
        )
        stack.enter_context(step)
        for run, _, stood in members:
            run.begin(stood, partial(environment, places), together=count)
        interval = SaveInterval(None, SAVE_SECONDS / 60)
        with suppress(NonFiniteError):
            Loop(decisions[0], seeds, step, feeds, runs, stopping, watchdog, interval).run(progress)


def open_feeds(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    model: nn.Module,
    device: torch.device,
    *,
    loaders: int,
    warn: Callable[[str], None] | None = None,
) -> Feeds:
    """Both sides of a run's data, as this process loads them.

    Args:
        model: whose outputs the labels must be, where the recipe does not say.
        warn: is told of processes that were replaced.
    """
    classes = classes_of(recipe, data, model, device)
    # A stuck loader is replaced long before the watchdog would end the run for it.
    patience = execution.hang_timeout / 4 if execution.hang_timeout else PATIENCE
    feed = partial(Feed, loaders=loaders, device=device, classes=classes, patience=patience, warn=warn)
    return Feeds(
        feed(data.train, seed=recipe.seed, stream=decisions_of(recipe).stream(), look=data.looks[0]),
        feed(data.validation, seed=seed_for(recipe.seed, "validation"), look=data.looks[1]),
    )
