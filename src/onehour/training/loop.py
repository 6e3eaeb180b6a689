"""A run, from its recipe to its weights: resume → step → evaluate → save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import NoReturn

from torch import nn

from onehour.config import Recipe
from onehour.data.loader import Feed
from onehour.data.sources import Data
from onehour.dist.devices import HostFlags, build_of, deterministic
from onehour.dist.group import Group
from onehour.dist.signals import StopSignals
from onehour.dist.watchdog import Stopping, Watchdog, never
from onehour.execution import Execution
from onehour.models.load import MODELS
from onehour.rules.momentum import set_rate
from onehour.training.agreement import agree, facts_of_model
from onehour.training.build import build_model
from onehour.training.checkpoint import Progress, SaveInterval
from onehour.training.console import Console, effects
from onehour.training.decisions import Decisions, decisions_of
from onehour.training.evaluate import Evaluator
from onehour.training.feeds import (
    InputError,
    Skipping,
    draws_numbers,
    open_feeds,
    pick_workers_per_pass,
    refuse_samples,
)
from onehour.training.measure import GradientNoise, Tally, profiled
from onehour.training.record import NonFiniteError, StoppedError
from onehour.training.recorder import RunFolder, environment, has_begun, in_words, look_for_folder
from onehour.training.state import Network, refuse_optimizer
from onehour.training.statistics import EvaluationStoppedError
from onehour.training.step import Iteration, Step
from onehour.training.task import COUNTED_NOTHING, Sums, task_of
from onehour.training.weights import start_from


def train_run(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    group: Group,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    task: Callable[..., Sums] | None = None,
    stop_asked: Callable[[], bool] = never,
    signals: StopSignals | None = None,
) -> None:
    """Train to the end and write the run's folder; every process calls it with its group.

    Args:
        model, task: an object or a function in place of the recipe's name.
        stop_asked: read at every iteration; when any process's says yes, all save the same iteration and stop.
        signals: ask for the same, and are looked for during evaluations too.

    Raises:
        NonFiniteError: when the run has left the finite numbers.
        StoppedError: when it was asked to stop.
    """
    folder = execution.folder(recipe)
    begun, start = not recipe.init or has_begun(folder, group), None
    watch = Watchdog(None, rank=group.rank, size=group.size, timeout=execution.hang_timeout)
    with deterministic(recipe), watch as watchdog, ExitStack() as stack:
        try:
            with in_words(folder):
                console = Console(recipe, quiet=group.rank > 0)
                run = RunFolder(folder, recipe, group, console=console, log=execution.log)
                stack.callback(run.close)  # also where what comes next fails: another try needs the folder
                watchdog.folder = run.inside
                decisions = decisions_of(recipe)
                learns = task_of(recipe, task, group.device)
                net = build_model(recipe, data, group.device, model, task=learns)
                if not begun:
                    start = start_from(recipe, data, net, group.device)
                rules = effects(recipe, net, data)  # before a checkpoint is loaded, whose γ are no longer zero
                if ":" in recipe.optimizer:  # not one of ours
                    refuse_optimizer(decisions_of(recipe.replace(layer_rates=())).optimizer, group.device)
                network = Network(net, decisions.optimizer(net), ema=recipe.target_ema)
                feeds = open_feeds(recipe, data, execution, net, decisions.stream(), group, warn=console.warn)
                stack.callback(feeds.close)
                per_pass = pick_workers_per_pass(execution, recipe, data, net, group.device.type)
                step = Step(
                    decisions,
                    network,
                    per_pass=per_pass,
                    group=group,
                    task=learns,
                    replaced=feeds.training.skipped if recipe.bad_images == "skip" else None,
                    draws=draws_numbers(net) or learns.counts or model is not None or recipe.model not in MODELS,
                    warn=console.warn,
                )
                stack.enter_context(step)
                noise = None
                if execution.noise:
                    noise = GradientNoise(decisions, step, slow=watchdog.slow, warn=console.warn)
                evaluator = Evaluator(network, feeds.validation, recipe, data, group=group, task=learns)
                stack.callback(evaluator.close)
                stopping = Stopping(group, stop_asked, signals)
                loop = Loop(decisions, step, feeds.training, evaluator, [run], stopping, watchdog, noise)
        except ValueError as error:
            agree(group, failed=error)
            raise
        with in_words(folder, per_pass, canonical=recipe.reduce == "canonical"):
            if group.size > 1:
                agree(group, facts_of_model(network.model, network.optimizer) | (start.facts if start else {}))
            look_for_folder(folder, group, inside=run.inside)
            progress = run.load(network, build_of(group.device))
            places = feeds.places(recipe, data, group, per_pass)
            if start is not None:
                places |= start.record
                rules += f"\n{start}"
            run.begin(progress, partial(environment, places))
            done = 0 if progress is None else progress.iteration
            console.start(done, decisions.iterations, processes=group.size, folder=folder, rules=rules)
            interval = SaveInterval(execution.save_every, execution.save_minutes)
            loop.run([progress], interval, profile=execution.profile)


def iterate(
    step: Step, feed: Feed, span: range, stop_asked: Callable[[], bool] = never, noise: GradientNoise | None = None
) -> Iterator[tuple[int, Iteration]]:
    """The training loop: takes iterations one after another, and gives how many are done and what the last one was."""
    for part in step.decisions.ramp.parts(span):
        step.begin(part.start)
        batches = loaded = feed.passes(step.passes, start=part.start, stop=part.stop)
        for iteration in part:
            if step.decisions.is_over(iteration):
                return
            if noise is not None and noise.is_due(iteration):
                batches = chain(noise.measure(iteration, loaded), loaded)
            yield iteration + 1, step(iteration, batches, stopping=stop_asked())


class Loop:
    """Takes runs to their ends, in one process: one run, or several that differ by their seed as one network.

    Args:
        runs: the folders, one a seed.
        noise: measures the gradient noise, where that was asked for.
    """

    def __init__(
        self,
        decisions: Decisions,
        step: Step,
        feed: Feed,
        evaluator: Evaluator,
        runs: Sequence[RunFolder],
        stopping: Stopping,
        watchdog: Watchdog,
        noise: GradientNoise | None = None,
    ) -> None:
        self.decisions, self.step, self.feed, self.evaluator = decisions, step, feed, evaluator
        self.runs, self.stopping, self.watchdog = runs, stopping, watchdog
        self.flags = HostFlags(stopping.group.device)
        skips, first = decisions.recipe.bad_images == "skip", runs[0]
        skipping = Skipping(decisions.recipe, feed, stopping.group, first.folder, first.inside) if skips else None
        self.tally = Tally(decisions, step, skipping, noise)

    def run(self, progress: Sequence[Progress | None], interval: SaveInterval, *, profile: int = 0) -> None:
        """Go on from where the runs stand, all at the same iteration.

        Args:
            interval: when to save.
            profile: how many iterations to trace.
        """
        iterations, first = range(self._resume(progress), self.decisions.iterations), self.runs[0]
        with profiled(profile, first.inside, self.stopping.group.rank, warn=first.console.warn) as profile_step:
            self.step.model.train()
            for done, iteration in iterate(self.step, self.feed, iterations, self._is_stop_asked, self.tally.noise):
                profile_step()
                self.watchdog.beat(done, slow=done == self.decisions.ramp.at(done).first)  # which may compile anew
                stop = self.tally.count(done, iteration)
                over = self.decisions.is_over(done)
                ends_epoch = over or self.decisions.ends_epoch(done)
                stopped, halted = self.flags.read(stop, iteration.alive, now=ends_epoch)
                if halted:
                    self._halt(done)
                if ends_epoch:
                    self._evaluate(done)
                if stopped and not over:
                    self._stop(done)
                if interval.is_over(done, ends_epoch=ends_epoch, last=over):
                    self._save(done, together=ends_epoch)
                first.console.step(done)
        self._end("finished")

    def _resume(self, progress: Sequence[Progress | None]) -> int:
        """The iteration to go on with; the evaluation before it is made up for where it was not made."""
        stood = [each for each in progress if each is not None]
        if not stood:
            self.tally.clock.begin(0)
            if self.step.task.counts:  # "broken" is no better than this
                self._evaluate(0)
            return 0
        first, start = stood[0], stood[0].iteration
        self.tally.load(stood)
        if start:  # a velocity that has the rate inside was made at this one
            rate = self.decisions.rate(start - 1) if first.rate is None else first.rate
            set_rate(self.step.optimizer, rate, inside=set())
        if not first.evaluated:
            self._evaluate(start)
            self._save(start)
        return start

    def _is_stop_asked(self) -> bool:
        return self.stopping.is_asked() or any(run.lost is not None for run in self.runs)

    def _evaluate(self, done: int) -> None:
        spent = self.tally.spent()
        with self.watchdog.slow():
            for run in self.runs:
                run.checkpoints.wait()  # loaders may be forked now: no thread should hold anything
            try:
                results, averaged = self.evaluator(self.stopping.is_signalled)
            except EvaluationStoppedError:
                self._stop(done, evaluated=False)
            except ValueError as error:  # of the validation data: what was trained until here stays
                if self.stopping.group.size == 1 or isinstance(error, InputError):  # else the others do not know of it
                    self._save(done, evaluated=False)
                    self._are_saved()
                raise
        alive = self._alive()
        if len(self.runs) > 1 and not all(lives or run.ended for lives, run in zip(alive, self.runs, strict=True)):
            self._refuse_samples(range(0))
        records = self.tally.take(done, results, averaged, spent)
        for seed, (run, record) in enumerate(zip(self.runs, records, strict=True)):
            if run.ended:
                continue
            if alive[seed]:
                run.add(*record)
            else:
                self.step.network.clear(seed)
                self._end("non-finite", only=seed)
        self.tally.clock.begin(done)

    def _alive(self) -> list[bool]:
        """Which seeds have finite numbers alone; of several, weights and statistics are looked at too."""
        self.step.alive.copy_(self.step.network.alive(self.step.alive))  # where a captured iteration has it
        return self.step.alive.cpu().numpy().tolist()

    def _save(self, done: int, *, together: bool = True, evaluated: bool = True) -> None:
        """Save in the background; a seed that has just left the finite numbers keeps its last checkpoint.

        Args:
            together: all processes do, at this iteration; where the clock says when, process 0 may be alone.
        """
        alive = self._alive()
        if not any(alive):  # the flags may tell later; a masked update is no state to go on from
            return
        with self.tally.clock.paused():
            progress = self.tally.progress(done, evaluated=evaluated, together=together)
            with self.watchdog.slow():
                for run in self.runs:
                    run.checkpoints.wait()  # what is being written lies in the parts, which are filled now
                self.step.network.give_back()
                for lives, run, part, stands in zip(alive, self.runs, self.step.network.parts, progress, strict=True):
                    if lives and not run.ended:
                        run.save(part, stands)

    def _stop(self, done: int, *, evaluated: bool = True) -> NoReturn:
        if not any(self._alive()):
            self._halt(done)
        self._save(done, evaluated=evaluated)
        are_saved = self._are_saved()
        with self.watchdog.slow():
            for run in self.runs:
                run.leave(f"stopped after iteration {done}, {'saved there' if are_saved else 'which is not saved'}")
        saved = "saved; the same command goes on from there"
        if not are_saved:
            saved = "could not save it; the same command goes on from the checkpoint before"
        if self.tally.skipping is not None:
            self.tally.skipping.refuse_too_many(done, saved)
        error = StoppedError(f"stopped after iteration {done} and {saved}")
        raise self._ended("stopped", error, lasting=self.stopping.lasts())

    def _are_saved(self) -> bool:
        with self.watchdog.slow():
            saved = [run.is_saved() for run in self.runs]
        return all(saved)

    def _ended(self, outcome: str, error: Exception, *, lasting: bool = True) -> Exception:
        """Note how it ended, so that no launcher's restart undoes it; nobody leaves before that is done.

        Launchers end the others once one has left with a code, and process 0 may be saving.
        """
        for run in self.runs:
            if lasting:
                run.note(outcome, str(error))
        with self.watchdog.slow():
            self.stopping.group.broadcast(b"noted")
        return error

    def _halt(self, done: int) -> NoReturn:
        """Refuse a sample that is not finite; else the run has left the finite numbers by itself, and ends."""
        self._are_saved()
        done -= self.flags.late
        self._refuse_samples(range(done - 1, done))
        if self.step.empty.item():
            raise ValueError(COUNTED_NOTHING.format(done))
        self._end("non-finite")
        rate, folder = self.decisions.rate(done - 1), self.runs[0].folder
        raise self._ended("non-finite", NonFiniteError.at(done, self.decisions.epoch(done), rate, folder))

    def _refuse_samples(self, seen: range) -> None:
        """Refuse a training sample that is not finite, of some iterations; of several seeds, each takes all samples."""
        with self.watchdog.slow():
            if len(self.runs) == 1:
                self.step.begin(seen.start)
            refuse_samples(seen, self.feed, self.step.passes, self.stopping.group, together=len(self.runs) > 1)

    def _end(self, outcome: str, *, only: int | None = None) -> None:
        """Write the summaries of the runs that have not ended, or of one seed alone."""
        for seed, run in enumerate(self.runs):
            if not run.ended and only in (None, seed):
                with self.watchdog.slow():
                    run.end(self.step.network.parts[seed], outcome, **self.tally.skipped())
