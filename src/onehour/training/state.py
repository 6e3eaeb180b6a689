"""What a run consists of between two iterations: its network, and weights, statistics and velocity as tensors by name.

An optimizer's numbers are tensors too, of their exact type and value; their names end in "#". A model or an optimizer
that could not be kept so, or could not be trained, is refused here.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.dist.devices import own_numbers
from onehour.messages import blame

NUMBER = "#"
OF_THE_RECIPE = {"params", "lr", "lr_scale", "initial_lr", "weight_decay"}
"""What a run gives an optimizer's groups by itself."""
PREFIX = "ema/"
"""Of their names in a checkpoint, where what an optimizer keeps is called after its parameter."""
TYPES = (
    {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    | {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
    | {torch.uint8: "U8", torch.bool: "BOOL"}
)
"""Of tensors, by the names that safetensors' format has for them."""
STEPS = 12
"""Of an optimizer's trial, before what it keeps is saved and after."""
SHAPES = ((3, 2, 3, 3), (3,), (4, 12), (4,))
"""Of the trial's parameters: a convolution's and a linear layer's."""
random: Any = torch.random  # which has no types


class AveragedWeights:
    """ā ← ρ·ā + (1 − ρ)·w after each update, from the initial weights on, for every parameter that trains.

    Buffers are the model's own: BatchNorm's running statistics are averages already, and averaged again would be those
    of older weights than ā is made of.

    Args:
        decay: ρ' of the run's minibatch.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self._named = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._weights: list[Tensor] = list(dict.fromkeys(self._named.values()))
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._share = self._averages[0].new_tensor(1 - decay)

    def set_decay(self, decay: float) -> None:
        """Go on with ρ' of another minibatch."""
        self._share.fill_(1 - decay)

    @torch.no_grad()
    def move(self, live: Tensor) -> None:
        """Take the weights in; not where `live`, a boolean scalar tensor, is false: the host need not know it."""
        untyped: Any = torch
        moves = untyped._foreach_sub(self._weights, self._averages)
        untyped._foreach_mul_(moves, self._share * live)
        untyped._foreach_add_(self._averages, moves)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """While entered, the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By value: a CUDA graph knows both by their places in memory."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The averages where they lie, by names for a checkpoint."""
        lies = dict(zip(self._weights, self._averages, strict=True))
        return {f"{PREFIX}{name}": lies[weight] for name, weight in self._named.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave out of a checkpoint's tensors."""
        for name, average in self.state().items():
            average.copy_(state.pop(name))


def averages_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averages among a checkpoint's tensors, by their parameters' names."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


class Network:
    """A model, its optimizer, and the average of its weights if there is one: a run's own, or S runs' as one.

    Args:
        ema: ρ' of the run's minibatch, where the weights are averaged.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, ema: float | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.average = None if ema is None else AveragedWeights(model, ema)
        self._copying: Future[None] | None = None

    @property
    def parts(self) -> Sequence[Network]:
        """What each of its runs has of it: one run has all."""
        return [self]

    def give_back(self) -> None:
        """Let each run's part hold what was trained; it does."""

    def alive(self, known: Tensor) -> Tensor:
        """Which seeds have finite numbers alone, bool (S,).

        Args:
            known: what the last iteration has found.
        """
        return known

    def clear(self, seed: int) -> None:
        """Take a seed that has left the finite numbers out of the network; alone, it ends the run."""

    def state(self) -> list[dict[str, Tensor]]:
        """Weights and buffers, then what the optimizer keeps and the averages, where they lie."""
        average = {} if self.average is None else self.average.state()
        return [dict(self.model.state_dict()), optimizer_state(self.optimizer, self.model) | average]

    def load(self, weights: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            KeyError, RuntimeError: for that of another network.
        """
        self.model.load_state_dict(weights)
        if self.average is not None:
            self.average.load(kept)
        load_optimizer(self.optimizer, self.model, kept)

    def begin_copy(self, thread: Executor) -> tuple[int, list[dict[str, Tensor]]]:
        """How many bytes `state` has, and a list for copies of it in CPU memory, which `thread` fills."""
        states, copies = self.state(), list[dict[str, Tensor]]()
        # A forward pass may change buffers before `finish_copy`.
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        states[0] |= {name: buffer.clone() for name, buffer in buffers.items() if name in states[0]}
        self._copying = thread.submit(lambda: copies.extend(map(host_copies, states)))
        return sum(tensor.nbytes for state in states for tensor in state.values()), copies

    def finish_copy(self) -> None:
        """Call this before an update: returns once nothing that is copied lies where the update changes it."""
        if (copying := self._copying) is not None:
            copying.result()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of weights and buffers in CPU memory, by torch's names."""
    return host_copies(model.state_dict())


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Velocity and whatever else the optimizer keeps, where it lies, by parameter/key.

    Of its groups, the numbers that are not its defaults, such as a count of steps; not what the recipe says.
    """
    state, parameters = dict[str, Tensor](), dict(model.named_parameters())
    keeps = f"optimizer {type(optimizer).__name__} keeps"
    if optimizer.state.keys() - set(parameters.values()):
        raise ValueError(
            f"{keeps} state that belongs to no parameter, and a checkpoint holds only that of"
            " parameters and groups; choose another optimizer"
        )
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not value.is_complex() and value.layout is torch.strided:
                state[f"{name}/{key}"] = value.detach()
            elif isinstance(value, float | int):
                state[f"{name}/{key}{NUMBER}"] = _exact(value)
            elif value is not None:
                kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{keeps} a {kind} as {key!r}, and a checkpoint holds plain tensors of real numbers and numbers"
                    " alone; choose another optimizer"
                )
    for name, group in _groups(optimizer).items():
        for key in group.keys() - OF_THE_RECIPE:
            if isinstance(group[key], float | int) and group[key] != optimizer.defaults.get(key):
                state[f"{name}/{key}{NUMBER}"] = _exact(group[key])
    return state


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` took.

    Raises:
        KeyError: for a state of another model's.
    """
    parameters, groups = dict(model.named_parameters()), _groups(optimizer)
    fused, capturable = getattr(optimizer, "_step_supports_amp_scaling", False), optimizer.defaults.get("capturable")
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        if key.endswith(NUMBER):
            key = key.removesuffix(NUMBER)
            if name in groups and key in OF_THE_RECIPE:
                raise KeyError(full)
            kept = groups[name] if name in groups else optimizer.state[parameters[name]]
            kept[key] = value.item()
            continue
        parameter = parameters[name]
        if key != "step" or fused or capturable:  # else it is counted on the host
            value = value.to(parameter.device)
            if value.shape == parameter.shape:  # a fused optimizer pairs the two by their places in memory
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        known = optimizer.state[parameter].get(key)
        if isinstance(known, Tensor):
            known.copy_(value)
        else:
            optimizer.state[parameter][key] = value


def host_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in CPU memory, pinned where they come from a GPU, whose copies then go on beside each other."""
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        for name, tensor in state.items()
    }
    for device in {tensor.device for tensor in state.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def digest_of(*states: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _groups(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {f"group {number}": group for number, group in enumerate(optimizer.param_groups)}


def _exact(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def as_safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A file of tensors in CPU memory, in safetensors' format, part by part.

    A header's length (8 bytes, little-endian), a JSON header of types, shapes and offsets, then the tensors: wide types
    first, as the format wants them aligned to their own size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files here do not hold; use float32")
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def refuse_model(model: nn.Module) -> None:
    """Say why a model cannot be saved or trained."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    for name, module in modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ValueError(f"{name or 'the model'} gives sparse gradients, and a run's are dense; use sparse=False")
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(
                f"the model keeps {name}, a {type(value).__name__}, and a checkpoint holds only tensors: register"
                " it as a buffer"
            )
        if value.is_complex():
            raise ValueError(
                f"the model keeps {name} as {value.dtype}, and runs hold real numbers alone: use torch.view_as_real"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "without memory" if value.is_meta else "quantized" if value.is_quantized else f"as {value.layout}"
            raise ValueError(f"the model keeps {name} {kind}, and a checkpoint holds only plain tensors")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter that is trained; requires_grad is off in all of them")


def refuse_synchronised(model: nn.Module) -> None:
    """Refuse a BatchNorm whose statistics are not those of a pass."""
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]
    for name, module in modules:
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, whose statistics are those of all processes, and"
                f" batchnorm keep takes those of a pass; use torch.nn.BatchNorm1d, 2d or 3d there"
            )


def refuse_optimizer(make: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
    """Say why a run with an optimizer could not go on from what a checkpoint holds.

    On parameters of a few numbers: steps that are interrupted and go on from the saved state must end as those that
    are not, and nothing else may change in a step than what is saved.
    """
    with own_numbers(device):
        through, broken, after = (_Trial(make, device) for _ in range(3))
        name = type(through.optimizer).__name__
        through.step(1)
        before = through.kept()
        through.step(STEPS - 1, first=1)
        kept = through.kept()
        broken.step(STEPS)
        state = host_copies(optimizer_state(broken.optimizer, broken.model))  # as from a checkpoint
        changed = [what for what in kept if what not in before or not _same(before[what], kept[what])]
        if changed:
            raise ValueError(
                f"optimizer {name} changes its {changed[0]} in a step, which no checkpoint holds: keep it in the"
                " parameters' state as a tensor or a number, or choose another optimizer"
            )
        after.model.load_state_dict(broken.model.state_dict())
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
