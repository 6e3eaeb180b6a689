"""Services that scripts report to are off: Weights & Biases, and MLflow, which reports to a folder of the run's own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def switch_off(folder: Path) -> None:
    """In this process and those that it starts.

    Args:
        folder: takes what MLflow writes.
    """
    store = folder.as_uri()
    os.environ.update(
        WANDB_MODE="disabled",
        MLFLOW_TRACKING_URI=store,
        MLFLOW_REGISTRY_URI=store,
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    sys.meta_path.insert(0, _Changing({"wandb": _change_wandb, "mlflow": _change_mlflow}))


def _change_wandb(wandb: ModuleType) -> None:
    """Whatever mode the script asks for, and without a key."""
    begin = wandb.init
    vars(wandb)["init"] = lambda *arguments, **options: begin(*arguments, **(options | {"mode": "disabled"}))
    vars(wandb)["login"] = lambda *arguments, **options: True


def _change_mlflow(mlflow: ModuleType) -> None:
    """The environment's store stays."""
    for name in ("set_tracking_uri", "set_registry_uri"):
        vars(mlflow)[name] = lambda *arguments, **options: None


class _Changing:
    """Changes modules when they are imported.

    Args:
        changes: by the module's name.
    """

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """As a finder of `sys.meta_path`: what the others find, for a module to change."""
        change = self.changes.pop(name, None)
        spec = importlib.util.find_spec(name) if change is not None else None
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        vars(spec.loader)["exec_module"] = execute_and_change
        return spec
