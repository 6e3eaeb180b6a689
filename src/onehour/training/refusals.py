"""What a run refuses in one message: a model or an optimizer that it could not save, a sample, a device, a disk."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import Feed
from onehour.data.samples import leaves
from onehour.dist.group import Group
from onehour.execution import Execution
from onehour.messages import blame
from onehour.rules.batchnorm import ghost_layers
from onehour.training.state import load_optimizer, model_state, optimizer_state

random: Any = torch.random  # which has no types
STEPS = 12
"""Of an optimizer's trial, before what it keeps is saved and after."""
SHAPES = ((3, 2, 3, 3), (3,), (4, 12), (4,))
"""Of the trial's parameters: a convolution's and a linear layer's."""
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that takes nothing."""


class InputError(ValueError):
    """A sample that is not finite. All processes raise it together."""


@contextmanager
def in_words(folder: Path, per_pass: int = 1) -> Generator[None]:
    """Turn what a device or a disk refuses in the middle of a run into one message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(less_memory(per_pass)) from error
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise ValueError(
            f"{folder} cannot be written: {error.strerror}; the same command goes on once it can"
        ) from error


def refuse_execution(recipe: Recipe, execution: Execution) -> None:
    """Refuse where and how a recipe cannot run."""
    if recipe.reduce == "canonical" and execution.threads not in (None, recipe.canonical_threads):
        raise ValueError(
            f"a canonical run computes with the recipe's canonical_threads {recipe.canonical_threads}, since they are"
            f" part of its bits; leave --threads {execution.threads} out, or change canonical_threads"
        )
    if execution.noise and (recipe.ramp or recipe.scaling == "adascale"):
        raise ValueError(
            "--noise is of one minibatch, while the schedule's rate is at its peak; leave ramp and adascale out"
        )
    if execution.noise and recipe.bad_images == "skip":
        raise ValueError(
            "--noise reads minibatches ahead, and with bad_images skip each iteration counts the images that it skips;"
            " leave --noise out, or use bad_images error"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the host.

    The CPU's allocator has no type of its own for it, only its words.
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def less_memory(per_pass: int) -> str:
    """What to do where memory has run out with so many workers in a pass."""
    if per_pass > 1:
        return (
            f"out of memory with {per_pass} workers in a pass; give --workers-per-pass {per_pass // 2},"
            " which changes nothing that the run learns"
        )
    return (
        "out of memory with one worker in a pass; use --precision bf16, or a smaller --per-worker (which changes what"
        " BatchNorm sees, and so the loss)"
    )


def refuse_batch(batch: Any, name: Callable[[int], str]) -> None:
    """Refuse a batch for its first sample that is not finite.

    Looked for once a loss is not: no iteration pays for the look, and none waits for a device.

    Args:
        name: what a message calls row i.
    """
    found = _first_bad_row(batch)
    if found is not None:
        row, *counts = found
        raise _input_error(name(row), *counts)


def refuse_iterations(iterations: range, feed: Feed, passes: list[range], group: Group) -> None:
    """Refuse training data for the first sample of some iterations that is not finite; all processes call it together.

    The samples are read again: each is a function of its key.
    """
    assert feed.stream is not None
    found = torch.zeros(group.size, 5, dtype=torch.float64, device=group.device)
    batches = feed.passes(passes, start=iterations.start, stop=iterations.stop)
    for (iteration, workers), batch in zip(product(iterations, passes), batches, strict=True):
        first = _first_bad_row(batch)
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


def _first_bad_row(batch: Any) -> tuple[int, int, int, int] | None:
    """The first row that is not finite: its number, how many NaN and infinities it has, and how many values.

    Of a task's own batches those tensors are looked at that have a row a sample, as far as can be told.
    """
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    for tensor in tensors:
        values = tensor.reshape(len(tensor), -1)
        rows = (~values.isfinite().all(1)).nonzero()
        if len(rows):
            row = values[int(rows[0])]
            return int(rows[0]), int(row.isnan().sum()), int(row.isinf().sum()), row.numel()
    return None


def _input_error(name: str, nans: int, infinities: int, count: int) -> InputError:
    bad = nans + infinities
    kind = "NaN or infinite" if nans and infinities else "NaN" if nans else "infinite"
    values = f"{bad} of its {count} values {'is' if bad == 1 else 'are'} {kind}"
    return InputError(f"{name} is not finite: {values}; mend it, or leave it out")


def refuse_model(model: nn.Module, recipe: Recipe, image: Tensor | None) -> None:
    """Say why a model cannot be saved, or cannot be trained for what it returns in training.

    Args:
        image: as the model takes it, (C, H, W); None where a task of one's own says what the model returns.
    """
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(
                f"the model keeps {name}, a {type(value).__name__}, and a checkpoint holds tensors alone: register"
                " it as a buffer"
            )
        if value.is_complex():
            raise ValueError(
                f"the model keeps {name} as {value.dtype}, and runs hold real numbers alone: use torch.view_as_real"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "without memory" if value.is_meta else "quantized" if value.is_quantized else f"as {value.layout}"
            raise ValueError(f"the model keeps {name} {kind}, and a checkpoint holds plain tensors alone")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter that is trained; requires_grad is off in all of them")
    if image is not None:
        _refuse_training_output(model, recipe, image)


def _refuse_training_output(model: nn.Module, recipe: Recipe, image: Tensor) -> None:
    """What a model returns in training, where its copy without memory can tell; else its first pass does."""
    bare = {id(tensor): _bare(tensor) for tensor in chain(model.parameters(), model.buffers())}
    batch = torch.empty((recipe.per_worker, *image.shape), dtype=image.dtype, device="meta")
    seen: list[tuple[nn.Module, Tensor]] = []
    try:
        with random.fork_rng(devices=[]):
            copied = copy.deepcopy(model, dict(bare)).train()
            for layer in ghost_layers(copied):
                layer.seen = seen
            logits = copied(batch)
    except Exception:  # it computes with the values
        return
    refuse_rows(seen, workers=1)
    if not torch.is_tensor(logits) or logits.ndim != 2:
        shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(
            f"the model returned {shape} in training; expected logits of shape (N, classes): leave its auxiliary"
            " outputs out"
        )


def refuse_synchronised(model: nn.Module) -> None:
    """Refuse a BatchNorm whose statistics are not those of a pass."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    for name, module in modules:
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, whose statistics are those of all processes, and"
                f" batchnorm keep takes those of a pass; use torch.nn.BatchNorm1d, 2d or 3d there"
            )


def refuse_rows(seen: Iterable[tuple[Any, Tensor]], workers: int) -> None:
    """Refuse a BatchNorm that is given more rows than a pass has samples, such as every token of an image.

    Args:
        seen: ghost layers with the statistics that each has of a pass, (2, g, C).
        workers: g of the pass.
    """
    for layer, statistics in seen:
        n, found = layer.per_worker, statistics.shape[1]
        if found != workers:
            raise ValueError(
                f"a BatchNorm of {layer.num_features} channels is given {found * n} rows for {workers * n} samples, so"
                f" groups of {n} are not those of a worker; use --batchnorm keep"
            )


def _bare(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def refuse_optimizer(make: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
    """Say why a run with an optimizer could not go on from what a checkpoint holds.

    On parameters of a few numbers: steps that are interrupted and go on from the saved state must end as those that
    are not, and nothing else may change in a step than what is saved.
    """
    with random.fork_rng(devices=[device] if device.type == "cuda" else []):
        through, broken, after = (_Trial(make, device) for _ in range(3))
        name = type(through.optimizer).__name__
        through.step(1)
        before = through.kept()
        through.step(STEPS - 1, first=1)
        kept = through.kept()
        broken.step(STEPS)
        state = optimizer_state(broken.optimizer, broken.model)
        changed = [what for what in kept if what not in before or not _same(before[what], kept[what])]
        if changed:
            raise ValueError(
                f"optimizer {name} changes its {changed[0]} in a step, which no checkpoint holds: keep it in the"
                " parameters' state as a tensor or a number, or choose another optimizer"
            )
        after.model.load_state_dict(model_state(broken.model))
        load_optimizer(after.optimizer, after.model, state)
        through.step(STEPS, first=STEPS)
        after.step(STEPS, first=STEPS)
    if not all(map(torch.equal, through.model.parameters(), after.model.parameters())):
        raise ValueError(
            f"optimizer {name} does not go on from its saved state as without a stop: it keeps something outside the"
            " parameters' state; choose another optimizer"
        )


class _Trial:
    """An optimizer at work on a few numbers."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
        draws = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=draws).to(device)) for shape in SHAPES]
        self.model = nn.ParameterList(weights)
        self.optimizer = make(self.model)

    def step(self, steps: int, *, first: int = 0) -> None:
        for number in range(first, first + steps):
            draws = torch.Generator().manual_seed(number)
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.device)
            random.manual_seed(number)
            try:
                self.optimizer.step()
            except Exception as error:
                kind = type(self.optimizer).__name__
                raise ValueError(f"optimizer {kind} cannot make a step: {blame(error)}") from error

    def kept(self) -> dict[str, Any]:
        """Copies of what it holds besides the parameters' state and the numbers of its groups."""
        optimizer = self.optimizer
        found = {
            f"attribute {name!r}": value
            for name, value in vars(optimizer).items()
            if name not in ("state", "param_groups", "defaults")
        }
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key != "params" and not isinstance(value, float | int):
                    found[f"group's {key!r}"] = value
        return {what: copied for what, value in found.items() if (copied := _copied(value)) is not None}


def _copied(value: Any) -> Any:
    """A value as it is now; None for what cannot be copied, or is compared in vain."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    try:
        return None if callable(value) else copy.deepcopy(value)
    except Exception:
        return None


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if torch.is_tensor(one):
        return one.shape == other.shape and torch.equal(one, other)
    kind = one.__class__
    if issubclass(kind, dict):
        one, other = [*one.items()], [*other.items()]
    if issubclass(kind, dict | list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one == other) or type(one).__eq__ is object.__eq__
    except Exception:  # an array's comparison is none
        return repr(one) == repr(other)
