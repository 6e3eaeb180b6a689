"""What every committed result says about where it comes from, and how it is written.

A result names the commit that made it and the script's own digest there. It is written only if nothing that decides
it was uncommitted, from the script's start to its end; what an uncommitted state measured goes into a draft beside it,
which git ignores. A resumable script calls `claim`, so that no two states of the code share a folder of runs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["RESULTS", "claim", "made_by", "mean_std", "write"]

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
DECIDES = (
    "src",
    "benchmarks",
    "campaigns",
    "pyproject.toml",
    "constraints.txt",
)
"""What decides a result: the code, the data that lies in it, the scripts, the versions."""
CLAIM = "made-by.json"


def machine() -> dict[str, Any]:
    """Day, hardware and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def state_of(script: str) -> dict[str, str]:
    """The commit, and git's digests of the source and of a script there."""
    path = Path(script).resolve().relative_to(ROOT)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "source": _git("rev-parse", "HEAD:src"),
        "script": str(path),
        "script_blob": _git("rev-parse", f"HEAD:{path}"),
    }


def made_by() -> dict[str, str]:
    """Where a part of a result comes from, for results whose parts are made on different days."""
    about = machine()
    return {"date": about["date"], "commit": _git("rev-parse", "HEAD"), "made_on": about["gpu"] or about["processor"]}


def uncommitted() -> list[str]:
    """Files that decide results and are not as they were committed, but for results themselves."""
    return _git("status", "--porcelain", "--", *DECIDES, ":!benchmarks/results").splitlines()


def claim(folder: Path, script: str) -> None:
    """Note beside a folder of runs which state of the code makes them; refuse one that another state has begun.

    Raises:
        SystemExit: if what `src` and the script are now is not what they were when the folder was begun, or is not
            committed.
    """
    changed = uncommitted()
    if changed:
        raise SystemExit(f"commit these first, so that the result can name what made it: {', '.join(changed)}")
    now = state_of(script)
    note = folder.with_name(f"{folder.name}.{CLAIM}")
    if folder.exists() and note.exists():
        then = json.loads(note.read_text())
        if (then["source"], then["script_blob"]) != (now["source"], now["script_blob"]):
            raise SystemExit(
                f"{folder} was begun at commit {then['commit'][:7]}, and src or {now['script']} has changed since;"
                " remove the folder, or check that commit out to go on with it"
            )
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now, indent=2) + "\n")


def mean_std(values: list[float]) -> dict[str, float | int]:
    """Mean, standard deviation with n − 1, and n."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": len(values)}


def write(script: str, name: str, content: dict[str, Any]) -> Path:
    """Write results/NAME.json with what made it, or results/NAME.draft.json if that was not one committed state.

    Args:
        script: the caller's `__file__`.
    """
    committed = not (_DIRTY_AT_START or uncommitted()) and _git("rev-parse", "HEAD") == _COMMIT_AT_START
    path = RESULTS / (f"{name}.json" if committed else f"{name}.draft.json")
    about = {"provenance": {**machine(), **state_of(script)}, **content}
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    if not committed:
        print("a draft: the code was not committed, or changed meanwhile. Commit, and run the script again")
    return path


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


_COMMIT_AT_START, _DIRTY_AT_START = _git("rev-parse", "HEAD"), bool(uncommitted())
