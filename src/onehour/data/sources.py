"""The data that a recipe names: training and validation sets, and all that a first look shows to be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from onehour.config import Recipe
from onehour.data.dataset import Classes, FaultError, KeyedDataset, as_label, as_labels, in_memory, refuse_labels
from onehour.data.digits import SAMPLES, SIDE, DigitFiles, digits
from onehour.data.division import KeyedPart, divided
from onehour.data.idx import fashion_mnist, idx, idx_files
from onehour.data.processes import in_child
from onehour.data.samples import ARRAYS, IMAGES_AND_LABELS, IN_A_ROW, Form, Keyed, leaves, mapped, pair_of
from onehour.entry import is_entry, resolve
from onehour.messages import blame, nearest, shown

OF_IMAGES = ("bad_images", "exif_orientation", "pixel_cap", "image_size", "test_resize", "train_transform")
"""Fields of `ImageOptions`, which data of another kind must not be asked for."""
BLACK = b"P6 1 1 255 " + bytes(3)
"""An image file."""


@dataclass(frozen=True)
class Data:
    """Two map-style data sets of (image, label), and what models must know of them."""

    train: Any
    validation: Any
    classes: int | None  # number of labels where the data says so (an attribute `classes`, or labels in memory)
    channels: int
    looks: tuple[Look, Look]
    form: Form = IMAGES_AND_LABELS

    @classmethod
    def given(cls, given: Any, whose: str, share: float, seed: int, form: Form = IMAGES_AND_LABELS) -> Data:
        """Data that somebody's code has made: (train, validation), or one data set (alone, or beside None) to divide.

        Args:
            whose: "data is a" or "data mine:data returned", for messages.
            share: of the one data set that is validated on; 0 where there are two.
        """
        kind = type(given).__name__
        pair: list[Any] = [*given] if isinstance(given, tuple | list) and len(given) == 2 else [given, None]
        if not share:
            if pair[1] is None:
                raise ValueError(f"{whose} {kind}; expected (train, validation), or one data set and --validation 0.1")
            return cls.of(*pair, form=form)
        if pair[1] is not None:
            raise ValueError(f"{whose} {kind} with a validation part; leave validation {share:g} out")
        whole = _simplest("training", pair[0])
        look("training", whole)  # says what is wrong with it, before all of it is read
        return cls.of(*divided(whole, share, seed))

    @classmethod
    def of(cls, train: Any, validation: Any, form: Form = IMAGES_AND_LABELS) -> Data:
        """Look at two data sets, in processes of their own unless they are tensors in memory."""
        if form.own:
            looks = look("training", train, form), look("validation", validation, form)
            first = looks[0].image
            return cls(train, validation, looks[0].classes, len(first) if first.ndim > 2 else 1, looks, form)
        train, validation = _simplest("training", train), _simplest("validation", validation)
        ours, theirs = look("training", train), look("validation", validation)
        shape, other = tuple(ours.image.shape), tuple(theirs.image.shape)
        if shape != other:
            raise ValueError(f"training images have shape {shape}, validation images {other}; expected one")
        kinds = ours.image.dtype, theirs.image.dtype
        if kinds[0] != kinds[1] and torch.uint8 not in kinds:  # bytes become floats later
            raise ValueError(f"training images are {kinds[0]}, validation images {kinds[1]}; expected one type")
        classes = ours.classes
        if in_memory(train) and in_memory(validation):
            classes = 1 + max(0, *(int(side.tensors[1].max()) for side in (train, validation)))
        return cls(train, validation, classes, shape[0] if shape else 1, (ours, theirs))

    @property
    def names(self) -> list[str]:
        """Of the classes, where the training data has them: as many as `classes`, or none."""
        return list(self.looks[0].names)


def load_data(spec: str, form: Form = IMAGES_AND_LABELS, *, share: float = 0.0, seed: int = 0, **options: Any) -> Data:
    """The data of a recipe: a name, NAME:SPLIT, a path, or package.module:function that returns (train, validation).

    fashion-mnist:DIR is read from a folder of one's own. A path is a folder of images, its index or a pack
    (`image_folder`), MNIST's four files or others in their format (`idx`), or CIFAR-10's archive, .tar.gz or .tgz
    (`cifar10`).

    Args:
        share: of each class that is validated on, where the data is one part; 0 where it has two.
        options: of `ImageOptions`, for images at a path; CIFAR-10's archive takes `train_transform`. Other data is
            read as its reader likes.
    """
    name = spec.partition(":")[0]
    fashion = name == "fashion-mnist"
    if share and (name in SAMPLES or fashion or idx_files(spec) or spec.endswith((".index", ".tar.gz", ".tgz"))):
        raise ValueError(f"data {spec} has a validation part; leave validation {share:g} out")
    if name in SAMPLES:
        return Data.of(*digits(_split_of(spec), samples=SAMPLES[name]), form=form)
    if fashion:
        return Data.of(*fashion_mnist(*spec.split(":", 1)[1:]), form=form)
    if idx_files(spec):
        return Data.of(*idx(spec), form=form)
    # Imported here, so that what reads images is loaded only for those who have some.
    if os.path.isdir(spec) or spec.endswith(".index"):
        from onehour.data.images import ImageOptions, divided_folder, image_folder

        if share:
            return Data.of(*divided_folder(spec, share, seed, ImageOptions(**options)), form=form)
        return Data.of(*image_folder(spec, ImageOptions(**options)), form=form)
    if spec.endswith((".tar.gz", ".tgz")):
        from onehour.data.cifar import cifar10

        return Data.of(*cifar10(spec, options.get("train_transform", "")), form=form)
    if not is_entry(spec):
        if not spec:
            raise ValueError("this recipe needs data; give --data DIR, or package.module:function")
        expected = f"{nearest(spec, [*SAMPLES, 'fashion-mnist'])}, a folder that exists, or package.module:function"
        raise ValueError(f"no data is called {spec!r}; expected {expected}")
    function = resolve("data", spec)
    try:
        returned = function()
    except Exception as error:
        raise ValueError(f"data {spec} failed when called: {blame(error)}") from error
    return Data.given(returned, f"data {spec} returned", share, seed, form)


def _split_of(spec: str) -> int:
    name, _, split = spec.partition(":")
    if not (split.isdecimal() or spec == name):
        raise ValueError(f"data {spec!r} names no division of {name}; expected {name}, or {name}:1, {name}:2 …")
    return int(split or 0)


@dataclass(frozen=True)
class FileReader:
    """How image files that are not of a recipe's data are read as its validation images are."""

    dataset: KeyedDataset
    image: Tensor  # all have its shape and type
    names: Callable[[], list[str]]  # asks for those of the classes; none where they are not known


