"""The loop that takes runs to their ends: resume → step → evaluate → save."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from onehour.data.loader import Feed
from onehour.dist.group import Group
from onehour.dist.launch import is_torchruns
from onehour.dist.signals import StopSignals
from onehour.rules.momentum import set_rate
from onehour.training.build import build_of
from onehour.training.checkpoint import SaveInterval
from onehour.training.decisions import Decisions
from onehour.training.engine import EvaluationStoppedError, evaluate
from onehour.training.measure import Clock, measured, profiled, timed
from onehour.training.record import NonFiniteError, StoppedError
from onehour.training.recorder import Progress, RunFolder
from onehour.training.refusals import InputError, Skipping, refuse_batch, refuse_iterations
from onehour.training.seeds import Seeds
from onehour.training.step import Iteration, Step
from onehour.training.watchdog import Watchdog

__all__ = ["Feeds", "HostFlags", "Loop", "Stopping", "iterate", "never"]


def never() -> bool:
    """Nobody asks for a stop."""
    return False


class Feeds(NamedTuple):
    """A run's two sides."""

    training: Feed
    validation: Feed

    def close(self) -> None:
        """End the processes that load."""
        self.training.close()
        self.validation.close()


def iterate(
    step: Step, feed: Feed, iterations: range, *, stop_asked: Callable[[], bool] = never
) -> Iterator[tuple[int, Iteration]]:
    """The training loop: takes iterations one after another, and gives how many are done and what the last one was."""
    batches = feed.passes(step.passes, start=iterations.start, stop=iterations.stop)
    for iteration in iterations:
        yield iteration + 1, step(iteration, batches, stopping=stop_asked())


