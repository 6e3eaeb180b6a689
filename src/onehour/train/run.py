"""A run: from its recipe, or from its latest checkpoint, to its summary."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.loader import pass_batches
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.execution import Execution
from onehour.rules.shuffle import SampleStream
from onehour.train.build import build_model, build_optimizer, effects, pick_loaders, pick_share, pick_workers_per_pass
from onehour.train.checkpoint import load_latest, save_checkpoint
from onehour.train.console import Console
from onehour.train.determinism import build_of, deterministic
from onehour.train.evaluate import evaluate
from onehour.train.flags import HostFlags
from onehour.train.loggers import Loggers, load_logger
from onehour.train.memory import less_memory, out_of_memory
from onehour.train.profiling import profiled
from onehour.train.record import Recorder, environment
from onehour.train.step import Step
from onehour.train.summary import summarise
from onehour.train.timing import PARTS, StepTimer

__all__ = ["NonFiniteError", "StoppedError", "train_run"]


class NonFiniteError(ArithmeticError):
    """The loss or a gradient was not finite; the weights before it are kept.

    >>> issubclass(NonFiniteError, ArithmeticError)
    True
    """


class StoppedError(Exception):
    """A process was asked to stop; the run is saved and the same command goes on with it.

    >>> issubclass(StoppedError, Exception)
    True
    """


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
        stop_asked: read at every iteration; when any process's says yes, all save the same iteration and stop.

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
    loop = None
    with deterministic(recipe):
        try:
            loop = _Loop(recipe, data, execution, group, model)
            loop.run(stop_asked)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ValueError(less_memory(loop.per_pass if loop else 1)) from error
        except IndexError as error:  # what cross_entropy raises for such a label
            if "Target" not in str(error):
                raise
            raise ValueError(
                f"a label of the training data lies outside the model's classes ({error}); labels must be 0 … C − 1"
            ) from error
        finally:
            if loop is not None:
                loop.close()


class _Loop:
    """The state of a run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        execution: Execution,
        group: Group,
        model: nn.Module | Callable[[], nn.Module] | None,
    ) -> None:
        assert recipe.samples is not None
        self.recipe, self.data, self.execution, self.group = recipe, data, execution, group
        self.samples = recipe.samples
        self.folder = execution.folder(recipe)
        self.iterations = recipe.workers.iterations(self.samples, recipe.epochs)
        self.stream = SampleStream(samples=self.samples, minibatch=recipe.workers, seed=recipe.seed)
        self.first = group.rank == 0
        self.recorder = Recorder(self.folder, recipe) if self.first else None
        self.loggers = Loggers(load_logger(execution.log) if self.first else None)
        self.console = Console(recipe, quiet=not self.first)
        self.timer = StepTimer(group.device)
        self.model = build_model(recipe, data, group.device, model)
        self.rules = effects(recipe, self.model)  # before a checkpoint is loaded, whose γ are no longer zero
        self.optimizer = build_optimizer(recipe, self.model)
        self.loaders = pick_loaders(execution, data)
        self.per_pass = pick_workers_per_pass(execution, recipe, data, self.model, group.device.type)
        self.passes = passes(pick_share(recipe, group), self.per_pass)
        self.step = Step(recipe, self.model, self.optimizer, passes=self.passes, group=group, timer=self.timer)
        self.flags = HostFlags(group.device)
        self._mark(0)

    def run(self, stop_asked: Callable[[], bool]) -> None:
        recipe = self.recipe
        start = self._resume()
        self.console.start(start, self.iterations, processes=self.group.size, folder=self.folder, rules=self.rules)
        batches = pass_batches(
            self.data.train,
            self.stream,
            self.passes,
            start=start,
            stop=self.iterations,
            loaders=self.loaders,
            device=self.group.device,
        )
        self._mark(start)
        self.model.train()
        with profiled(self.execution.profile, self.folder, self.group.rank) as profile_step:
            for iteration in range(start, self.iterations):
                self.step(iteration, batches, stopping=stop_asked())
                profile_step()
                done = iteration + 1
                ends_epoch = done * recipe.minibatch // self.samples > iteration * recipe.minibatch // self.samples
                stopped, halted = self.flags.read(self.step.stop, self.step.halted, now=ends_epoch)
                if halted:
                    self._halt(done)
                if ends_epoch:  # which the last iteration always does
                    self._evaluate(done)
                if stopped and done < self.iterations:
                    self._save(done)
                    raise StoppedError(f"stopped after iteration {done} and saved; the same command goes on from there")
                if ends_epoch or (self.execution.save_every and done % self.execution.save_every == 0):
                    self._save(done)
                self.console.step(done)
        self._finish("finished")

    def _mark(self, done: int) -> None:
        """Time from here on belongs to the iterations after `done`."""
        self.since, self.cpu_since, self.last_evaluated = time.perf_counter(), time.process_time(), done

    def close(self) -> None:
        self.console.close()
        self.step.close()

    def _resume(self) -> int:
        progress = load_latest(self.folder, self.model, self.optimizer, self.group)
        start = 0
        if progress is not None:
            start = progress["iteration"]
            self.step.totals.copy_(torch.tensor(progress["totals"], dtype=torch.float64))
            build, here = progress["build"], build_of(self.group.device)
            if self.recipe.reduce == "canonical" and build != here:
                changed = ", ".join(f"{key} {build[key]} → {here[key]}" for key in here if build[key] != here[key])
                self.console.warn(f"the bits may differ from an undisturbed run's from here on: {changed}")
        if self.recorder is not None:
            places = {
                "processes": self.group.size,
                "workers_per_pass": self.per_pass,
                "loaders": self.loaders,
                "device": self.group.device.type,
            }
            self.recorder.begin(start, environment(places))
            self.loggers.start(self.recipe.as_dict(), self.folder)
        return start

    def _evaluate(self, done: int) -> None:
        steps = self.timer.steps()
        seconds, cpu_seconds = time.perf_counter() - self.since, time.process_time() - self.cpu_since
        position = done * self.recipe.minibatch
        result = evaluate(self.model, self.data.validation, self.recipe, group=self.group, loaders=self.loaders)
        evaluating = time.perf_counter() - self.since - seconds
        first, last = _span(position, self.recipe, self.samples)
        loss, errors = self.step.totals.tolist()
        self.step.totals.zero_()
        record = {
            "epoch": position // self.samples,
            "iteration": done,
            "position": position,
            "lr": self.recipe.schedule((done - 1) * self.recipe.minibatch / self.samples),
            "train_loss": loss / (last - first),
            "train_error": 100 * errors / ((last - first) * self.recipe.minibatch),
            "val_loss": result.loss,
            "top1_error": result.top1_error,
        }
        images = (done - self.last_evaluated) * self.recipe.minibatch
        timing = {
            "epoch": record["epoch"],
            "iteration": done,
            "images": images,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images_per_second": images / seconds,
            "evaluate_seconds": evaluating,
            "parts": list(PARTS),
            "steps_ms": [[round(step[part], 3) for part in PARTS] for step in steps],
        }
        if self.recorder is not None:
            self.recorder.add(record, timing)
            self.loggers.log(record | {"images_per_second": timing["images_per_second"]})
        self.console.evaluated(record, timing["images_per_second"])
        self._mark(done)

    def _save(self, done: int) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        if self.recorder is not None:
            progress = {
                "iteration": done,
                "position": done * self.recipe.minibatch,
                "totals": self.step.totals.tolist(),
                "build": build_of(self.group.device),
            }
            save_checkpoint(self.folder, self.model, self.optimizer, progress)
        self.since += time.perf_counter() - started
        self.cpu_since += time.process_time() - cpu_started

    def _halt(self, done: int) -> None:
        self._finish("non-finite")
        rate = self.recipe.schedule((done - 1) * self.recipe.minibatch / self.samples)
        raise NonFiniteError(
            f"the loss or a gradient was not finite at iteration {done} (epoch"
            f" {done * self.recipe.minibatch / self.samples:.2f}, rate {rate:g}); checkpoints before it are kept in"
            f" {self.folder}. Use a lower base_lr, more warmup_epochs or a smaller minibatch"
        )

    def _finish(self, outcome: str) -> None:
        if self.recorder is not None:
            summary = summarise(self.folder, self.recipe, self.model, self.optimizer, outcome)
            self.recorder.end(summary)
            self.loggers.finish(summary)


def _span(position: int, recipe: Recipe, samples: int) -> tuple[int, int]:
    """The iterations whose training error belongs to an evaluation at `position`: those since the one before."""
    done = position // recipe.minibatch
    epoch = position // samples
    before = min(-(-(epoch - 1) * samples // recipe.minibatch), done) if epoch > 1 else 0
    return before, done