def file_reader(spec: str, *, share: float = 0.0, seed: int = 0, **options: Any) -> FileReader:
    """What reads image files as the validation data of a recipe does (`load_data`); a path need not be there."""
    division: Any = {"share": share, "seed": seed}
    name = spec.partition(":")[0]
    if name in SAMPLES:
        return FileReader(DigitFiles(_split_of(spec), samples=SAMPLES[name]), torch.zeros(1, SIDE, SIDE), list)
    if name == "fashion-mnist" or idx_files(spec):
        raise ValueError(f"predict reads no image files for data in MNIST's format, {spec}")
    if is_entry(spec) or not spec or spec.startswith("<"):  # given from Python: nobody can find it by that
        data = load_data(spec, **division)
        kind = type(data.validation.dataset if isinstance(data.validation, KeyedPart) else data.validation)
        if not issubclass(kind, KeyedDataset) or kind.from_file is KeyedDataset.from_file:
            raise ValueError(
                f"the validation data of {spec} is a {kind.__name__}, which does not say how it reads an image file;"
                " derive it from onehour.KeyedDataset, and define from_file(data, name)"
            )
        return FileReader(data.validation, data.looks[1].image, lambda: data.names)
    if spec.endswith((".tar.gz", ".tgz")):
        from onehour.data.cifar import CLASSES, Cifar

        one = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        return FileReader(Cifar(one, [0], augmented=False), one[0], lambda: list(CLASSES))
    from onehour.data.images import ImageOptions, image_files

    files = image_files(ImageOptions(**options))

    def names() -> list[str]:
        return load_data(spec, **division, **options).names if os.path.exists(spec) else []

    return FileReader(files, files.from_file(BLACK, "a black image"), names)


def complete(
    recipe: Recipe,
    data: Any = None,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    trains: bool = True,
    augments: bool = False,
) -> tuple[Recipe, Data]:
    """Load the data, and write into the recipe what only the data knows.

    Args:
        recipe: names the data, unless `data` is given.
        data: (train, validation) as objects, or one to divide.
        trains: False evaluates alone, which takes data of any size: N stays open.
        augments: whether training images are as in training, also where nothing trains.
    """
    if trains:
        refuse_odd_texts(recipe)  # before a run's folder is made for it
    if recipe.task is not None and is_entry(recipe.task):
        resolve("task", recipe.task)  # a wrong name is said before anything that takes longer
    if collate is None and recipe.collate is not None:
        collate = resolve("collate", recipe.collate)
    form = Form(own=recipe.task is not None, collate=collate)
    if data is None:
        division: Any = {"share": recipe.validation, "seed": recipe.seed}
        loaded = load_data(recipe.data, form, **division, **image_options(recipe, trains=trains or augments))
    else:
        loaded = Data.given(data, "data is a", recipe.validation, recipe.seed, form)
    classes = recipe.classes or loaded.classes
    if classes is not None and not form.own:
        refuse_known_labels(loaded, Classes(classes, "the recipe's classes" if recipe.classes else "its largest label"))
        if loaded.classes is not None and classes < loaded.classes:
            raise ValueError(f"classes is {classes}, but the data has labels up to {loaded.classes - 1}")
    samples = None
    if trains:
        samples = loaded.looks[0].samples
        refuse_mixing(recipe, loaded.looks[0].image)
    return recipe.replace(samples=samples, classes=classes, **_facts(recipe, loaded)), loaded