class Loop:
    """Takes runs to their ends, in one process: one run, or several that differ by their seed as one network.

    Args:
        decisions: of the recipe.
        seeds: the network and its optimizer.
        step: that takes them through an iteration.
        feeds: the data.
        runs: the folders, one a seed.
        stopping: whether to stop.
        watchdog: is told of progress.
        interval: when to save between evaluations; of several seeds, at which evaluations.
    """

    def __init__(
        self,
        decisions: Decisions,
        seeds: Seeds,
        step: Step,
        feeds: Feeds,
        runs: Sequence[RunFolder],
        stopping: Stopping,
        watchdog: Watchdog,
        interval: SaveInterval,
    ) -> None:
        self.decisions, self.seeds, self.step, self.feeds = decisions, seeds, step, feeds
        self.runs, self.stopping, self.watchdog, self.interval = runs, stopping, watchdog, interval
        self.clock, self.began = Clock(), 0
        self.totals = torch.zeros(2, len(runs), dtype=torch.float64, device=stopping.group.device)
        """Σ of the iterations' mean losses and of their errors for each seed, since the last evaluation."""
        self.skipping = None
        if decisions.recipe.bad_images == "skip":
            folder = {"folder": runs[0].folder, "inside": runs[0].inside}
            self.skipping = Skipping(decisions.recipe, feeds.training, stopping.group, **folder)

    def run(self, progress: Sequence[Progress | None], *, profile: int = 0) -> None:
        """Go on from where the runs stand, all at the same iteration.

        Args:
            profile: how many iterations to trace.
        """
        start, last, first = self._resume(progress), self.decisions.iterations, self.runs[0]
        rank, warn = self.stopping.group.rank, first.console.warn
        with profiled(profile, first.inside, rank, warn=warn) as profile_step:
            self.step.model.train()
            for done, iteration in iterate(
                self.step, self.feeds.training, range(start, last), stop_asked=self._is_stop_asked
            ):
                profile_step()
                self.watchdog.beat(done)
                stop = self._count(done, iteration)
                ends_epoch = self.decisions.ends_epoch(done)
                stopped, halted = self.stopping.read(stop, iteration.alive, now=ends_epoch)
                if halted:
                    self._halt(done)
                if ends_epoch:  # which the last iteration always does
                    self._evaluate(done)
                if stopped and done < last:
                    self._stop(done)
                if self._is_time_to_save(done, ends_epoch=ends_epoch):
                    self._save(done, together=ends_epoch)
                first.console.step(done)
        self._finish("finished")

    def _resume(self, progress: Sequence[Progress | None]) -> int:
        """The iteration to go on with; the evaluation before it is made up for where it was not made."""
        self.clock.begin(0)
        if progress[0] is None:
            return 0
        start = progress[0].iteration
        if start:  # a velocity that has the rate inside was made at this one
            set_rate(self.seeds.optimizer, self.decisions.rate(start - 1), inside=set())
        known = [stood.totals for stood in progress if stood is not None]
        self.totals.copy_(torch.tensor(known, dtype=torch.float64).T)
        if self.skipping is not None:
            self.skipping.skipped.fill_(progress[0].skipped or 0)
        self.clock.begin(start)
        self.began = start
        if not progress[0].evaluated:
            self._evaluate(start)
            self._save(start)
        return start

    def _is_stop_asked(self) -> bool:
        return self.stopping.is_asked() or any(run.lost is not None for run in self.runs)

    def _count(self, done: int, iteration: Iteration) -> Tensor:
        """Add up what an iteration was; above zero where all are to stop."""
        self.totals += torch.where(iteration.alive, iteration.sums, 0.0)
        if self.skipping is None:
            return iteration.stop
        return iteration.stop + self.skipping.add(done - 1, iteration.skipped)

    def _evaluate(self, done: int) -> None:
        steps = self.step.timer.steps()
        seconds, cpu_seconds = self.clock.read()
        recipe, group, together = self.decisions.recipe, self.stopping.group, len(self.runs)
        with self.watchdog.slow():
            for run in self.runs:
                run.checkpoints.wait()  # loaders may be forked now: no thread should hold anything
            try:
                results = evaluate(
                    self.seeds.model,
                    self.feeds.validation,
                    recipe,
                    group=group,
                    seeds=together,
                    stop_asked=self.stopping.is_signalled,
                )
            except EvaluationStoppedError:
                self._stop(done, evaluated=False)
            except ValueError as error:  # of the validation data: what was trained until here stays
                if group.size == 1 or isinstance(error, InputError):  # else the others do not know of it
                    self._save(done, evaluated=False)
                    self._are_saved()
                raise
        evaluating = self.clock.read()[0] - seconds
        alive, images = self._alive(), (done - self.clock.since) * recipe.minibatch
        if together > 1 and not all(lives or run.ended for lives, run in zip(alive, self.runs, strict=True)):
            self._refuse_samples(range(0))
        totals: list[list[float]] = self.totals.T.tolist()
        self.totals.zero_()
        skipped = self.skipping.count() if self.skipping is not None else None
        for seed, run in enumerate(self.runs):
            if run.ended:
                continue
            if not alive[seed]:
                self.seeds.clear(seed)
                self._end(seed, "non-finite")
                continue
            metrics = measured(self.decisions, done, totals[seed], results[seed], skipped=skipped)
            timing = timed(
                metrics,
                images,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                evaluating=evaluating,
                steps=steps,
                runs=together,
            )
            run.add(metrics, timing)
        self.clock.begin(done)

    def _alive(self) -> list[bool]:
        """Which seeds have finite numbers alone; of several, weights and statistics are looked at too."""
        if len(self.runs) > 1:
            self.step.alive &= self.seeds.finite()
        alive: list[bool] = self.step.alive.tolist()
        return alive

    def _is_time_to_save(self, done: int, *, ends_epoch: bool) -> bool:
        if len(self.runs) == 1:
            return ends_epoch or self.interval.over(done)
        return ends_epoch and (done == self.decisions.iterations or self.interval.over(done))

    def _save(self, done: int, *, together: bool = True, evaluated: bool = True) -> None:
        """Save in the background; a seed that has just left the finite numbers keeps its last checkpoint.

        Args:
            together: all processes do, at this iteration; where the clock says when, process 0 may be alone.
            evaluated: the record has this iteration's evaluation, if there is one.
        """
        alive = self._alive()
        if not any(alive):  # the flags may tell later; a masked update is no state to go on from
            return
        with self.clock.paused():
            skipped = None
            if self.skipping is not None:
                skipped = self.skipping.count() if together else int(self.skipping.skipped.item())
            if len(self.runs) > 1:
                for run in self.runs:
                    run.checkpoints.wait()  # what is being written lies in the networks that are filled now
                self.seeds.give_back()
            build, position = build_of(self.stopping.group.device), done * self.decisions.recipe.minibatch
            totals: list[list[float]] = self.totals.T.tolist()
            for seed, run in enumerate(self.runs):
                if alive[seed] and not run.ended:
                    with self.watchdog.slow():
                        progress = Progress(done, position, totals[seed], build, evaluated, skipped)
                        run.save(*self.seeds.parts[seed], progress)

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
        if self.skipping is not None:
            self.skipping.refuse_too_many(done, saved)
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
        first = done - 1 - self.stopping.late
        self._refuse_samples(range(max(self.began, first), done))
        self._finish("non-finite")
        recipe, rate = self.decisions.recipe, self.decisions.rate(done - 1)
        message = (
            f"the loss or a gradient was not finite at iteration {done} (epoch"
            f" {done * recipe.minibatch / self.decisions.samples:.2f}, rate {rate:g}); checkpoints before it are kept"
            f" in {self.runs[0].folder}. Use a lower base_lr, more warmup_epochs or a smaller minibatch"
        )
        raise self._ended("non-finite", NonFiniteError(message))

    def _refuse_samples(self, seen: range) -> None:
        """Refuse a training sample that is not finite, of some iterations; of several seeds, each takes all samples."""
        feed = self.feeds.training
        with self.watchdog.slow():
            if len(self.runs) == 1:
                refuse_iterations(seen, feed, self.step.passes, self.stopping.group)
            else:
                refuse_batch(feed.dataset.tensors[0], feed.called)

    def _finish(self, outcome: str) -> None:
        for seed, run in enumerate(self.runs):
            if not run.ended:
                self._end(seed, outcome)

    def _end(self, seed: int, outcome: str) -> None:
        """Write a run's summary, once its last checkpoint is on disk."""
        run = self.runs[seed]
        with self.watchdog.slow():
            saved = run.checkpoints.wait()
            usable = run.is_ours()
        if not saved and outcome == "finished" and run.lost is None:
            raise ValueError(f"the run has come to its end, but its weights could not be saved to {run.folder}")
        skipped = {} if self.skipping is None else {"skipped": int(self.skipping.skipped.item())}
        run.end(*self.seeds.parts[seed], outcome, **skipped)
        with self.watchdog.slow():
            run.leave(f"the run ended as {outcome}{'' if saved and usable else ', which is not saved'}")


