"""More hostile files: archives, recipes, tables, and images with what lists them; adds to the cases beside it."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import torch
from PIL import Image

from campaigns.hostile_cases import ESCAPE, EVALUATE, HUGE, PICKLE, alone, case, saved
from onehour.data.images import open_sides
from onehour.data.index import INDEX, open_arrays, write_arrays, write_index
from onehour.data.pack import pack

ESCAPED = "\x1b[2Jevil"
"""Short enough for a file's name."""


def tarred(members: dict[str, bytes]) -> bytes:
    """A tar file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def climbing() -> bytes:
    """A .pt whose zip members lead out of the folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(1)}))) as source, zipfile.ZipFile(buffer, "w") as archive:
        for member in source.infolist():
            archive.writestr(f"../../outside/{member.filename}", source.read(member))
    return buffer.getvalue()


def scripted() -> bytes:
    """A program as torch.jit saves it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(1)}))) as source, zipfile.ZipFile(buffer, "w") as archive:
        for member in source.infolist():
            archive.writestr(member, source.read(member))
        archive.writestr("archive/constants.pkl", PICKLE)
        archive.writestr("archive/code/__torch__.py", "import os; os.system('touch executed')")
    return buffer.getvalue()


alone(
    "a .pt in the oldest form, a tar",
    "x.pt",
    lambda: tarred({"pickle": PICKLE, "storages": PICKLE, "tensors": PICKLE, "sys_info": PICKLE}),
    EVALUATE,
)
alone("traversal in a .pt", "x.pt", climbing, EVALUATE)
alone("a program as .pt", "x.pt", scripted, EVALUATE)


@case("a pipe as .pt")
def _(here: Path) -> list[str]:
    os.mkfifo(here / "x.pt")
    return EVALUATE


# Recipes, sweeps, tables

PLAN = ["plan", "x.toml"]
alone("pickle as a recipe", "x.toml", lambda: PICKLE, PLAN)
alone("huge numbers in a recipe", "x.toml", lambda: f"samples = {HUGE}".encode(), PLAN)
alone("escapes in a recipe", "x.toml", lambda: rb'optimizer = "\u001b[2Jevil"', PLAN)
alone(
    "code in a recipe",
    "x.toml",
    lambda: b'model = "os:system"\nname = "x"\ndata = "digits"',
    ["train", "x.toml", "--out", "run", "--device", "cpu"],
)
alone("pickle as sweep.toml", "s/sweep.toml", lambda: PICKLE, ["report", "s"])
alone("pickle as a table", "x.csv", lambda: PICKLE, ["report", "x.csv"])
alone("escapes in a table", "x.csv", lambda: f"epoch,{ESCAPED}\n1,2\n".encode(), ["report", "x.csv"])
alone("escapes in a table's values", "x.csv", lambda: f"epoch,error\n1,{ESCAPED}\n".encode(), ["report", "x.csv"])
alone("huge field in a table", "x.csv", lambda: b"epoch,error\n1," + b"9" * 10**6, ["report", "x.csv"])

# Images


def pictures(root: Path, classes: tuple[str, ...] = ("cat", "dog"), name: str = "1.png") -> Path:
    """A folder of images."""
    for side in ("train", "val"):
        for number, label in enumerate(classes):
            (root / side / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(root / side / label / name)
    return root


TRAIN = ["train", "resnet50", "--data", "d", "--minibatch", "2", "--per-worker", "1", "--out", "run", "--device", "cpu"]
PACK = ["data", "pack", "d", "run", "--resize", "16", "--jobs", "1"]


@case("escapes in a class's name")
def _(here: Path) -> list[str]:
    pictures(here / "d", ("cat", ESCAPED))
    (here / "d" / "val" / ESCAPED).rename(here / "d" / "val" / "dog")
    return TRAIN


@case("escapes in the names of an image and its class")
def _(here: Path) -> list[str]:
    root = pictures(here / "d", ("cat", ESCAPED), f"{ESCAPED}.png")
    (root / "train" / ESCAPED / f"{ESCAPED}.png").write_bytes(PICKLE)
    return PACK


@case("pickle as an image")
def _(here: Path) -> list[str]:
    (pictures(here / "d") / "train" / "cat" / "1.png").write_bytes(PICKLE)
    return TRAIN


@case("an image of a billion pixels")
def _(here: Path) -> list[str]:
    Image.new("1", (2**15, 2**15)).save(pictures(here / "d") / "train" / "cat" / "1.png")
    return TRAIN


@case("pickle as an index")
def _(here: Path) -> list[str]:
    (pictures(here / "d") / INDEX).write_bytes(PICKLE)
    return TRAIN


@case("traversal in an index")
def _(here: Path) -> list[str]:
    path = write_index(pictures(here / "d", name="22222222222222222222.png"))
    arrays, about = open_arrays(path)
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["train.names"][:24] = list(b"../../../outside/preciou")
    write_arrays(path, arrays, about)
    return TRAIN


@case("escapes in an index's classes")
def _(here: Path) -> list[str]:
    path = write_index(pictures(here / "d"))
    arrays, about = open_arrays(path)
    write_arrays(path, arrays, about | {"classes": ["cat", ESCAPE]})
    return TRAIN


@case("traversal in a pack's shards")
def _(here: Path) -> list[str]:
    path = pack(open_sides(pictures(here / "p"), sizes=True), here / "d")
    arrays, about = open_arrays(path)
    shards = [[f"../{name}", *rest] for name, *rest in about["shards"]["train"]]
    write_arrays(path, dict(arrays), about | {"shards": about["shards"] | {"train": shards}})
    return TRAIN


def cifar(members: dict[str, bytes]) -> bytes:
    """An archive as CIFAR-10's."""
    return gzip.compress(tarred(members))


CIFAR = ["train", "cifar10", "--data", "x.tar.gz", "--out", "run", "--device", "cpu"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
alone("pickles in CIFAR-10", "x.tar.gz", lambda: cifar({f"cifar-10-batches-py/{n}": PICKLE for n in BATCHES}), CIFAR)
alone("traversal in CIFAR-10", "x.tar.gz", lambda: cifar({f"../../outside/{n}": b"x" for n in BATCHES}), CIFAR)
alone("pickle as CIFAR-10's archive", "x.tar.gz", lambda: PICKLE, CIFAR)

IDX = ["train", "fashion", "--data", "train-images-idx3-ubyte", "--out", "run", "--device", "cpu"]
alone("pickle as MNIST's images", "train-images-idx3-ubyte", lambda: PICKLE, IDX)
alone("MNIST's images of 2⁹⁶ bytes", "train-images-idx3-ubyte", lambda: b"\0\0\x08\3" + b"\xff" * 12, IDX)
