"""A model's weights in files: read, fitted to a model, started from, and written for others.

A run starts from a file's, another run's, or a library's for one of its models. What is written is a state dict under
torch's own names, or the network as a program; each file is read back, and compared with what was to be written,
before it gets its name.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import load_file as load_safetensors  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.loader import prepared
from onehour.data.samples import Keyed
from onehour.data.sources import Data, complete
from onehour.entry import LIBRARIES
from onehour.files import is_written_into, written_at
from onehour.messages import blame, shown
from onehour.models.load import load_model, pretrained_weights
from onehour.sidefile import is_object
from onehour.training.checkpoint import NAME, Store, checkpoint_folders, digest_of_recipe
from onehour.training.record import Run, latest_contents
from onehour.training.state import as_safetensors, averages_in, digest_of
from onehour.training.task import outputs_of

FORMATS, PROGRAMS = (".safetensors", ".pt", ".pth"), (".pt2", ".onnx")
INSIDE = ("state_dict", "model")
"""Where trainers' checkpoints have the weights, beside what else they hold."""
WRAPPERS = ("module.", "_orig_mod.")
"""What every name begins with where DDP's or torch.compile's wrapper was saved in place of the model."""
COUNTER = "num_batches_tracked"
"""Of BatchNorm's: younger than many files, and frozen ones have none."""
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest one where that is above 1, that counts as the same network."""
IMAGES = 8
"""Of the validation data, with which a program is made and compared."""
ONNX = ("onnx", "onnxscript", "onnxruntime")


def read_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights and buffers in a run's newest verified checkpoint, in one of its checkpoints, or in a file.

    A .pt file is read with `weights_only=True` alone: nothing in it is executed.

    Args:
        ema: a run's averaged weights in place of its weights, with the buffers beside these.
    """
    weights = weights_in(path, bytes_of(path))
    if not ema:
        return weights
    if not path.is_dir():
        raise ValueError(f"--ema is for a run's folder, which may hold weights and their average; {path} is a file")
    contents = latest_contents(Run(path).folder)
    averages = averages_in(load(contents[1])) if contents is not None else {}
    if not averages:
        raise ValueError(f"{path} keeps no average of its weights: its recipe has no ema")
    return weights | averages


