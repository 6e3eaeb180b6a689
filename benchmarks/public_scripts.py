"""The check on public training scripts as they are, and with four faults planted in each.

    python benchmarks/public_scripts.py [--checkouts DIR] [--only WORD] [--originals] [--known]

`public_scripts.toml` beside this file lists them: repository, commit, path, arguments, generated data, what is right to
be found in the original, and the faults, each an edit of a line or two (a regular expression, and what takes the place
of what it finds). A repository that is not in DIR is cloned from GitHub; each script runs in a copy. A fault is found
if its id is, and was not in the original. A finding in an original that the list does not confirm is a false alarm.

What has a line in runs/check/public.jsonl for the same script, edit, check and torch is not run again. Scripts whose
packages are not installed, and with --known those that have no lines there yet, are listed as not run. Writes
results/public_scripts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import linecache
import pickle
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from check_matrix import ROOT, code
from onehour.check.case import Base
from onehour.check.pitfalls import PITFALLS
from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.cli.check import read_command

LIST = Path(__file__).with_suffix(".toml")
LINES = ROOT / "runs" / "check" / "public.jsonl"


@dataclass(frozen=True)
class Script:
    """One script of the list.

    Args:
        repository, commit, path: on GitHub, and in it.
        faults: each with `id`, `find` and `write`, and `file` where it is another than the script.
        arguments: its own.
        launch: what starts it, such as `fabric run --devices 2`; nothing, if empty.
        base: the recipe that it was scaled from, as `Base` has it.
        folder: that it runs in; its own, if empty.
        python_path: a folder of the repository from which it imports.
        parts: paths of the repository that it needs; all, if empty.
        data: what is generated, a kind and where to.
        edits: `[find, write]` or `[find, write, file]`: sizes, and data that the script would check by a digest.
        needs: packages beside torch.
        right: ids found in the original, and why each is so.
    """

    repository: str
    commit: str
    path: str
    faults: list[dict[str, str]]
    arguments: str = ""
    launch: str = ""
    base: dict[str, Any] = field(default_factory=dict[str, Any])
    folder: str = ""
    python_path: str = ""
    parts: list[str] = field(default_factory=list[str])
    data: list[list[str]] = field(default_factory=list[list[str]])
    edits: list[list[str]] = field(default_factory=list[list[str]])
    needs: list[str] = field(default_factory=list[str])
    right: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(package) for package in self.needs)


def scripts() -> list[Script]:
    """All of the list."""
    listed = [Script(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["scripts"]]
    unknown = {fault["id"] for script in listed for fault in script.faults} - PITFALLS.keys()
    assert not unknown, f"no pitfalls: {unknown}"
    return listed


@contextmanager
def copied(script: Script, checkouts: Path) -> Iterator[Path]:
    """The repository at the script's commit, with its data, in a folder that is removed afterwards."""
    checkout = checkouts / script.repository.replace("/", "+")
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", f"https://github.com/{script.repository}", checkout], check=True)
    command = ["git", "-C", checkout, "archive", script.commit, "--", *script.parts]
    packed = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory(prefix="onehour-public-") as folder:
        tree = Path(folder).resolve()
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(tree, filter="data")
        for kind, where in script.data:
            DATA[kind](tree / where)
        for find, write, *file in script.edits:
            edit(tree / (file[0] if file else script.path), find, write)
        yield tree


def edit(path: Path, find: str, write: str) -> str:
    """Replace what a pattern finds, everywhere, and return what was there before."""
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(find, write, before, flags=re.MULTILINE)
    assert count, f"{find!r} finds nothing in {path}"
    path.write_text(after, encoding="utf-8")
    return before


def checked(script: Script, tree: Path, forkserver: ForkServer) -> dict[str, Any]:
    """What the check says of the script as it lies there."""
    words = [*shlex.split(script.launch), str(tree / script.path), *shlex.split(script.arguments)]
    command = read_command(words, tree)
    command.environ["MPLBACKEND"] = "agg"
    if script.python_path:
        command.environ["PYTHONPATH"] = str(tree / script.python_path)
    folder = tree / (script.folder or Path(script.path).parent)
    began = time.monotonic()
    linecache.clearcache()  # the same file was another script before
    row: dict[str, Any] = {"error": None, "findings": [], "notes": []}
    try:
        came = check_script(command, base=Base(**script.base), forkserver=forkserver, cwd=folder)
    except CheckError as error:
        row["error"] = str(error).replace(f"{tree}/", "")
    else:
        row["findings"] = [
            {
                "id": finding.pitfall,
                "measured": finding.measured.replace(f"{tree}/", ""),
                "where": (finding.where or "").removeprefix(f"{tree}/"),
            }
            for finding in came.findings
        ]
        row["notes"] = [note.replace(f"{tree}/", "") for note in came.notes]
    return row | {"seconds": round(time.monotonic() - began, 1)}


class NotKnownError(Exception):
    """Nothing may be run, and the lines of earlier runs lack one."""


def judged(script: Script, checkouts: Path, forkserver: ForkServer | None, *, originals: bool) -> dict[str, Any]:
    """The script's row: what is found in it as it is, and which planted faults are."""
    row: dict[str, Any] = {"repository": script.repository, "commit": script.commit, "path": script.path}
    with copied(script, checkouts) as tree:
        original = resumed(script, {}, tree, forkserver)
        before = {finding["id"] for finding in original["findings"]}
        row |= original | {"right": script.right, "false_alarms": sorted(before - script.right.keys()), "faults": []}
        for fault in [] if originals else script.faults:
            there = tree / fault.get("file", script.path)
            text = edit(there, fault["find"], fault["write"])
            came = resumed(script, fault, tree, forkserver)
            there.write_text(text, encoding="utf-8")
            places = {finding["id"]: finding["where"] for finding in came["findings"]}
            kept = {"id": fault["id"], "found": fault["id"] in places.keys() - before}
            kept |= {"where": places.get(fault["id"]), "others": sorted(places.keys() - before - {fault["id"]})}
            row["faults"].append(kept | {"error": came["error"], "seconds": came["seconds"]})
            print("  ", row["faults"][-1], flush=True)
    return row


