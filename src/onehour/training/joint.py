"""Runs that differ by their seed alone, trained as one network; each writes its own folder, as if it ran alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from onehour.config import Recipe
from onehour.data.loader import CHUNK
from onehour.data.look import in_memory
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.training.build import OPTIMIZERS, build_model, draws_numbers
from onehour.training.checkpoint import Checkpoints
from onehour.training.determinism import build_of, deterministic
from onehour.training.ends import StoppedError
from onehour.training.environment import environment
from onehour.training.evaluate import Evaluation
from onehour.training.inputs import refuse_batch
from onehour.training.join import join_models, join_optimizer, refuse_difference, split_models, split_optimizer
from onehour.training.joint_step import JointStep
from onehour.training.measure import NOT_FINITE, measured, timed
from onehour.training.pitfalls import decisions_of
from onehour.training.precision import forward
from onehour.training.record import Recorder
from onehour.training.summary import summarise
from onehour.training.timing import StepTimer

__all__ = ["refuse_joining", "train_joint"]

PASS_BYTES = {"cpu": 2**18, "cuda": 2**27}
"""Images of all seeds that a pass may hold: less than for a run alone, since every activation is S times as large."""

SAVE_SECONDS = 10.0
"""Between checkpoints at most, counted at evaluations."""


def refuse_joining(recipe: Recipe, data: Data, group: Group) -> None:
    """Say why runs of a recipe cannot be trained as one network.

    Raises:
        ValueError: with the reason.
    """
    if not (in_memory(data.train) and in_memory(data.validation)):
        raise ValueError("the data does not lie in memory as tensors")
    if recipe.reduce != "fast" or recipe.compile or recipe.channels_last:
        raise ValueError("reduce canonical, compile and channels_last are for single runs")
    if recipe.optimizer not in ("sgd", *OPTIMIZERS):
        raise ValueError(f"optimizer {recipe.optimizer} may look at whole tensors")
    models = [build_model(recipe.replace(seed=seed), data, group.device) for seed in (0, 1)]
    if draws_numbers(models[0]):
        raise ValueError("the model draws random numbers")
    images = data.train.tensors[0]
    chosen = torch.arange(2 * recipe.per_worker) % len(images)
    refuse_difference(models, images[chosen].to(group.device).view(2, -1, *images.shape[1:]))


def train_joint(
    recipes: Sequence[Recipe],
    data: Data,
    folders: Sequence[Path],
    group: Group,
    *,
    stop_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Train runs of one recipe and several seeds, resuming where their folders stand.

    Those that stand at the same iteration go on together.

    Args:
        recipes: completed, alike but for the seed; `refuse_joining` has nothing against them.
        folders: of each; new or unfinished.

    Raises:
        ValueError: for a folder of something else, or a sample because of which a loss is not finite.
        FolderLostError: if one was moved or removed; all go on from what was saved last.
        StoppedError: when asked to stop; all are saved.
    """
    assert len({recipe.replace(seed=0) for recipe in recipes}) == 1
    with deterministic(recipes[0]), ExitStack() as stack:
        runs = []
        for recipe, folder in zip(recipes, folders, strict=True):
            recorder = Recorder(folder, recipe)
            stack.callback(recorder.close)
            runs.append(_Run(recipe, data, recorder, group))
            stack.callback(runs[-1].checkpoints.close)
        for start in sorted({run.start for run in runs}, reverse=True):
            _Joint([run for run in runs if run.start == start], data, group).train(start, stop_asked)


class _Run:
    """One of the runs: its folder, and its state whenever it is not inside the joined network."""

    def __init__(self, recipe: Recipe, data: Data, recorder: Recorder, group: Group) -> None:
        self.recipe, self.recorder = recipe, recorder
        self.decisions = decisions_of(recipe)
        self.model = build_model(recipe, data, group.device)
        self.optimizer = self.decisions.optimizer(self.model)
        self.checkpoints = Checkpoints(recorder.folder, recipe, group, warn=print, inside=recorder.inside)
        progress = self.checkpoints.load(self.model, self.optimizer)
        self.start: int = progress["iteration"] if progress else 0
        self.totals: list[float] = progress["totals"] if progress else [0.0, 0.0]
        self.ended = False

    def end(self, outcome: str, together: int) -> None:
        self.recorder.check()
        summary = summarise(self.recorder.inside, self.recipe, self.model, self.optimizer, outcome)
        self.recorder.end(summary | {"seeds_together": together})
        self.ended = True


