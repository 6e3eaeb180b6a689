"""The hostile files: each case makes its own below an empty folder, and names the command that reads them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onehour
from onehour.training.record import StoppedError

ESCAPE = "\x1b]0;evil\x07\x1b[2Jevil"
FLAGS = ["--minibatch", "1024", "--epochs", "2", "--warmup", "none", "--out", "run", "--device", "cpu"]
RESUME = ["train", "digits", *FLAGS]
OF_DIGITS = ["--recipe", "digits", "--device", "cpu"]
Make = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Case:
    """Args:
    make: writes the files below a folder and gives the command's arguments.
    needs_run: a folder `run` with two checkpoints is copied there first.
    code: what the command leaves with.
    """

    make: Make
    needs_run: bool
    code: int


CASES: dict[str, Case] = {}


def case(name: str, *, needs_run: bool = False, code: int = 2) -> Callable[[Make], Make]:
    """Add a case."""

    def added(make: Make) -> Make:
        CASES[name] = Case(make, needs_run, code)
        return make

    return added


class Payload:
    """Makes a file called "executed" where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


PICKLE = pickle.dumps(Payload())
DEEP = "[" * 200_000
HUGE = "9" * 6000


def base_run(folder: Path) -> Path:
    """A run that was stopped, with two checkpoints."""
    asked = iter([False] * 11)
    recipe = {"minibatch": 1024, "epochs": 2, "warmup": "none", "save_every": 4, "device": "cpu"}
    with redirect_stdout(io.StringIO()), suppress(StoppedError):
        onehour.train("digits", **recipe, out=folder, stop_asked=lambda: next(asked, True))
    assert len(list((folder / "checkpoints").iterdir())) == 2
    return folder


def checkpoints(here: Path) -> list[Path]:
    """The folders of a run's checkpoints."""
    return sorted((here / "run" / "checkpoints").iterdir())