class Stopping:
    """Whether all processes are to stop: asked for at every iteration, and by a signal during evaluations too.

    Args:
        group: all processes.
        asked: whether this one was asked to.
        signals: that ask for it.
    """

    def __init__(self, group: Group, asked: Callable[[], bool] = never, signals: StopSignals | None = None) -> None:
        self.group, self._asked, self._signals = group, asked, signals
        self._flags = HostFlags(group.device)
        self.late = self._flags.late
        self.read = self._flags.read

    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked() or self.is_signalled()

    def is_signalled(self) -> bool:
        """Whether a signal asked this process to."""
        return self._signals is not None and self._signals()

    def lasts(self) -> bool:
        """Whether a restart must not undo this stop. All processes call it together.

        torchrun sends SIGTERM when a host comes or goes, and then starts all processes anew, to go on.
        """
        if self._signals is None:
            return True
        asked = self._signals.asked
        mine = asked is not None and not (asked == signal.SIGTERM and is_torchruns())
        return self.group.sum(torch.tensor(float(mine), device=self.group.device)).item() > 0


class HostFlags:
    """Two booleans an iteration: a stop was asked for, no seed is alive any more.

    On the CPU they are read at once. On CUDA they are copied behind the iteration and read one iteration later, so that
    the device always has work; every process reads the same iteration's, so all act alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._cuda = device.type == "cuda"
        self.late = int(self._cuda)
        """How many iterations ago what is told may have been."""

    def read(self, stop: Tensor, alive: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        """(stop asked, halted) of this iteration; on CUDA of the one before, unless `now`."""
        if not self._cuda:
            return stop.item() > 0, not alive.any().item()
        earlier, self._pending = self._pending, self._copy(stop, alive)
        chosen = self._pending if now else earlier
        if chosen is None:
            return False, False
        chosen[1].synchronize()
        return bool(chosen[0][0]), bool(chosen[0][1])

    def _copy(self, stop: Tensor, alive: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        on_host.copy_(torch.stack((stop > 0, ~alive.any())), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