class _Joint:
    def __init__(self, runs: list[_Run], data: Data, group: Group) -> None:
        self.runs, self.group, self.recipe = runs, group, runs[0].recipe
        models: list[nn.Module] = [run.model for run in runs]
        self.parts = [(run.optimizer, run.model) for run in runs]
        self.model = join_models(models).to(group.device)
        self.optimizer = runs[0].decisions.optimizer(self.model)
        join_optimizer(self.optimizer, self.model, self.parts)
        images, labels = (tensor.to(group.device) for tensor in _tensors(data.train))
        self.validation = [tensor.to(group.device) for tensor in _tensors(data.validation)]
        share = range(self.recipe.workers.workers)
        worker = images[0].numel() * 4 * self.recipe.per_worker * len(runs)
        per_pass = max(1, min(len(share), PASS_BYTES[group.device.type] // worker))
        self.timer = StepTimer(group.device)
        self.step = JointStep(
            [run.decisions for run in runs],
            self.model,
            self.optimizer,
            images=images,
            labels=labels,
            passes=passes(share, per_pass),
            timer=self.timer,
        )
        self.step.totals.copy_(torch.tensor([run.totals for run in runs], dtype=torch.float64))
        self.places = {
            "processes": 1,
            "workers_per_pass": per_pass,
            "loaders": 0,
            "device": group.device.type,
            "seeds_together": len(runs),
        }

    def train(self, start: int, stop_asked: Callable[[], bool]) -> None:
        for run in self.runs:
            for note in run.recorder.notes:
                print(f"warning: {note}")
            run.recorder.begin(start, environment(self.places))
        samples, minibatch = self.runs[0].decisions.samples, self.recipe.minibatch
        iterations = self.recipe.workers.iterations(samples, self.recipe.epochs)
        self._mark(start)
        saved = time.monotonic()
        self.model.train()
        for iteration in range(start, iterations):
            self.step(iteration)
            done = iteration + 1
            ends_epoch = done * minibatch // samples > iteration * minibatch // samples
            if ends_epoch:
                self._evaluate(done)
                if all(run.ended for run in self.runs):
                    return
            if done == iterations or (ends_epoch and time.monotonic() - saved > SAVE_SECONDS):
                self._save(done)
                saved = time.monotonic()
            if stop_asked() and done < iterations:
                self._save(done)
                raise StoppedError(f"stopped after iteration {done} and saved; the same command goes on from there")
        for run in self._live():
            run.end("finished", len(self.runs))

    def _live(self) -> list[_Run]:
        return [run for run in self.runs if not run.ended]

    def _mark(self, done: int) -> None:
        self.since, self.cpu_since, self.evaluated = time.perf_counter(), time.process_time(), done

    def _evaluate(self, done: int) -> None:
        steps = self.timer.steps()
        seconds, cpu_seconds = time.perf_counter() - self.since, time.process_time() - self.cpu_since
        self.step.look()
        results = self._results()
        evaluating = time.perf_counter() - self.since - seconds
        totals, alive = self.step.totals.tolist(), self.step.alive.tolist()
        self._refuse_data(alive, results)
        self.step.totals.zero_()
        for seed, run in enumerate(self.runs):
            if run.ended:
                continue
            run.recorder.check()
            if not alive[seed]:
                self.step.clear(seed)
                run.end("non-finite", len(self.runs))
                continue
            record = measured(run.decisions, done, tuple(totals[seed]), results[seed])
            if record["val_loss"] is None:
                print(f"{run.recorder.folder.name}: warning: {NOT_FINITE}")
            timing = timed(
                record,
                (done - self.evaluated) * self.recipe.minibatch,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                evaluating=evaluating,
                steps=steps,
                runs=len(self.runs),
            )
            run.recorder.add(record, timing)
        self._mark(done)

    def _refuse_data(self, alive: list[bool], results: list[Evaluation]) -> None:
        """Refuse a sample that is not finite where a loss is not: every seed takes all of them in an epoch."""
        if not all(lives or run.ended for lives, run in zip(alive, self.runs, strict=True)):
            refuse_batch(self.step.images, "training sample {}".format)
        if not all(math.isfinite(result.loss) for result, lives in zip(results, alive, strict=True) if lives):
            refuse_batch(self.validation[0], "validation sample {}".format)

    @torch.no_grad()
    def _results(self) -> list[Evaluation]:
        seeds = len(self.runs)
        losses = torch.zeros(seeds, dtype=torch.float64, device=self.group.device)
        errors = torch.zeros(seeds, dtype=torch.int64, device=self.group.device)
        self.model.eval()
        for images, labels in zip(*(tensor.split(CHUNK) for tensor in self.validation), strict=True):
            logits = forward(self.model, images.repeat(1, seeds, *[1] * (images.ndim - 2)), self.recipe)
            logits = logits.view(len(images), seeds, -1).transpose(1, 2)
            labels = labels.long()[:, None].expand(-1, seeds)
            losses += F.cross_entropy(logits.double(), labels, reduction="none").sum(0)
            errors += ((logits.argmax(1) != labels) | logits.isnan().any(1)).sum(0)
        self.model.train()
        samples = len(self.validation[1])
        return [
            Evaluation(errors=wrong, samples=samples, loss=loss / samples)
            for wrong, loss in zip(errors.tolist(), losses.tolist(), strict=True)
        ]

    def _save(self, done: int) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        for run in self.runs:
            run.checkpoints.wait()  # what is being written lies in the models that are filled now
        split_models(self.model, [run.model for run in self.runs])
        split_optimizer(self.optimizer, self.model, self.parts)
        self.step.look()
        alive = self.step.alive.tolist()
        for run, totals, lives in zip(self.runs, self.step.totals.tolist(), alive, strict=True):
            if run.ended or not lives:  # one that has just left the finite numbers keeps its last finite checkpoint
                continue
            progress = {
                "iteration": done,
                "position": done * self.recipe.minibatch,
                "totals": totals,
                "build": build_of(self.group.device),
            }
            run.checkpoints.save(run.model, run.optimizer, progress, first=run.recorder.catch_up)
        self.since += time.perf_counter() - started
        self.cpu_since += time.process_time() - cpu_started


def _tensors(dataset: TensorDataset) -> tuple[torch.Tensor, ...]:
    return dataset.tensors
