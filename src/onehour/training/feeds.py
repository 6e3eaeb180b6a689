"""A run's data as a process takes it: its share of the workers, how it loads them, and what is wrong with samples.

Images that could not be read are counted over all processes and named in the run's folder, and may not be too many; a
sample that is not finite is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.dataset import FaultError, in_memory
from onehour.data.loader import Feed, Skipped
from onehour.data.loader_processes import PATIENCE
from onehour.data.processes import in_child
from onehour.data.samples import leaves
from onehour.data.sources import Data
from onehour.dist.devices import pick_device
from onehour.dist.group import Group
from onehour.dist.launched import launched
from onehour.dist.placement import place, place_by_halving
from onehour.execution import Execution
from onehour.files import append_whole
from onehour.machine import own_share
from onehour.messages import shown
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream
from onehour.training.record import BAD_IMAGES
from onehour.training.task import classes_of

PASS_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Images a fused pass may hold: on the CPU, activations should stay in the caches; a GPU must be kept busy."""
SHARE = 0.001
"""Of an epoch's samples, how many may be others in the place of bad ones."""


class Feeds(NamedTuple):
    training: Feed
    validation: Feed

    def places(self, recipe: Recipe, data: Data, group: Group, per_pass: int) -> dict[str, Any]:
        """How this process takes the data, for the run's environment."""
        found: dict[str, Any] = {"processes": group.size, "workers_per_pass": per_pass}
        found |= {"loaders": self.training.loaders, "device": group.device.type}
        if data.names:
            found["class_names"] = data.names
        if recipe.validation:
            found |= zip(("training_samples", "validation_samples"), (look.samples for look in data.looks), strict=True)
        return found

    def close(self) -> None:
        self.training.close()
        self.validation.close()


def open_feeds(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    model: nn.Module,
    stream: SampleStream,
    group: Group,
    *,
    warn: Callable[[str], None] | None = None,
) -> Feeds:
    """Both sides of a run's data, as this process loads them.

    Args:
        model: whose outputs the labels must be, where the recipe does not say.
        warn: is told of processes that were replaced, in process 0.
    """
    classes = None if data.form.own else classes_of(recipe, data, model, group.device)
    loaders = pick_loaders(execution, data)
    # A stuck loader is replaced long before the watchdog would end the run for it.
    patience = execution.hang_timeout / 4 if execution.hang_timeout else PATIENCE
    options: Any = {"patience": patience, "warn": warn if group.rank == 0 else None}
    feed = partial(Feed, loaders=loaders, device=group.device, classes=classes, form=data.form, **options)
    return Feeds(
        feed(data.train, seed=recipe.seed, stream=stream, look=data.looks[0]),
        feed(data.validation, seed=seed_for(recipe.seed, "validation"), look=data.looks[1]),
    )


def pick_share(recipe: Recipe, group: Group) -> range:
    """The workers that this process hosts."""
    division = place_by_halving if recipe.reduce == "canonical" else place
    return division(recipe.workers.workers, group.size, together=recipe.together)[group.rank]