def bytes_of(path: Path) -> bytes:
    """The file that holds the weights, whole: of a run or a checkpoint its model.safetensors, once it is verified."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    whole = path.absolute()
    folder = whole.parent.parent
    if whole.is_dir() and NAME.fullmatch(whole.name) and whole in checkpoint_folders(folder):
        try:
            return Store(folder, recipe=digest_of_recipe(Run(folder).recipe)).verified(whole).contents[0]
        except ValueError as error:
            raise ValueError(f"{path} is not a valid checkpoint: {error}") from error
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
    """The weights and buffers in what `bytes_of` gave; of a file under the model's own names, without `WRAPPERS`."""
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
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():  # a few bytes may claim to be terabytes
            raise ValueError(f"{path}: {shown(name)} is not a plain tensor; expected one that is stored as it is")
    found = {str(name): tensor.detach() for name, tensor in state.items()}
    while not ours and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in found)), None)):
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def fit(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights into a model, strictly."""
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


def _line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return shown(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Start:
    """What a model started from.

    Args:
        sha256: of the file; of a library's weights their digest.
        tensors: how many the model has.
        anew: those that the source lacks, which are as without `init`.
        classifier: those that are as without `init` because the source has other classes.
        left_out: those that the source alone has.
        inside: what stands before the source's names in the model's, whose part it is.
    """

    source: str
    sha256: str
    tensors: int
    anew: list[str]
    classifier: list[str]
    left_out: list[str]
    inside: str = ""

    def __str__(self) -> str:
        return "; ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        loaded = self.tensors - len(self.anew) - len(self.classifier)
        yield f"starts from {self.source}, SHA-256 {self.sha256[:16]}…: {loaded} of {self.tensors} tensors" + (
            f", as its {self.inside.removesuffix('.')}" if self.inside else ""
        )
        if self.classifier:
            yield f"{few(self.classifier)} are newly initialised, for another number of classes"
        if self.anew:
            yield f"{few(self.anew)} are newly initialised, since it lacks them"
        if self.left_out:
            yield f"not used: {few(self.left_out)}"

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What all processes must have in common."""
        return {"init": {f"the SHA-256 of init {self.source}": self.sha256}}

    @property
    def record(self) -> dict[str, Any]:
        """For the run's environment."""
        anew = self.anew + self.classifier
        return {"init": self.source, "init_sha256": self.sha256, "init_anew": anew, "init_left_out": self.left_out}


@torch.no_grad()
def start_from(recipe: Recipe, data: Data, model: nn.Module, device: torch.device) -> Start:
    """Load what `recipe.init` names into a model that is built.

    Raises:
        ValueError: if it cannot be read, shares no tensor with the model or a part of it, is not finite, or has a
            tensor of another shape that is not the classifier's: one whose first dimension is the number of classes in
            both.
    """
    if recipe.init.startswith(tuple(f"{library}:" for library in LIBRARIES)):
        weights = pretrained_weights(recipe.init)
        digest = digest_of(weights)
    else:
        try:
            content = bytes_of(Path(recipe.init))
            weights = weights_in(Path(recipe.init), content)
        except ValueError as error:
            raise ValueError(f"init {error}") from error
        digest = hashlib.sha256(content).hexdigest()
    own = model.state_dict()
    inside = _place(weights, own)
    weights = {inside + name: tensor for name, tensor in weights.items()}
    both = [name for name in own if name in weights]
    other = [name for name in both if own[name].shape != weights[name].shape]
    if other:
        classes = None if recipe.task is not None else outputs_of(model, recipe, data, device)
        wrong = [name for name in other if classes is None or own[name].shape != (classes, *weights[name].shape[1:])]
        if wrong or len({weights[name].shape[:1] for name in other}) > 1:
            name = (wrong or other)[0]
            shapes = f"{tuple(weights[name].shape)} there, and {tuple(own[name].shape)} here"
            raise ValueError(
                f"init {recipe.init} does not fit the model: {shown(name)} is {shapes}; a classifier alone may differ,"
                " by its number of classes"
            )
    loaded = {name: weights[name] for name in both if name not in other}
    if not loaded:
        names = few(list(weights)), few(list(own))
        raise ValueError(f"init {recipe.init} is of another model: it has {names[0]}, the model {names[1]}")
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"init {recipe.init}: {shown(name)} holds NaN or infinity")
    model.load_state_dict(loaded, strict=False)
    counted = [name for name in own if not name.endswith(COUNTER)]
    return Start(
        source=recipe.init,
        sha256=digest,
        tensors=len(counted),
        anew=[name for name in counted if name not in weights],
        classifier=other,
        left_out=[name.removeprefix(inside) for name in weights if name not in own and not name.endswith(COUNTER)],
        inside=inside,
    )


def _place(weights: Collection[str], own: Collection[str]) -> str:
    """What stands before the weights' names where the model has them as a part of it, as a detector has a backbone.

    It is the only such under which most of them are found; nothing where a name fits as it is.
    """
    if any(name in own for name in weights):
        return ""
    found = Counter(mine.removesuffix(name) for name in weights for mine in own if mine.endswith(f".{name}"))
    places = [place for place, count in found.items() if 2 * count > len(weights)]
    return places[0] if len(places) == 1 else ""


def refuse_place(to: Path, suffixes: Iterable[str], *, force: bool) -> None:
    """Refuse a file's name before anything is computed."""
    if to.suffix not in suffixes:
        *others, last = suffixes
        raise ValueError(f"{to} must end in {', '.join(others)} or {last}")
    if to.exists() and not force and not is_written_into(to):
        raise ValueError(f"{to} exists; remove it first, choose another name, or give --force to replace it")


def write_weights(weights: dict[str, Tensor], to: Path) -> Path:
    """Write a plain state dict, whole or not at all; it loads in torchvision's and timm's model of the same name.

    Args:
        to: ends in one of `FORMATS`.
    """
    # A tensor of its own for each name: tied weights share one, and a view would bring all that it is a view of.
    weights = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}

    def check(path: Path) -> None:
        found = load_safetensors(path) if to.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if not (found.keys() == weights.keys() and all(_same(found[name], weights[name]) for name in weights)):
            raise ValueError(f"{to} was not written: read back, it holds other numbers; is the disk sound?")

    if to.suffix == ".safetensors":
        return _write(to, list(as_safetensors(weights)), check)
    buffer = BytesIO()
    torch.save(weights, buffer)  # to the file itself, it would call a full disk by another name
    return _write(to, [buffer.getbuffer()], check)


