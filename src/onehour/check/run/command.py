"""What people type to start their training, read as a script, its arguments, and what a launcher would add."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onehour.check.run.forkserver import CheckError

_LAUNCHERS = {
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "launch",
    "accelerate": "accelerate",
    "accelerate.commands.launch": "accelerate",
    "fabric": "fabric",
    "lightning.fabric.cli": "fabric",
}
"""What a launcher is called as a command, and as a module."""
_COUNTS = ("--nproc-per-node", "--num-processes", "--devices")
"""How launchers are told how many processes they start."""
_AS_ENVIRONMENT = {
    "accelerate": {"--mixed-precision": "ACCELERATE_MIXED_PRECISION", "--cpu": "ACCELERATE_USE_CPU"},
    "fabric": {"--accelerator": "LT_ACCELERATOR", "--strategy": "LT_STRATEGY", "--precision": "LT_PRECISION"},
}
"""What launchers tell a script of their options."""
_PYTHON = re.compile(r"python[\d.]*")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A script as it is to be run.

    Args:
        script: its path, as it was typed or found.
        arguments: its own.
        module: its name, where it was started as `python -m NAME`.
        launcher: "torchrun", "launch" (its older form, which gives the script --local-rank), "accelerate" or "fabric";
            None where there was none.
        processes: how many the launcher would start; None where it was not told by a number.
        environ: what was set before the command, or is set by the launcher.
    """

    script: str
    arguments: list[str]
    module: str | None = None
    launcher: str | None = None
    processes: int | None = None
    environ: dict[str, str] = field(default_factory=dict[str, str])


def read_command(words: Sequence[str], folder: Path) -> Command:
    """Read a command line.

    Args:
        words: a script and its arguments, or with what starts it: VARIABLE=VALUE, python, a launcher and its options.
        folder: it would be typed in.

    Raises:
        CheckError: if no script is in it.

    >>> read_command(["torchrun", "--nproc-per-node", "2", "train.py", "--lr", "3"], Path())
    Command(script='train.py', arguments=['--lr', '3'], module=None, launcher='torchrun', processes=2, environ={})
    """
    names = [os.path.basename(word) for word in words]
    if words[0].endswith(".py") or not any(name in _LAUNCHERS or _PYTHON.fullmatch(name) for name in names):
        return Command(words[0], list(words[1:]))
    launcher, processes, environ = None, None, dict[str, str]()
    for index, word in enumerate(words):
        before, after = words[index - 1] if index else "", list(words[index + 1 :])
        if before in ("-m", "--module") and _LAUNCHERS.get(word) is None:
            return Command(_file_of(word, folder), after, word, launcher, processes, environ)
        if word.endswith(".py"):
            return Command(word, after, None, launcher, processes, environ)
        if launcher is None and (match := _ASSIGNED.fullmatch(word)):
            environ[match[1]] = match[2]
        elif launcher is None:
            launcher = _LAUNCHERS.get(names[index])
            if launcher == "fabric":
                environ |= {"LT_CLI_USED": "1", "LT_NUM_NODES": "1"}
        else:
            for option, value in _options(word, after):
                if option in _COUNTS and value.isdigit():
                    processes = int(value)
                elif name := _AS_ENVIRONMENT.get(launcher, {}).get(option):
                    environ[name] = "true" if option == "--cpu" else value
    raise CheckError(f"there is no Python script in `{' '.join(words)}`")


def _options(word: str, after: list[str]) -> Iterator[tuple[str, str]]:
    """The option that a word is, with its value."""
    if word.startswith("--"):
        name, given, value = word.partition("=")
        yield name.replace("_", "-"), value if given else next(iter(after), "")


def _file_of(module: str, folder: Path) -> str:
    """The file that `python -m MODULE` would run; nothing is imported to find it."""
    parts = module.split(".")
    for place in (str(folder), *sys.path):
        for path in (Path(place, *parts).with_suffix(".py"), Path(place, *parts, "__main__.py")):
            if path.is_file():
                return str(path)
    raise CheckError(f"there is no module {module}")