def pick_workers_per_pass(execution: Execution, recipe: Recipe, data: Data, model: nn.Module, device: str) -> int:
    """How many workers share a pass: what was asked for, else as many as `PASS_BYTES` of images allow.

    One where the model draws random numbers (dropout), since those are keyed by the pass; for channels_last, where
    fusing would copy; and for a task of one's own, which may look at all samples of its worker together. A canonical
    run's recipe says how many.
    """
    if recipe.reduce == "canonical":
        return recipe.together
    if recipe.batchnorm == "keep" or recipe.scaling == "adascale":
        return 1
    shares = {len(share) for share in place(recipe.workers.workers, execution.processes)}
    together = execution.workers_per_pass
    if together is None:
        one = (recipe.channels_last and device != "cuda") or draws_numbers(model) or recipe.task is not None
        together = 1 if one else workers_that_fit(recipe, data, device)
    together = min(together, max(shares))
    if not recipe.compile and (device != "cuda" or execution.workers_per_pass is not None):
        return together  # sizes cost nothing here, and bits of runs that exist depend on them
    equal = max(size for size in range(1, together + 1) if not any(share % min(size, share) for share in shares))
    # For each size a graph is compiled, or kernels are chosen; only the first is worth more passes.
    more = any(-(-share // equal) > -(-share // together) for share in shares)
    return together if more and not recipe.compile else equal


def workers_that_fit(recipe: Recipe, data: Data, device: str, *, seeds: int | None = None) -> int:
    """How many workers' images a pass may hold by `PASS_BYTES`, at least one.

    Args:
        seeds: S, where the pass is of several runs as one network; None for a run alone.
    """
    room, image = PASS_BYTES[device], data.looks[1].image.numel() * 4
    if seeds is not None and device == "cpu":
        room //= 4  # every activation is S times as large
    return max(1, room // (image * recipe.per_worker * (seeds or 1)))


def draws_numbers(model: nn.Module) -> bool:
    """Whether the model's forward pass draws random numbers: dropout, also inside a layer, and drop-path."""
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU)  # pyright: ignore[reportPrivateUsage]
        or type(module).__name__ == "StochasticDepth"  # torchvision's
        or any(
            isinstance(p, int | float) and p > 0
            for p in map(vars(module).get, ("dropout", "drop_prob", "drop_rate"))  # torch's layers, timm's
        )
        for module in model.modules()
    )


def pick_loaders(execution: Execution, data: Data, share: int | None = None) -> int:
    """Processes that load for each process: none for tensors in memory; half of its cores, or all for a GPU.

    Args:
        share: cores of this process; None divides the machine's.
    """
    if execution.loaders is not None:
        return execution.loaders
    if in_memory(data.train) and data.form.collate is None:
        return 0
    share = own_share(launched().local_size or execution.processes) if share is None else share
    return max(1, share if pick_device(execution.device) == "cuda" else share // 2)


class Skipping:
    """What of a run's images was skipped since it began."""

    def __init__(self, recipe: Recipe, feed: Feed, group: Group, folder: Path, inside: Path) -> None:
        assert recipe.samples is not None
        self.samples, self._position = recipe.samples, recipe.phases(recipe.samples).position
        self.feed, self.group, self.folder, self._inside = feed, group, folder, inside
        self.skipped = torch.zeros((), dtype=torch.float64, device=group.device)
        """How many were replaced, in all processes."""
        self._too_many = torch.zeros((), device=group.device)
        self._first: tuple[int, Tensor] | None = None
        self._named = 0

    def add(self, iteration: int, skipped: Tensor) -> Tensor:
        """Count an iteration's; above zero once they are more than may be since this process began."""
        first, before = self._first = self._first or (iteration, self.skipped.clone())
        self.skipped += skipped
        limit = too_many(self._position(first), self._position(iteration + 1), self.samples)
        self._too_many.logical_or_(self.skipped - before > limit)
        return self._too_many

    def count(self, *, together: bool = True) -> int:
        """How many so far; where all processes call it together, new ones are named in the folder."""
        skipped = int(self.skipped.item())
        if not together:
            return skipped
        folder = self._inside if self.group.rank == 0 else None
        if skipped != self._named:  # the same number in all processes
            self._named = skipped
            name_skipped(folder, self.feed.dataset, self.feed.skipped, self._sum)
        elif folder is not None and self.feed.skipped.indices:  # refused by the disk before
            name_skipped(folder, self.feed.dataset, self.feed.skipped, lambda flags: flags)
        return skipped

    def refuse_too_many(self, done: int, saved: str) -> None:
        """Say why a stop was asked for, if it was for this.

        Args:
            saved: whether the stop was, and where the same command goes on.
        """
        if self._too_many.item():
            raise ValueError(
                f"{int(self.skipped.item())} training images could not be read up to iteration {done}, more than"
                f" 0.1 % of an epoch; {self.folder / BAD_IMAGES} names them. Restore or remove"
                f" them; the run has stopped there and {saved}"
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.group.sum(tensor.to(self.group.device)).cpu()


def too_many(first: int, position: int, samples: int) -> float:
    """How many replaced images end a run when they are more: 0.1 % of N for every epoch of which it has drawn samples.

    Args:
        first, position: it has drawn the stream's positions [first, position) since it began or resumed.
    """
    return SHARE * samples * (-(-position // samples) - first // samples)


def name_skipped(folder: Path | None, dataset: Any, skipped: Skipped, add: Callable[[Tensor], Tensor]) -> None:
    """Write the names of what any process has skipped since the last call; all processes call it together.

    What the disk refuses stays in `skipped` of the process that writes, for the next call.

    Args:
        folder: the run's, in the process that writes it; None in the others.
        add: sums a tensor over the processes.
    """
    flags = torch.zeros(len(dataset), dtype=torch.int32)
    flags[list(skipped.indices)] = 1
    skipped.indices.clear()
    found: list[int] = add(flags).nonzero().flatten().numpy().tolist()
    if folder is None or not found:
        return
    path = folder / BAD_IMAGES
    try:
        old = path.read_bytes() if path.is_file() else b""
        whole = old[: old.rfind(b"\n") + 1]  # a line without its end is what a full disk or a kill has left
        new = sorted(set(found) - _indices(whole))
        described = in_child(lambda: [_described(dataset, index) for index in new], "a look at bad images")
        lines = [json.dumps({"index": i, **found}) + "\n" for i, found in zip(new, described, strict=True)]
        append_whole(folder, BAD_IMAGES, "".join(lines).encode(), behind=len(whole))
    except (OSError, ValueError):
        skipped.indices.update(found)


def _indices(lines: bytes) -> set[int]:
    found = set[int]()
    for line in lines.splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            found.add(json.loads(line)["index"])
    return found


def _described(dataset: Any, index: int) -> dict[str, str]:
    try:
        dataset.keyed(index, 0)
    except FaultError as fault:
        return {"image": shown(fault.path), "problem": shown(fault.problem), "remedy": shown(fault.remedy)}
    return {"image": shown(dataset.name(index)), "problem": "could not be read where it was needed", "remedy": ""}


class InputError(ValueError):
    """A sample that is not finite. All processes raise it together."""


def refuse_batch(batch: Any, name: Callable[[int], str], *, samples: int, own: bool = False) -> None:
    """Refuse a batch for its first sample that is not finite.

    Looked for once a loss is not: no iteration pays for the look, and none waits for a device.

    Args:
        name: what a message calls row i.
        samples: how many the batch has.
        own: whether it is a task's own, of any kind.
    """
    found = _first_bad_row(batch, samples, own=own)
    if found is not None:
        row, *counts = found
        raise _input_error(name(row), *counts)


def refuse_samples(iterations: range, feed: Feed, passes: list[range], group: Group, *, together: bool = False) -> None:
    """Refuse training data for the first sample of some iterations that is not finite; all processes call it together.

    The samples are read again: each is a function of its key.

    Args:
        together: of several seeds as one network, each of which takes all samples.
    """
    if together:
        images = feed.dataset.tensors[0]
        refuse_batch(images, feed.called, samples=len(images))
        return
    assert feed.stream is not None
    found = torch.zeros(group.size, 5, dtype=torch.float64, device=group.device)
    batches = feed.passes(passes, start=iterations.start, stop=iterations.stop)
    for (iteration, workers), batch in zip(product(iterations, passes), batches, strict=True):
        count = len(workers) * feed.stream.ramp.at(iteration).minibatch.per_worker
        first = _first_bad_row(batch, count, own=feed.own)
        if first is not None:
            row, *counts = first
            index = int(feed.stream.indices(iteration, workers)[row])
            replaced = index in feed.skipped.indices
            found[group.rank] = torch.tensor([index + 1, *counts, replaced], dtype=torch.float64)
            break
    for index, nans, infinities, count, replaced in group.sum(found).long().cpu().numpy().tolist():
        if index:
            name = feed.called(index - 1)
            called = f"what was taken in the place of {name}" if replaced else name
            raise _input_error(called, nans, infinities, count)


def _first_bad_row(batch: Any, samples: int, *, own: bool) -> tuple[int, int, int, int] | None:
    """The first sample that is not finite: its row, how many NaN and infinities it has, and how many values.

    Of a task's own batches those tensors are looked at that have a row a sample, for NaN alone: a mask may be infinite.
    """
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples]
    for tensor in tensors:
        values = tensor.reshape(samples, -1)
        rows = (values.isnan() if own else ~values.isfinite()).any(1).nonzero()
        if len(rows):
            row = values[int(rows[0])]
            return int(rows[0]), int(row.isnan().sum()), int(row.isinf().sum()), row.numel()
    return None


def _input_error(name: str, nans: int, infinities: int, count: int) -> InputError:
    bad = nans + infinities
    kind = "NaN or infinite" if nans and infinities else "NaN" if nans else "infinite"
    values = f"{bad} of its {count} values {'is' if bad == 1 else 'are'} {kind}"
    return InputError(f"{name} is not finite: {values}; fix it, or leave it out")
