"""A model's weights outside its run: read, evaluated, exported under torch's own names."""

from __future__ import annotations

import warnings
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.loader import Feed
from onehour.dist.group import Group
from onehour.execution import Execution
from onehour.files import written
from onehour.messages import shown
from onehour.rules.keys import seed_for
from onehour.sidefile import is_object
from onehour.training.build import build_model, classes_of, complete, pick_device, pick_loaders
from onehour.training.checkpoint import latest_contents
from onehour.training.engine import Evaluation, evaluate
from onehour.training.record import Run
from onehour.training.store import Store, as_safetensors, checkpoint_folders, digest_of_recipe

__all__ = ["bytes_of", "evaluate_weights", "export_weights", "few", "fit", "read_weights", "weights_in"]

FORMATS = (".safetensors", ".pt", ".pth")
INSIDE = ("state_dict", "model")
"""Where trainers' checkpoints have the weights, beside what else they hold."""
WRAPPERS = ("module.", "_orig_mod.")
"""What every name begins with where DDP's or torch.compile's wrapper was saved in place of the model."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights and buffers in a run's newest verified checkpoint, in one of its checkpoints, or in a file.

    A .pt file is read with `weights_only=True` alone: nothing in it is executed.

    Raises:
        ValueError: if there are none, or the file is none.
    """
    return weights_in(path, bytes_of(path))


def bytes_of(path: Path) -> bytes:
    """The file that holds the weights, whole: of a run or a checkpoint its model.safetensors, once it is verified.

    Raises:
        ValueError: if there is none, or it cannot be one.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    whole = path.absolute()
    folder = whole.parent.parent
    if whole in checkpoint_folders(folder):
        try:
            return Store(folder, recipe=digest_of_recipe(Run(folder).recipe)).verified(whole).contents[0]
        except ValueError as error:
            raise ValueError(f"{path} is no checkpoint that can be trusted: {error}") from error
    if path.is_dir():
        contents = latest_contents(Run(path).folder)
        if contents is None:
            raise ValueError(f"{path} has no checkpoint yet")
        return contents[0]
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path} is not a weights file; expected a run's folder or a file ending in {', '.join(FORMATS)}"
        )
    if not path.is_file():  # a pipe, say, which would be waited for
        raise ValueError(f"{path} is not a regular file")
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_line(error)}") from error


def weights_in(path: Path, content: bytes) -> dict[str, Tensor]:
    """The weights and buffers in what `bytes_of` gave; of a file under the model's own names, without `WRAPPERS`.

    Raises:
        ValueError: if it holds anything else.
    """
    ours = path.is_dir()
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of odd files beside refusing them
            if ours or path.suffix == ".safetensors":
                state: Any = load(content)
            elif content[257:262] == b"ustar":  # torch would unpack it into a folder before it refuses it
                raise ValueError("it is in the oldest of torch's formats, a tar; load it there, and save it again")
            else:
                state = torch.load(BytesIO(content), "cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_line(error)}") from error
    except Exception as error:  # torch raises its unpickler's own class for what weights_only refuses
        raise ValueError(f"{path} holds more than tensors, or is damaged; it was not loaded") from error
    if is_object()(state):
        state = next((state[name] for name in INSIDE if is_object()(state.get(name))), state)
    if not (is_object()(state) and state and all(isinstance(name, str) for name in state)):
        raise ValueError(f"{path} holds no state dict of tensors")
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            raise ValueError(f"{path} holds no state dict of tensors: {shown(name)} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or _grows(tensor):
            raise ValueError(f"{path}: {shown(name)} is not a plain tensor; expected one that is stored as it is")
    found = {str(name): tensor.detach() for name, tensor in state.items()}
    while not ours and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in found)), None)):
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def fit(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights into a model, strictly.

    Raises:
        ValueError: naming the keys that are missing or too many, or the first shape that differs.
    """
    own = model.state_dict()
    # num_batches_tracked is younger than many files; with a fixed momentum nothing reads it.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    wrong = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or extra:
        parts = (f"it {verb} {few(names)}" for verb, names in (("lacks", missing), ("also has", extra)) if names)
        raise ValueError(f"{source} is of another model: {' and '.join(parts)}")
    if wrong:
        there, here = tuple(weights[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ValueError(f"{source} is of another model: {shown(wrong[0])} is {there}, expected {here}")
    model.load_state_dict(weights, strict=False)


def evaluate_weights(source: Path, *, recipe: Recipe, data: Any = None, device: str = "auto") -> Evaluation:
    """The error on the recipe's validation data of the weights in `source`.

    Args:
        source: as for `read_weights`.
        recipe: names model and data, and the precision.
        data: (train, validation) in place of the recipe's.
    """
    weights = read_weights(source)
    recipe, loaded = complete(recipe, data, trains=False)
    where = torch.device(pick_device(device))
    model = build_model(recipe, loaded, where)
    fit(model, weights, source)
    seed, loaders = seed_for(recipe.seed, "validation"), pick_loaders(Execution(), loaded)
    classes, look = classes_of(recipe, loaded, model, where), loaded.looks[1]
    with closing(Feed(loaded.validation, seed=seed, loaders=loaders, device=where, classes=classes, look=look)) as feed:
        return evaluate(model, feed, recipe, group=Group(device=where))[0]


def export_weights(source: Path, to: Path) -> Path:
    """Write the weights of a run, or of a file, as a plain state dict, whole or not at all.

    Args:
        source: as for `read_weights`.
        to: ends in .safetensors or .pt; loads in torchvision's and timm's model of the same name.

    Raises:
        ValueError: for another ending, a file that is there already, or a disk that refuses; nothing is left then.
    """
    if to.suffix not in FORMATS:
        raise ValueError(f"--to {to} must end in .safetensors or .pt")
    if to.exists():
        raise ValueError(f"{to} exists; remove it first, or choose another name")
    # A tensor of its own for each name: tied weights share one, and a view would bring all that it is a view of.
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in read_weights(source).items()
    }
    buffer = BytesIO()
    if to.suffix != ".safetensors":
        torch.save(weights, buffer)  # to the file itself, it would call a full disk by another name
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with written(to.parent, to.name) as file:
            for part in as_safetensors(weights) if to.suffix == ".safetensors" else [buffer.getbuffer()]:
                file.write(part)
    except OSError as error:
        size = sum(tensor.nbytes for tensor in weights.values())
        raise ValueError(f"{to} cannot be written: {error.strerror or error} ({size:,} bytes are needed)") from error
    return to


def _grows(tensor: Tensor) -> bool:
    """Whether it is larger in memory than in its file: a few bytes may claim to be terabytes."""
    return tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes()


def _line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return shown(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