def refuse_odd_texts(recipe: Recipe) -> None:
    """Say which text of a recipe no file of a run can hold: a path may be of any bytes."""
    for name, value in recipe.as_dict().items():
        for text in value if isinstance(value, list) else [value]:
            try:
                str(text).encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name} is {shown(text)}, which is not UTF-8, and a run's files are; rename it, or give a link to"
                    " it that has another name"
                ) from error


def refuse_mixing(recipe: Recipe, image: Tensor) -> None:
    """Say why images cannot be erased or cut."""
    asked = [name for name in ("random_erasing", "cutmix") if getattr(recipe, name)]
    if asked and (image.ndim != 3 or image[0].numel() < 2):
        raise ValueError(
            f"{' and '.join(asked)}: rectangles are cut out of images (C, H, W) of several pixels, and the data's have"
            f" shape {tuple(image.shape)}; use mixup, or none"
        )


def image_options(recipe: Recipe, *, trains: bool = False) -> dict[str, Any]:
    """How a recipe reads images at a path: options of `ImageOptions`."""
    options = {name: getattr(recipe, name) for name in OF_IMAGES}
    return options if trains else options | {"train_transform": ""}


def refuse_known_labels(data: Data, classes: Classes) -> None:
    """Check what lies in memory, before anything lies on a device."""
    for side, dataset in (("training", data.train), ("validation", data.validation)):
        if in_memory(dataset):
            refuse_labels(dataset.tensors[1], classes, Keyed(dataset, 0, side=side).called)


def _facts(recipe: Recipe, data: Data) -> dict[str, Any]:
    """How images are read, as the data has it; other data must not be asked for it."""
    usual, facts = Recipe(), data.train.facts if isinstance(data.train, KeyedDataset) else None
    facts = {"resized": None} | (facts or {})
    asked = [name for name in OF_IMAGES if name not in facts and getattr(recipe, name) != getattr(usual, name)]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: such fields are for images in a folder, an index or a pack; leave them out"
        )
    return facts


@dataclass(frozen=True)
class Look:
    """What a data set's first samples say of all."""

    samples: int
    image: Tensor
    """The first one, as the data set gives it; all have its shape and type. Of a task's own samples one of the shape of
    the first tensor or array, or an empty one."""
    classes: int | None
    sample: Any = None  # the first one, of a task's own
    names: tuple[str, ...] = ()  # of the classes, where its `classes` are texts


def look(side: str, dataset: Any, form: Form = IMAGES_AND_LABELS) -> Look:
    """Look at a data set, in a process of its own: nothing of it is opened, cached or drawn in this one.

    Tensors in memory are looked at here.
    """
    see = _look_at_own if form.own else _look
    if in_memory(dataset):
        return see(side, dataset)
    return in_child(lambda: see(side, dataset), f"the first look at the {side} data")


def _look_at_own(side: str, dataset: Any) -> Look:
    """At samples of any kind, of which a task knows more."""
    samples = _samples(side, dataset)

    def own(leaf: Any) -> Any:
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

    sample = mapped(_item(side, "first", dataset, 0), own)  # arrays stay: a collate may ask for them
    first = next((leaf for leaf in leaves(sample) if isinstance(leaf, ARRAYS)), None)
    return Look(samples, torch.empty(0 if first is None else first.shape), _classes(dataset), sample)


def _simplest(side: str, dataset: Any) -> Any:
    """A data set in memory with its labels as whole numbers (N,); any other as it is."""
    if not in_memory(dataset):
        return dataset
    if len(dataset.tensors) != 2:
        kind = f"a tuple of {len(dataset.tensors)}"
        raise ValueError(f"the {side} data's first item is not an (image, label) pair: it is {kind}")
    images, labels = dataset.tensors
    try:
        whole = as_labels(labels)
    except ValueError as error:
        raise ValueError(f"the {side} data: {error}") from None
    if whole is labels and not images.requires_grad:
        return dataset
    return TensorDataset(images.detach(), whole)


