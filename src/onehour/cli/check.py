"""`onehour check`: the paper's pitfalls in anyone's training script."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.cli.parser import size
from onehour.messages import tell
from onehour.rules.arguments import positive

if TYPE_CHECKING:
    from onehour.check.run.checking import Checked, Command


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
_COUNTS = ("--nproc-per-node", "--num-processes", "--devices")  # how launchers are told how many processes they start
_AS_ENVIRONMENT = {
    "accelerate": {"--mixed-precision": "ACCELERATE_MIXED_PRECISION", "--cpu": "ACCELERATE_USE_CPU"},
    "fabric": {"--accelerator": "LT_ACCELERATOR", "--strategy": "LT_STRATEGY", "--precision": "LT_PRECISION"},
}
"""What launchers tell a script of their options."""
_PYTHON = re.compile(r"python[\d.]*")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="find the paper's pitfalls in your own training script",
        description="Run a training script, unedited, for a few iterations, and say what in it breaks the paper's"
        " rules, by how much, where, and what to change. Exits with 0 if nothing was found, 1 if something was, 2 if"
        " the script could not be checked, 3 if nothing was found and something that was asked for was not judged.",
    )
    check.add_argument("script", metavar="SCRIPT", nargs="?", help="a Python file; its own arguments come after --")
    check.add_argument(
        "arguments",
        metavar="-- ARGUMENTS",
        nargs="*",
        help="the script's own arguments; without SCRIPT a command: -- torchrun --nproc-per-node 2 train.py --lr 1",
    )
    base = check.add_argument_group("the recipe that it was scaled from (else rates are not judged against it)")
    base.add_argument("--base-lr", type=float, metavar="LR", help="the rate that is right for the base minibatch")
    base.add_argument("--base-minibatch", type=size, metavar="SIZE", help="images per update at that rate")
    base.add_argument("--base-per-worker", type=size, metavar="N", help="n, images that BatchNorm sees at once there")
    base.add_argument("--base-weight-decay", type=float, metavar="λ", help="as given to the optimizer")
    check.add_argument("--only", type=_ids, default=(), metavar="ID,…", help="pitfalls to look for (all)")
    check.add_argument("--skip", type=_ids, default=(), metavar="ID,…", help="pitfalls to leave out")
    check.add_argument("--strict", action="store_true", help="exit with 3 if any pitfall could not be judged")
    check.add_argument("--limit", type=float, default=120.0, metavar="S", help="seconds for the whole check (120)")
    form = check.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of findings as JSON")
    form.add_argument("--sarif", action="store_true", help="print the findings as SARIF 2.1.0, for code scanning")
    form.add_argument("--github", action="store_true", help="print the findings as annotations of a GitHub workflow")
    check.set_defaults(command=check_command)


def check_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.check.case import Base
    from onehour.check.formats import as_annotations, as_json, as_sarif, as_table
    from onehour.check.run.checking import Command, check_script
    from onehour.check.run.forkserver import CheckError

    try:
        if options.script:
            command = Command(options.script, options.arguments)
        elif options.arguments:
            command = read_command(options.arguments, Path())
        else:
            raise ValueError("check needs a script: `onehour check train.py -- ITS ARGUMENTS`")
        checked = check_script(
            command,
            base=Base(options.base_lr, options.base_minibatch, options.base_per_worker, options.base_weight_decay),
            only=options.only,
            skip=options.skip,
            strict=options.strict,
            limit=positive("--limit", options.limit),
        )
    except CheckError as error:
        tell(error)
        return 2
    if options.json or options.sarif:
        print(as_json(checked.findings) if options.json else as_sarif(checked.findings, command.script))
        return _exit_code(checked, options)
    for note in checked.notes:
        print(f"note: {note}")
    if checked.findings and options.github:
        print(as_annotations(checked.findings, command.script))
    elif checked.findings:
        print(as_table(checked.findings, width=min(shutil.get_terminal_size((100, 24)).columns, 120)))
        print()
    count = len(checked.findings)
    print(checked.runs)
    print(f"{command.script}: " + (f"{count} finding{'s' * (count != 1)}" if count else "nothing found"))
    return _exit_code(checked, options)


def _exit_code(checked: Checked, options: argparse.Namespace) -> int:
    """1 with findings; else 3 where a pitfall that was asked for was not judged."""
    unjudged = {name for note in checked.notes for name in note.pitfalls} - {*options.skip}
    missing = unjudged if options.strict else unjudged & {*options.only}
    return 1 if checked.findings else 3 if missing else 0


def _ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_command(words: Sequence[str], folder: Path) -> Command:
    """A script and its arguments as they are typed in a folder, perhaps with what starts it.

    That is VARIABLE=VALUE, python, a launcher and its options. A CheckError if no script is in it.
    """
    from onehour.check.run.checking import Command
    from onehour.check.run.forkserver import CheckError

    names = [os.path.basename(word) for word in words]
    starts = any(name in _LAUNCHERS or _PYTHON.fullmatch(name) for name in names)
    starts = starts or _ASSIGNED.fullmatch(words[0]) is not None or words[1:2] == ["run"]  # as uv and poetry have it
    if words[0].endswith(".py") or not starts:
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
            option, given, value = word.partition("=")
            option, value = option.replace("_", "-"), value if given else next(iter(after), "")
            if option in _COUNTS and value.isdigit():
                processes = int(value)
            elif name := _AS_ENVIRONMENT.get(launcher, {}).get(option):
                environ[name] = "true" if option == "--cpu" else value
    raise CheckError(f"there is no Python script in `{' '.join(words)}`")


def _file_of(module: str, folder: Path) -> str:
    """The file that `python -m MODULE` would run; nothing is imported to find it."""
    parts = module.split(".")
    for place in (str(folder), *sys.path):
        for path in (Path(place, *parts).with_suffix(".py"), Path(place, *parts, "__main__.py")):
            if path.is_file():
                return str(path)
    from onehour.check.run.forkserver import CheckError

    raise CheckError(f"there is no module {module}")
