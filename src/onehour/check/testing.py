"""For test suites: a training script, or a loop inside a test, that must be clean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onehour.check.case import Base
from onehour.check.finding import as_table
from onehour.check.runner import check_script

__all__ = ["assert_clean"]


def assert_clean(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    base_lr: float | None = None,
    base_minibatch: int | None = None,
    base_per_worker: int | None = None,
    base_weight_decay: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    limit: float = 120.0,
) -> None:
    """Check a script as `onehour check` does, and fail with the findings, if there are any.

    Args:
        script: a Python file.
        arguments: its own.
        base_lr, base_minibatch, base_per_worker, base_weight_decay: the recipe that it was scaled from.
        only, skip: ids of pitfalls to look for, or to leave out.
        limit: seconds for each run.

    Raises:
        AssertionError: with the table of findings.
        onehour.check.CheckError: if the script could not be run, or never stepped an optimizer.

    >>> assert_clean("nowhere.py")
    Traceback (most recent call last):
        ...
    onehour.check.runner.CheckError: there is no script nowhere.py
    """
    base = Base(base_lr, base_minibatch, base_per_worker, base_weight_decay)
    findings = check_script(script, arguments, base=base, only=only, skip=skip, limit=limit).findings
    if findings:
        raise AssertionError(f"{len(findings)} finding(s) in {script}\n\n{as_table(findings)}")