def _look(side: str, dataset: Any) -> Look:
    samples = _samples(side, dataset)
    if in_memory(dataset):
        image, classes = _checked(side, dataset, dataset.tensors[0][:1])[0], None
    else:
        image, classes = _first(side, dataset, samples), _classes(dataset)
    names = _names(dataset) if classes else ()
    return Look(samples, image.detach().cpu().clone(), classes, names=names)


def _samples(side: str, dataset: Any) -> int:
    kind = type(dataset)
    if isinstance(dataset, IterableDataset) or not (hasattr(kind, "__len__") and hasattr(kind, "__getitem__")):
        raise ValueError(f"the {side} data is a {kind.__name__}; expected a map-style data set (len and [i])")
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(hasattr(part, "shape") for part in dataset):
        raise ValueError(
            f"the {side} data is two arrays; expected a data set of (image, label), such as"
            " torch.utils.data.TensorDataset(images, labels)"
        )
    try:
        samples = len(dataset)
    except Exception as error:
        raise ValueError(f"the {side} data does not say how many samples it has: {blame(error)}") from error
    if samples == 0:
        raise ValueError(f"the {side} data is empty")
    return samples


def _first(side: str, dataset: Any, samples: int) -> Tensor:
    """The first image that can be read; the last sample of someone's data set too, if there is such a one."""
    keyed, faults = isinstance(dataset, KeyedDataset), list[FaultError]()
    for index in range(min(samples, IN_A_ROW)):
        try:
            first = _image(side, "first", dataset, index)
        except FaultError as fault:
            if not (keyed and dataset.skips):
                raise
            faults.append(fault)  # another sample will be taken in its place
            continue
        if not keyed:
            last = _image(side, "last", dataset, samples - 1)
            if last.shape != first.shape or last.dtype != first.dtype:
                kinds = [f"{tuple(image.shape)} of {image.dtype}" for image in (first, last)]
                raise ValueError(
                    f"the {side} data's first image is {kinds[0]}, its last one {kinds[1]}; bring them to one shape and"
                    " type"
                )
        return first
    raise ValueError(f"{faults[0]} ({len(faults) - 1} samples after it cannot be read either: is the disk there?)")


def _item(side: str, which: str, dataset: Any, index: int) -> Any:
    keyed = isinstance(dataset, KeyedDataset)
    try:
        return dataset.keyed(index, 0) if keyed else dataset[index]
    except Exception as error:
        if keyed and isinstance(error, ValueError):
            raise  # it names the place and the remedy
        read = f"item, {index} of {index + 1}, cannot be read" if which == "last" else "item cannot be read"
        raise ValueError(f"the {side} data's {which} {read}: {blame(error)}") from error


def _image(side: str, which: str, dataset: Any, index: int) -> Tensor:
    image, label = pair_of(_item(side, which, dataset, index), f"the {side} data's {which} item")
    image = _checked(side, dataset, image)
    try:
        as_label(label)
    except ValueError as error:
        raise ValueError(f"the {side} data's {which} label: {error}") from None
    return image


def _checked(side: str, dataset: Any, image: Any) -> Tensor:
    """An image that is a tensor of floats, or of bytes where the data set makes floats of them."""
    expected = "expected float tensors of shape (C, H, W)"
    if not torch.is_tensor(image):
        raise ValueError(f"the {side} data's images are {type(image).__name__}; {expected}")
    if image.layout is not torch.strided:
        raise ValueError(f"the {side} data's images are {image.layout}; {expected}")
    prepared = image.dtype == torch.uint8 and isinstance(dataset, KeyedDataset)
    if not (image.is_floating_point() or prepared):
        bytes_ = "; a data set derived from onehour.KeyedDataset may give bytes" if image.dtype == torch.uint8 else ""
        raise ValueError(f"the {side} data's images are {image.dtype}; {expected}{bytes_}")
    return image


def _classes(dataset: Any) -> int | None:
    """How many classes a data set says that it has: its `classes` is a list of names, or a number."""
    try:
        classes = dataset.classes
    except Exception:  # it has none, or a property of that name that is for something else
        return None
    if isinstance(classes, np.ndarray):
        classes = classes.tolist()
    if isinstance(classes, Sequence) and not isinstance(classes, str | bytes):
        return len(classes) or None
    try:
        return max(as_label(classes), 0) or None if not isinstance(classes, bool) else None
    except ValueError:
        return None


def _names(dataset: Any) -> tuple[str, ...]:
    """The texts that a data set's `classes` are, if all are."""
    names = list(dataset.classes) if isinstance(dataset.classes, Sequence | np.ndarray) else []
    return tuple(map(str, names)) if all(isinstance(name, str) for name in names) else ()
