"""What every committed result says about where it comes from, and how it is written."""

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

__all__ = ["RESULTS", "mean_std", "provenance", "write"]

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Hardware, versions and commit."""
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
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src")),
    }


def mean_std(values: list[float]) -> dict[str, float | int]:
    """Mean, standard deviation with n − 1, and n."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": len(values)}


def write(name: str, content: dict[str, Any]) -> Path:
    """Write results/NAME.json with its provenance."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), **content}, indent=2, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent.parent, check=True
    ).stdout.strip()
