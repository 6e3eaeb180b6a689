"""What users can observe of this state and of an older one, in one run on one machine: what differs is printed.

    python -m campaigns.observed 252f48a            # runs, files, names, exit codes and texts
    python -m campaigns.observed 252f48a --only runs,names

The older state is checked out into a temporary worktree; both use this environment's packages. Bits depend on the
machine, so nothing is compared with numbers from elsewhere. Exit code 1 if anything but a text differs.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MAKE_DATA = ROOT / "campaigns" / "observed_data.py"

DIGITS = "train digits --minibatch 1024 --epochs 2 --warmup none --milestones 1 --device cpu --threads 1"
FOLDER = (
    "train resnet50 --data images --model tinynet:rgb --minibatch 64 --per-worker 8 --base-minibatch 64 --epochs 2"
    " --warmup none --milestones 1 --device cpu --threads 1 --loaders 1"
)
RUNS = {
    "digits": [DIGITS],
    "digits on 2": [f"{DIGITS} --processes 2"],
    "digits canonical": [f"{DIGITS} --reduce canonical"],
    "digits canonical on 2": [f"{DIGITS} --reduce canonical --processes 2"],
    "digits cosine, nesterov, decay": [f"{DIGITS} --decay cosine --nesterov --weight-decay 0.001"],
    "digits float64": [f"{DIGITS} --precision float64 --seed 3"],
    "digits adamw": [f"{DIGITS} --optimizer adamw --scaling fixed --base-lr 0.001"],
    "digits, warmup, small": [
        "train digits --minibatch 256 --epochs 2 --warmup-epochs 1 --milestones 1 --device cpu --threads 1"
    ],
    "folder": [FOLDER],
    "folder, skip": [f"{FOLDER.replace('images', 'damaged')} --bad-images skip"],
    "cifar": [
        "train cifar10 --data cifar-10.tar.gz --model tinynet:rgb --minibatch 8 --per-worker 4 --base-minibatch 8"
        " --epochs 2 --warmup none --milestones 1 --device cpu --threads 1"
    ],
    "resume": [f"{DIGITS} --log tinynet:Stops", DIGITS],
}
"""The commands of each run; its folder is --out."""
TEXTS = [
    *("--version", "--help", "train --help", "plan --help", "sweep --help", "report --help", "verify --help"),
    *("check --help", "evaluate --help", "export --help", "data --help", "data index --help", "data pack --help"),
    *("plan resnet50", "plan resnet50 --minibatch 8k --json", "plan resnet50 --minibatch 256,512,1k,2k,4k,8k,16k"),
    *("plan digits --minibatch 512", "plan resnet50 --base 0.1@256", "plan --base 0.2@64 --minibatch 512"),
    *("plan resnet50 --minibatch 8k --as torch", "plan resnet50 --minibatch 8k --as timm"),
    *("plan resnet5", "train digits --minibatch 100", "train digits --workers 4", "train digits --data digit"),
    *("train nowhere.toml", "report nowhere", "evaluate nowhere", "export nowhere --to a.safetensors"),
    *("data doctor images", "data index images --out images.index", "sweep digits --seeds 0", "check nowhere.py"),
    *("sweep digits --minibatch 1k --seeds 1 --arm none --dry-run --out dry", "data doctor damaged --json"),
]
AFTER = [
    "evaluate runs/digits",
    "export runs/digits --to weights.safetensors",
    "sweep digits --minibatch 512,1k --base-minibatch 512 --epochs 1 --warmup none --seeds 2 --arm none --jobs 1"
    " --milestones 1 --device cpu --out swept",
    "report swept",
    "report runs/digits",
]
"""Commands that need the runs above; `FILES` are what they leave."""
FILES = {
    "swept/results.csv": "table",
    "swept/results.json": "keys",
    "report/results.csv": "table",
    "weights.safetensors": "bytes",
    "runs/digits/recipe.toml": "bytes",
    "runs/folder/recipe.toml": "bytes",
    "runs/digits/metrics.jsonl": "bytes",
    "runs/digits/summary.json": "keys",
    "runs/digits/timing.jsonl": "keys",
    "runs/digits/environment.json": "keys",
    "runs/folder, skip/bad_images.jsonl": "bytes",
}
NAMES = """
import dataclasses, inspect, json, re, onehour, onehour.check
from onehour.execution import Execution
found = {n: getattr(onehour, n) for n in onehour.__all__}
signature = lambda v: re.sub(" at 0x[0-9a-f]+", "", str(inspect.signature(v)))
names = {n: signature(v) if callable(v) else "value" for n, v in found.items()}
names |= {f"check.{n}": "" for n in onehour.check.__all__}
names |= {f"Execution.{f.name}": str(f.default) for f in dataclasses.fields(Execution)}
print(json.dumps(names))
"""


class State:
    """The commands of one state of the code, run in a folder of its own with the same data."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join((str(source), str(folder)))
        self.environ = os.environ | {"PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
        folder.mkdir()
        self._python(str(MAKE_DATA))

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=600)

    def onehour(self, arguments: str) -> dict[str, Any]:
        """Exit code and both outputs, without what no two runs share."""
        done = self._python("-m", "onehour", *shlex.split(arguments))
        return {"exit": done.returncode, "out": told(done.stdout), "err": told(done.stderr)}

    def runs(self) -> dict[str, Any]:
        """Of each run: exit codes, digests of its state, and of the bytes of its record."""
        found = {}
        for name, commands in RUNS.items():
            out = Path("runs") / name
            codes = [self.onehour(f"{command} --out {shlex.quote(str(out))}")["exit"] for command in commands]
            summary = read_json(self.folder / out / "summary.json")
            found[name] = {
                "exit": codes,
                **{key: summary.get(key) for key in ("state_sha256", "weights_sha256", "final_error", "outcome")},
                "metrics": digest(self.folder / out / "metrics.jsonl"),
            }
        return found

    def names(self) -> dict[str, str]:
        """Public names with their signatures."""
        done = self._python("-c", NAMES)
        return json.loads(done.stdout) if done.returncode == 0 else {"import": done.stderr}

    def texts(self) -> dict[str, Any]:
        """What commands print that train nothing, and their exit codes."""
        return {command: self.onehour(command) for command in TEXTS}

    def files(self) -> dict[str, Any]:
        """What the commands after the runs say and leave."""
        found: dict[str, Any] = {command: self.onehour(command) for command in AFTER}
        for name, kind in FILES.items():
            found[name] = {"table": table, "keys": shape, "bytes": digest}[kind](self.folder / name)
        return found