def forge(folder: Path, name: str, content: bytes | None = None, **changes: Any) -> None:
    """Put a file into a checkpoint, and make its manifest right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if content is not None:
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest |= changes
    sign(folder, manifest)


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the digest that it must have."""
    manifest.pop("sha256", None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def in_checkpoints(name: str, file: str, content: Callable[[Path], bytes], arguments: list[str]) -> None:
    """A case whose file lies in every checkpoint, with a manifest that is right."""

    @case(name, needs_run=True)
    def _(here: Path) -> list[str]:
        for folder in checkpoints(here):
            forge(folder, file, content(folder / file))
        return arguments


def in_run(name: str, file: str, content: bytes, arguments: list[str]) -> None:
    """A case whose file lies in a run's folder."""

    @case(name, needs_run=True)
    def _(here: Path) -> list[str]:
        (here / "run" / file).write_bytes(content)
        return arguments


def alone(name: str, file: str, content: Callable[[], bytes], arguments: list[str]) -> None:
    """A case of one file."""

    @case(name)
    def _(here: Path) -> list[str]:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(content())
        return arguments


def tensors(header: dict[str, Any] | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def saved(state: Any, *, legacy: bool = False) -> bytes:
    """A .pt file."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    """A JSON file with a change."""

    def content(path: Path) -> bytes:
        values = json.loads(path.read_text())
        change(values)
        return json.dumps(values).encode()

    return content


# What lies in a checkpoint

EXPORT = ["export", "run", "--to", "run/x.safetensors"]
in_checkpoints("pickle as model.safetensors, resumed", "model.safetensors", lambda path: PICKLE, RESUME)
in_checkpoints("pickle as model.safetensors, exported", "model.safetensors", lambda path: PICKLE, EXPORT)
in_checkpoints("pickle as optimizer.safetensors", "optimizer.safetensors", lambda path: PICKLE, RESUME)
in_checkpoints("pickle as progress.json", "progress.json", lambda path: PICKLE, RESUME)
in_checkpoints("nested progress.json", "progress.json", lambda path: DEEP.encode(), RESUME)
in_checkpoints("huge numbers in progress.json", "progress.json", edited(lambda v: v.update(position=10**300)), RESUME)
in_checkpoints(
    "iteration of another in progress.json", "progress.json", edited(lambda v: v.update(iteration=1)), RESUME
)
in_checkpoints("escapes in progress.json", "progress.json", edited(lambda v: v["build"].update(torch=ESCAPE)), RESUME)
in_checkpoints("oversize header in a checkpoint", "model.safetensors", lambda path: tensors("{}", length=2**62), RESUME)
in_checkpoints(
    "escapes in a tensor's name, resumed",
    "model.safetensors",
    lambda path: tensors({ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    RESUME,
)
in_checkpoints(
    "a parameter that the model has not, in optimizer.safetensors",
    "optimizer.safetensors",
    lambda path: tensors(
        {f"{ESCAPE}/momentum_buffer": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
    ),
    RESUME,
)


def in_manifests(name: str, change: Callable[[Path], Any]) -> None:
    """A case of every checkpoint's manifest."""

    @case(name, needs_run=True)
    def _(here: Path) -> list[str]:
        for folder in checkpoints(here):
            change(folder)
        return RESUME


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest holds."""
    return json.loads((folder / "manifest.json").read_text())


def naming(folder: Path, name: str) -> None:
    """A manifest that names one more file, as large and with the digest that it has."""
    manifest = manifest_of(folder)
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign(folder, manifest)


def without(folder: Path, name: str) -> None:
    """A manifest that does not name one of the files."""
    manifest = manifest_of(folder)
    del manifest["files"][name]
    sign(folder, manifest)


def piped(folder: Path) -> None:
    """A pipe that nobody writes, in place of a file."""
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    forge(folder, "", files=manifest_of(folder)["files"] | {"model.safetensors": {"bytes": 0, "sha256": "0" * 64}})


def linked(folder: Path) -> None:
    """A link to a file elsewhere, in place of a file."""
    shutil.move(folder / "model.safetensors", folder.parents[3] / "outside" / folder.name)
    (folder / "model.safetensors").symlink_to(folder.parents[3] / "outside" / folder.name)


in_manifests("pickle as manifest.json", lambda folder: (folder / "manifest.json").write_bytes(PICKLE))
in_manifests("nested manifest.json", lambda folder: (folder / "manifest.json").write_text(DEEP))
in_manifests(
    "huge numbers in manifest.json", lambda folder: (folder / "manifest.json").write_text(f'{{"iteration": {HUGE}}}')
)
in_manifests(
    "infinite size in manifest.json",
    lambda folder: forge(folder, "", files={"model.safetensors": {"bytes": float("inf"), "sha256": ""}}),
)
in_manifests("traversal in manifest.json", lambda folder: naming(folder, "../../../../outside/precious"))
in_manifests("absolute path in manifest.json", lambda folder: naming(folder, "/etc/hostname"))
in_manifests("escapes in manifest.json", lambda folder: forge(folder, "", format=ESCAPE))
in_manifests("no progress.json in manifest.json", lambda folder: without(folder, "progress.json"))
in_manifests("a pipe in a checkpoint", piped)
in_manifests("a link in a checkpoint", linked)


@case("checkpoints are a link to another's", needs_run=True)
def _(here: Path) -> list[str]:
    shutil.move(here / "run" / "checkpoints", here.parent / "outside" / "checkpoints")
    (here / "run" / "checkpoints").symlink_to(here.parent / "outside" / "checkpoints")
    return RESUME


@case("links in the place of what is being written", needs_run=True, code=0)
def _(here: Path) -> list[str]:
    for name in (".writing-iteration-000000016", ".dropping-iteration-000000008"):
        (here / "run" / "checkpoints" / name).symlink_to(here.parent / "outside")
    return RESUME


# What else lies in a run's folder

in_run("pickle as recipe.toml", "recipe.toml", PICKLE, ["evaluate", "run"])
in_run("pickle as metrics.jsonl, resumed", "metrics.jsonl", PICKLE + b"\n", RESUME)
in_run("pickle as timing.jsonl", "timing.jsonl", PICKLE + b"\n", RESUME)
in_run("pickle as environment.json", "environment.json", PICKLE, RESUME)
in_run("pickle as summary.json", "summary.json", PICKLE, ["plan", "digits", "--run", "run"])
in_run("pickle as metrics.jsonl, reported", "metrics.jsonl", PICKLE + b"\n", ["report", "run"])

# Weights from elsewhere

EVALUATE = ["evaluate", "x.pt", *OF_DIGITS]
SAFE = ["evaluate", "x.safetensors", *OF_DIGITS]
alone("pickle as .safetensors", "x.safetensors", lambda: PICKLE, SAFE)
alone("oversize header", "x.safetensors", lambda: tensors("{}", length=2**63 + 5), SAFE)
alone("header of 90 MB", "x.safetensors", lambda: tensors(" " * 90_000_000), SAFE)
alone("nested header", "x.safetensors", lambda: tensors(DEEP), SAFE)
alone(
    "tensors that lie over each other",
    "x.safetensors",
    lambda: tensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)),
    SAFE,
)
alone(
    "tensor beyond the end",
    "x.safetensors",
    lambda: tensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8)),
    SAFE,
)
alone(
    "shape that overflows",
    "x.safetensors",
    lambda: tensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)),
    SAFE,
)
alone(
    "escapes in a tensor's name",
    "x.safetensors",
    lambda: tensors({ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    SAFE,
)
alone("pickle in a .pt", "x.pt", lambda: saved({"a": Payload()}), EVALUATE)
alone("pickle in an old .pt", "x.pt", lambda: saved({"a": Payload()}, legacy=True), EVALUATE)
alone("plain pickle as .pt", "x.pt", lambda: PICKLE, EVALUATE)
alone("an object of numpy in a .pt", "x.pt", lambda: saved({"a": np.array([Payload()], object)}), EVALUATE)
alone("escapes in a .pt's names", "x.pt", lambda: saved({ESCAPE: torch.ones(1)}), EVALUATE)
alone("numbers as a .pt's names", "x.pt", lambda: saved({1: torch.ones(1)}), EVALUATE)
alone(
    "four bytes as a terabyte in a .pt",
    "x.pt",
    lambda: saved({"a": torch.ones(1).expand(2**38)}),
    ["export", "x.pt", "--to", "run.safetensors"],
)