def export_program(source: Path, to: Path, *, recipe: Recipe, ema: bool = False) -> tuple[tuple[int, ...], float]:
    """Write the network itself, in float32, for batches of any size: images as the network takes them, to logits.

    It is the plain network that the recipe names, with torch's own BatchNorm in evaluation.

    Args:
        to: ends in .pt2 (`torch.export.load`) or .onnx (inputs "images", outputs "logits").
        recipe: names model and data; the shape of images comes from its validation data.

    Returns:
        The shape of an image, and the largest difference between the file's logits and the network's on validation
        images, relative to the largest logit where that is above 1.
    """
    if to.suffix == ".onnx":
        _need_packages(to)
    if recipe.task is not None:
        raise ValueError(
            f"{to.suffix} holds a classifier of images, and task {recipe.task} may be anything; export its weights to"
            " .safetensors or .pt"
        )
    weights = read_weights(source, ema=ema)
    recipe, loaded = complete(recipe, trains=False)
    model = load_model(recipe.model, channels=loaded.channels, classes=recipe.classes)
    fit(model, weights, source)
    model, images = model.float().eval(), _images(loaded)
    try:
        with _silence(), torch.no_grad():
            content = (_as_onnx if to.suffix == ".onnx" else _as_pt2)(model, images)
    except Exception as error:
        raise ValueError(f"torch cannot export this network for batches of any size: {blame(error)}") from error
    differences: list[float] = []

    def check(path: Path) -> None:
        try:
            with _silence():
                differences.append(_difference(model, _opened(path, to.suffix), images))
        except Exception as error:  # of any class that a runtime likes
            raise ValueError(f"{to} was not written: read back, it does not run: {blame(error)}") from error
        if not differences[0] <= TOLERANCE:
            raise ValueError(
                f"{to} was not written: read back, its logits differ from the network's by {differences[0]:.1e},"
                f" more than {TOLERANCE:g}"
            )

    _write(to, [content], check)
    return tuple(images.shape[1:]), differences[0]


def _write(to: Path, parts: list[Any], check: Callable[[Path], None]) -> Path:
    try:
        with written_at(to, check=check) as file:
            for part in parts:
                file.write(part)
    except OSError as error:
        size = sum(map(len, parts))
        raise ValueError(f"{to} cannot be written: {error.strerror or error} ({size:,} bytes are needed)") from error
    return to


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are: NaN equals itself."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _need_packages(to: Path) -> None:
    for package in ONNX:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{to} needs the package {package}: pip install 'onehour[onnx]'") from error


@contextmanager
def _silence() -> Generator[None]:
    """Keep to itself what torch's exporters print, log and warn of beside their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)


def _images(data: Data) -> Tensor:
    """The first validation images, as the network takes them; at least two, since a batch of one may be special."""
    keys = [(0, index, index) for index in range(min(IMAGES, data.looks[1].samples))]
    (images, _), _ = Keyed(data.validation, 0, side="validation").batch(keys)
    images = prepared(data.validation, images).float().contiguous()
    return images if len(images) > 1 else torch.cat([images, images])


def _as_pt2(model: nn.Module, images: Tensor) -> bytes:
    buffer = BytesIO()
    size = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=(size,)), buffer)
    return buffer.getvalue()


def _as_onnx(model: nn.Module, images: Tensor) -> bytes:
    untyped: Any = torch.onnx
    size, names = {0: torch.export.Dim("batch")}, {"input_names": ["images"], "output_names": ["logits"]}
    program = untyped.export(model, (images,), dynamo=True, dynamic_shapes=(size,), verbose=False, **names)
    return program.model_proto.SerializeToString()


def _opened(path: Path, suffix: str) -> Callable[[Tensor], Tensor]:
    """What a file computes."""
    if suffix == ".pt2":
        with path.open("rb") as file:
            program = torch.export.load(BytesIO(file.read()))
        return program.module()
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.as_tensor(session.run(["logits"], {"images": images.numpy()})[0])


@torch.no_grad()
def _difference(model: nn.Module, other: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Over batches of several sizes, the one that it was made with among them."""
    worst = 0.0
    for batch in (images, images[:1], torch.cat([images, images[1:]])):
        logits = model(batch.clone())  # a model may write into what it is given
        scale = max(1.0, float(logits.abs().max()))
        worst = max(worst, float((other(batch.clone()) - logits).abs().max()) / scale)
    return worst