def told(text: str) -> str:
    """A text without times, speeds, places and process numbers."""
    text = re.sub(r"/\S*/(?=\S)", "", text)
    text = re.sub(r"\b\d+(\.\d+)? ?(s|ms|minutes?|MB|images/s|GB)\b", r"… \2", text)
    text = re.sub(r"most time goes to [^.\n]*", "most time goes to …", text)
    return re.sub(r"[ \t]+\n", "\n", text)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def table(path: Path) -> list[str] | None:
    """A CSV without its columns of time."""
    if not path.is_file():
        return None
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [i for i, head in enumerate(rows[0]) if "second" not in head]
    return [",".join(row[i] for i in kept if i < len(row)) for row in rows]


def shape(path: Path) -> Any:
    """The keys and types of a JSON file, or of the first line of one that has several."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(inner) for key, inner in sorted(value.items())}
        return [of(value[0])] if isinstance(value, list) and value else type(value).__name__

    return of(json.loads(text.splitlines()[-1] if path.suffix == ".jsonl" else text))


def differences(part: str, old: Any, new: Any, place: str = "") -> Iterator[tuple[bool, str]]:
    """Every place where two records differ: whether only a text does, and what."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(part, old.get(key), new.get(key), f"{place}{' → ' if place else ''}{key}")
    elif old != new:
        is_text = place.endswith(("→ out", "→ err"))
        if is_text and isinstance(old, str) and isinstance(new, str):
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "before", "now", lineterm="", n=0)
            yield True, f"{part}: {place}\n" + "\n".join(f"    {line}" for line in [*lines][2:])
        else:
            yield False, f"{part}: {place}\n    before {old!r}\n    now    {new!r}"


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of a commit; its src."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True)
    try:
        yield folder / "src"
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def main() -> int:
    """Record both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older state")
    parser.add_argument("--only", default="runs,names,texts,files", help="parts of it")
    options = parser.parse_args()
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory() as temporary, checked_out(options.commit, Path(temporary) / "tree") as source:
        states = (State(source, Path(temporary) / "old"), State(ROOT / "src", Path(temporary) / "new"))
        with ThreadPoolExecutor(2) as pool:
            old, new = pool.map(lambda state: {part: getattr(state, part)() for part in parts}, states)
    found = [said for part in parts for said in differences(part, old[part], new[part])]
    for _, text in found:
        print(text)
    graver = sum(not is_text for is_text, _ in found)
    print(f"{graver} differences, and {len(found) - graver} texts that differ, between {options.commit} and this state")
    return int(graver > 0)


if __name__ == "__main__":
    sys.exit(main())