def resumed(script: Script, fault: dict[str, str], tree: Path, forkserver: ForkServer | None) -> dict[str, Any]:
    """What is known of the same text and the same check, or comes of a run now; without a forkserver none is made."""
    texts = [(tree / path).read_bytes() for path in (script.path, fault.get("file", script.path))]
    said = [script.commit, script.launch, script.arguments, script.base, script.folder, script.data, script.edits]
    said += [version(package) for package in script.needs]
    digest = hashlib.sha256(b"\0".join([code(), json.dumps([*said, fault]).encode(), *texts])).hexdigest()[:16]
    for line in LINES.read_text(encoding="utf-8").splitlines() if LINES.exists() else []:
        if (known := json.loads(line))["digest"] == digest:
            return known["row"]
    if forkserver is None:
        raise NotKnownError
    row = checked(script, tree, forkserver)
    LINES.parent.mkdir(parents=True, exist_ok=True)
    with LINES.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"digest": digest, "row": row}, ensure_ascii=False) + "\n")
    return row


def digits(folder: Path) -> None:
    """MNIST's files with 320 images of noise to train on and 90 to test."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0)
    for part, samples in (("train", 320), ("t10k", 90)):
        images = drawn.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = np.arange(samples, dtype=np.uint8) % 10
        for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
            head = bytes([0, 0, 8, values.ndim]) + shape
            (raw / f"{part}-{name}").write_bytes(head + values.tobytes())


def words(folder: Path) -> None:
    """Three texts of 60 words in an order without sense, 4,000 to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0)
    for part, count in (("train", 4000), ("valid", 500), ("test", 500)):
        lines = [" ".join(f"w{word}" for word in line) for line in drawn.integers(0, 60, (count // 10, 10))]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokens(folder: Path) -> None:
    """Two binary files of 16-bit tokens below 64, with the size of their vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0)
    for part in ("train", "val"):
        (folder / f"{part}.bin").write_bytes(drawn.integers(0, 64, 20_000, dtype=np.uint16).tobytes())
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 64}))


def pets(folder: Path) -> None:
    """Pictures of two classes of 35, as NAME_NUMBER.jpg."""
    folder.mkdir()
    for number in range(70):
        picture(number, folder / f"{('cat', 'dog')[number % 2]}_{number}.jpg")


def classes(folder: Path) -> None:
    """Pictures of 10 classes, 80 to train on and 50 to test, in the folders of ImageFolder."""
    for part, count in (("train", 80), ("test", 50)):
        for number in range(count):
            (folder / part / str(number % 10)).mkdir(parents=True, exist_ok=True)
            picture(number, folder / part / str(number % 10) / f"{number}.png")


def picture(number: int, path: Path) -> None:
    """A picture of 32 x 32, unlike others: a colour that changes from corner to corner."""
    from PIL import Image

    corners = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(corners).resize((32, 32), Image.Resampling.BILINEAR).save(path)


def nothing(folder: Path) -> None:
    """An empty folder, where a script expects one."""
    folder.mkdir(parents=True, exist_ok=True)


DATA = {"digits": digits, "words": words, "tokens": tokens, "pets": pets, "classes": classes, "nothing": nothing}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts that the documents show."""
    faults = [fault for row in rows for fault in row["faults"]]
    return {
        "scripts": len(rows),
        "checked": sum(row["error"] is None for row in rows),
        "findings": sum(len(row["findings"]) for row in rows),
        "false_alarms": sum(len(row["false_alarms"]) for row in rows),
        "planted": len(faults),
        "found": sum(fault["found"] for fault in faults),
    }


def main() -> None:
    """Run what is missing and write the result."""
    from results import write

    parser = argparse.ArgumentParser()
    parser.add_argument("--checkouts", type=Path, default=ROOT / "runs" / "public")
    parser.add_argument("--only", default="", help="scripts with this word in their names; no result is written")
    parser.add_argument("--originals", action="store_true", help="without the faults; no result is written")
    parser.add_argument("--known", action="store_true", help="run nothing: write what is known")
    given = parser.parse_args()
    chosen = [script for script in scripts() if given.only in script.name]
    not_run = [{"script": script.name, "needs": script.needs} for script in chosen if not script.installed]
    rows = list[dict[str, Any]]()
    needed = sorted({package for script in chosen if script.installed for package in script.needs})
    with nullcontext() if given.known else ForkServer(preload=needed) as forkserver:
        for script in (script for script in chosen if script.installed):
            print(script.name, flush=True)
            try:
                rows.append(row := judged(script, given.checkouts, forkserver, originals=given.originals))
            except NotKnownError:
                not_run.append({"script": script.name, "needs": script.needs})
                continue
            ids = [f"{finding['id']} {finding['where']}: {finding['measured']}" for finding in row["findings"]]
            print(f"  {row['seconds']} s {ids} {row['error'] or ''} {row['notes']}", flush=True)
    counts = summary(rows)
    print(counts)
    if not (given.only or given.originals):
        packages = {package: version(package) for package in needed}
        write(__file__, "public_scripts", {"packages": packages, "summary": counts, "rows": rows, "not_run": not_run})


if __name__ == "__main__":
    main()
