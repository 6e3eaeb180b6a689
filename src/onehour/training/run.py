"""A run: from its recipe, or from its latest checkpoint, to its summary."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NoReturn, cast

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.loader import PATIENCE, Feed
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.dist.launch import is_torchruns
from onehour.dist.placement import passes
from onehour.dist.signals import StopSignals
from onehour.execution import Execution
from onehour.rules.keys import seed_for
from onehour.rules.momentum import set_rate
from onehour.training.agreement import agree
from onehour.training.breaking import Breakable, EvaluationStoppedError
from onehour.training.build import (
    OPTIMIZERS,
    build_model,
    classes_of,
    effects,
    pick_loaders,
    pick_share,
    pick_workers_per_pass,
)
from onehour.training.checkpoint import Checkpoints, SaveInterval
from onehour.training.console import Console
from onehour.training.determinism import build_of, deterministic
from onehour.training.ends import DELIBERATE, NonFiniteError, StoppedError
from onehour.training.environment import environment
from onehour.training.evaluate import evaluate
from onehour.training.facts import facts_of_model
from onehour.training.flags import HostFlags
from onehour.training.inputs import InputError, refuse_iterations
from onehour.training.loggers import Loggers, load_logger
from onehour.training.measure import NOT_FINITE, measured, timed
from onehour.training.owned import Owned
from onehour.training.pitfalls import decisions_of
from onehour.training.profiling import profiled
from onehour.training.record import Recorder
from onehour.training.refusals import in_words
from onehour.training.shared import look_for_folder
from onehour.training.skipping import Skipping
from onehour.training.step import Step
from onehour.training.suitable import refuse_optimizer
from onehour.training.summary import summarise
from onehour.training.timing import StepTimer
from onehour.training.watchdog import Watchdog

__all__ = ["DELIBERATE", "NonFiniteError", "StoppedError", "train_run"]


def train_run(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    group: Group,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Train to the end and write the run's folder; every process calls it with its group.

    Args:
        recipe: completed by `complete`.
        model: an object or a function in place of the recipe's name.
        stop_asked: read at every iteration; when any process's says yes, all save the same iteration and stop. Signals
            are looked for during evaluations too.

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
    folder, limit = execution.folder(recipe), execution.hang_timeout
    watch = Watchdog(None, rank=group.rank, size=group.size, timeout=limit)
    with deterministic(recipe), watch as watchdog, ExitStack() as stack:
        recorder = None
        try:
            with in_words(folder):
                if group.rank == 0:
                    recorder = Recorder(folder, recipe)
                    stack.callback(recorder.close)  # also where what comes next fails: another try needs the folder
                loop = _Loop(recipe, data, execution, group, model, recorder, watchdog)
        except ValueError as error:
            agree(group, failed=error)
            raise
        stack.callback(loop.close)
        with in_words(folder, loop.per_pass):
            loop.run(stop_asked)


class _Loop:
    """The state of a run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        execution: Execution,
        group: Group,
        model: nn.Module | Callable[[], nn.Module] | None,
        recorder: Recorder | None,
        watchdog: Watchdog,
    ) -> None:
        assert recipe.samples is not None
        self.recipe, self.data, self.execution, self.group = recipe, data, execution, group
        self.samples = recipe.samples
        self.folder = execution.folder(recipe)
        self.iterations = recipe.workers.iterations(self.samples, recipe.epochs)
        self.decisions = decisions_of(recipe)
        self.stream = self.decisions.stream()
        self.first = group.rank == 0
        self.recorder, self.owned = recorder, Owned(recorder, group)
        self.inside = recorder.inside if recorder else self.folder
        self.watchdog = watchdog
        watchdog.folder = self.inside
        self.loggers = Loggers(load_logger(execution.log) if self.first else None)
        self.console = Console(recipe, quiet=not self.first)
        self.timer = StepTimer(group.device)
        self.model = build_model(recipe, data, group.device, model)
        self.rules = effects(recipe, self.model)  # before a checkpoint is loaded, whose γ are no longer zero
        if recipe.optimizer not in ("sgd", *OPTIMIZERS):
            refuse_optimizer(self.decisions.optimizer, group.device)
        self.optimizer = self.decisions.optimizer(self.model)
        self.loaders = loaders = pick_loaders(execution, data)
        device, unseen = group.device, seed_for(recipe.seed, "validation")
        crew: dict[str, Any] = {
            "loaders": loaders,
            "device": device,
            "classes": classes_of(recipe, data, self.model, device),
            # A stuck one is replaced long before the watchdog would end the run for it.
            "patience": execution.hang_timeout / 4 if execution.hang_timeout else PATIENCE,
            "warn": self.console.warn if self.first else None,
        }
        self.feed = Feed(data.train, seed=recipe.seed, stream=self.stream, look=data.looks[0], **crew)
        self.validation = Feed(data.validation, seed=unseen, look=data.looks[1], **crew)
        self.per_pass = pick_workers_per_pass(execution, recipe, data, self.model, group.device.type)
        self.passes = passes(pick_share(recipe, group), self.per_pass)
        self.step = Step(recipe, self.model, self.optimizer, passes=self.passes, group=group, timer=self.timer)
        self.skipping = Skipping(recipe, self.feed, self.step, self.folder, group, inside=self.inside)
        self.checkpoints = Checkpoints(self.folder, recipe, group, warn=self._warn_of_disk, inside=self.inside)
        self.step.before_update = self.checkpoints.detach
        self.interval = SaveInterval(execution.save_every, execution.save_minutes)
        self.flags = HostFlags(group.device)
        self._mark(0)

    def run(self, stop_asked: Callable[[], bool]) -> None:
        recipe = self.recipe
        self.signals = stop_asked if isinstance(stop_asked, StopSignals) else None
        start, evaluated = self._resume()
        self.console.start(start, self.iterations, processes=self.group.size, folder=self.folder, rules=self.rules)
        self.begun = start
        batches = self.feed.passes(self.passes, start=start, stop=self.iterations)
        self._mark(start)
        if not evaluated:
            self._evaluate(start)
            self._save(start)
        self.model.train()
        with profiled(self.execution.profile, self.inside, self.group.rank, warn=self.console.warn) as profile_step:
            for iteration in range(start, self.iterations):
                self.step(iteration, batches, stopping=stop_asked() or self.owned.lost is not None)
                profile_step()
                done = iteration + 1
                self.watchdog.beat(done)
                ends_epoch = done * recipe.minibatch // self.samples > iteration * recipe.minibatch // self.samples
                stopped, halted = self.flags.read(self.step.stop, self.step.halted, now=ends_epoch)
                if halted:
                    self._halt(done)
                if ends_epoch:  # which the last iteration always does
                    self._evaluate(done)
                if stopped and done < self.iterations:
                    self._stop(done)
                if ends_epoch or self.interval.over(done):
                    self._save(done, together=ends_epoch)
                self.console.step(done)
        self._finish("finished")

    def _mark(self, done: int) -> None:
        """Time from here on belongs to the iterations after `done`."""
        self.since, self.cpu_since, self.last_evaluated = time.perf_counter(), time.process_time(), done

    def close(self) -> None:
        self.checkpoints.close()
        self.console.close()
        self.step.close()
        self.feed.close()
        self.validation.close()

    def _resume(self) -> tuple[int, bool]:
        """The iteration to go on with, and whether the one before it was evaluated, if it had to be."""
        if self.group.size > 1:
            agree(self.group, facts_of_model(self.model, self.optimizer))
        look_for_folder(self.folder, self.group, inside=self.inside)
        progress = self.checkpoints.load(self.model, self.optimizer)
        start, evaluated = 0, True
        if progress is not None:
            start, evaluated = progress["iteration"], progress.get("evaluated", True)
            if start:  # a velocity that has the rate inside was made at this one
                set_rate(self.optimizer, self.decisions.rate(start - 1), inside=set())
            self.step.totals.copy_(torch.tensor(progress["totals"], dtype=torch.float64))
            self.step.skipped.fill_(progress.get("skipped", 0))
            build, here = progress["build"], build_of(self.group.device)
            if self.recipe.reduce == "canonical" and build != here:
                differs = [key for key in here if build.get(key) != here[key]]
                changed = ", ".join(f"{key} {build.get(key)} → {here[key]}" for key in differs)
                self.console.warn(f"the bits may differ from an undisturbed run's from here on: {changed}")
        if self.recorder is not None:
            places = {
                "processes": self.group.size,
                "workers_per_pass": self.per_pass,
                "loaders": self.loaders,
                "device": self.group.device.type,
            }
            for note in self.recorder.notes:
                self.console.warn(note)
            self.recorder.begin(start, environment(places), known=start if evaluated else start - 1)
            self.loggers.start(self.recipe.as_dict(), self.folder)
        return start, evaluated

    def _evaluate(self, done: int) -> None:
        steps = self.timer.steps()
        seconds, cpu_seconds = time.perf_counter() - self.since, time.process_time() - self.cpu_since
        with self.watchdog.slow():
            self.checkpoints.wait()  # loaders may be forked now: no thread should hold anything
            feed = cast(Feed, Breakable(self.validation, self.group, self.signals or (lambda: False)))
            try:
                result = evaluate(self.model, self.data.validation, self.recipe, group=self.group, feed=feed)
            except EvaluationStoppedError:
                self._stop(done, evaluated=False)
            except ValueError as error:  # of the validation data: what was trained until here stays
                if self.group.size == 1 or isinstance(error, InputError):  # else the others do not know of it
                    self._save(done, evaluated=False)
                    self._wait_for_save()
                raise
        evaluating = time.perf_counter() - self.since - seconds
        loss, errors = self.step.totals.tolist()
        self.step.totals.zero_()
        record = measured(self.decisions, done, (loss, errors), result) | self.skipping.count()
        if record["val_loss"] is None:
            self.console.warn(NOT_FINITE)
        images = (done - self.last_evaluated) * self.recipe.minibatch
        timing = timed(record, images, seconds=seconds, cpu_seconds=cpu_seconds, evaluating=evaluating, steps=steps)
        if self.recorder is not None:
            self.recorder.add(record, timing)
            self.loggers.log(record | {"images_per_second": timing["images_per_second"]})
        self.console.evaluated(record, timing["images_per_second"])
        self._mark(done)

    def _save(self, done: int, *, together: bool = True, evaluated: bool = True) -> None:
        """Save in the background.

        Args:
            together: all processes do, at this iteration; where the clock says when, process 0 may be alone.
            evaluated: the record has this iteration's evaluation, if there is one.
        """
        if self.step.halted.item():  # the flags may tell later; a masked update is no state to go on from
            return
        started, cpu_started = time.perf_counter(), time.process_time()
        skipped = {"skipped": int(self.step.skipped.item())} if self.recipe.bad_images == "skip" else {}
        if together:
            skipped = self.skipping.count()
        if self.recorder is not None and self.owned.look():
            progress = {
                "iteration": done,
                "position": done * self.recipe.minibatch,
                "totals": self.step.totals.tolist(),
                "build": build_of(self.group.device),
                "evaluated": evaluated,
                **skipped,
            }
            with self.watchdog.slow():
                self.checkpoints.save(self.model, self.optimizer, progress, first=self.recorder.catch_up)
        self.since += time.perf_counter() - started
        self.cpu_since += time.process_time() - cpu_started

    def _stop(self, done: int, *, evaluated: bool = True) -> NoReturn:
        if self.step.halted.item():
            self._halt(done)
        self._save(done, evaluated=evaluated)
        saved = "saved; the same command goes on from there"
        is_saved = self._wait_for_save()
        with self.watchdog.slow():
            self.owned.leave(f"stopped after iteration {done}, {'saved there' if is_saved else 'which is not saved'}")
        if not is_saved:
            saved = "could not save it; the same command goes on from the checkpoint before"
        self.skipping.refuse_too_many(done, saved)
        error = StoppedError(f"stopped after iteration {done} and {saved}")
        raise self._ended("stopped", error, lasting=self._on_purpose())

    def _wait_for_save(self) -> bool:
        """Whether process 0 has saved; nobody leaves before: launchers end the others once one has left."""
        with self.watchdog.slow():
            return bool(self.group.broadcast(b"saved" if self.checkpoints.wait() and self.owned.look() else b""))

    def _on_purpose(self) -> bool:
        """Whether a restart must not undo this stop. All processes call it together.

        torchrun sends SIGTERM when a host comes or goes, and then starts all processes anew, to go on.
        """
        if self.signals is None:
            return True
        mine = self.signals.asked is not None and not (self.signals.asked == signal.SIGTERM and is_torchruns())
        return self.group.sum(torch.tensor(float(mine), device=self.group.device)).item() > 0

    def _ended(self, outcome: str, error: Exception, *, lasting: bool = True) -> Exception:
        """Note how it ended, so that no launcher's restart undoes it; nobody leaves before that is done.

        Launchers end the others once one has left with a code, and process 0 may be saving.
        """
        if self.recorder is not None and lasting:
            with suppress(OSError):  # a restart then goes on, which is better than a message that hides this one
                self.recorder.note(outcome, str(error))
        with self.watchdog.slow():
            self.group.broadcast(b"noted")
        return error

    def _halt(self, done: int) -> NoReturn:
        """Refuse a sample that is not finite; else the run has left the finite numbers by itself, and ends."""
        self._wait_for_save()
        with self.watchdog.slow():
            seen = range(max(self.begun, done - 1 - self.flags.late), done)
            refuse_iterations(seen, self.feed, self.passes, self.group)
        self._finish("non-finite")
        rate = self.decisions.rate(done - 1)
        message = (
            f"the loss or a gradient was not finite at iteration {done} (epoch"
            f" {done * self.recipe.minibatch / self.samples:.2f}, rate {rate:g}); checkpoints before it are kept in"
            f" {self.folder}. Use a lower base_lr, more warmup_epochs or a smaller minibatch"
        )
        raise self._ended("non-finite", NonFiniteError(message))

    def _finish(self, outcome: str) -> None:
        with self.watchdog.slow():
            saved = self.checkpoints.wait()
            usable = self.owned.look()
        if not saved and outcome == "finished" and self.owned.lost is None:
            raise ValueError(f"the run has come to its end, but its weights could not be saved to {self.folder}")
        if self.recorder is not None and usable:
            summary = summarise(self.inside, self.recipe, self.model, self.optimizer, outcome)
            if self.recipe.bad_images == "skip":
                summary["skipped"] = int(self.step.skipped.item())
            self.recorder.end(summary)
            self.loggers.finish(summary)
        with self.watchdog.slow():
            self.owned.leave(f"the run ended as {outcome}{'' if saved and usable else ', which is not saved'}")

    def _warn_of_disk(self, text: str) -> None:
        if self.owned.look():  # else there is more to say than that a checkpoint could not be written
            self.console.warn(text)
