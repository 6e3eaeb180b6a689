"""Whether all processes of a run are about to train the same: compared before the first iteration, and named if not."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from onehour.dist.group import Group
from onehour.machine import which_cores

__all__ = ["DIFFERENT", "Facts", "agree"]

Facts = Mapping[str, Mapping[str, Any]]
"""What a process is about to do: by kind, then by name, values that JSON has."""
DIFFERENT = ("versions",)
"""Kinds that a person may allow to differ."""
NOTHING: Facts = {}
SHOWN, LONGEST = 3, 120
"""Differences of a kind that a message names, and characters of a value at most."""
ADVICE = {
    "versions": "install the same, or say --allow-different versions",
    "model": "give the name of a function, or seed before the model is built",
}


def agree(group: Group, facts: Facts = NOTHING, *, failed: Exception | None = None, allowed: Sequence[str] = ()) -> int:
    """Compare what all processes say; they call it together.

    Of the recipe every field counts; of other kinds what both have, since a process may know less than another one.

    Args:
        facts: of this process.
        failed: why it cannot go on. Then nobody does, and all hear it.
        allowed: kinds that may differ, if all processes allow it; process 0 then prints how they do.

    Returns:
        How many processes, this one among them, share its cores.

    Raises:
        ValueError: the same in all processes, with what differs, the hosts and both values; or `failed`.

    >>> agree(Group(), {"recipe": {"seed": 1}})
    1
    """
    if group.size > 1:
        mine = {
            "host": socket.gethostname(),
            "cores": which_cores(),
            "facts": facts,
            "failed": None if failed is None else str(failed),
            "allowed": list(allowed),
        }
        said = [json.loads(text) for text in group.gather(json.dumps(mine).encode())]
        allowed = [kind for kind in DIFFERENT if all(kind in each["allowed"] for each in said)]
        refused, borne = refusal(said, allowed)
        if refused:
            raise ValueError(refused) from failed
        if borne and group.rank == 0:
            with suppress(OSError):  # nor does an output that cannot be written end a run
                print(f"warning: as allowed, {borne}", file=sys.stderr, flush=True)
        here = [each["cores"] for each in said if each["host"] == mine["host"]]
        return sum(bool(cores & mine["cores"]) for cores in here)
    if failed is not None:
        raise failed
    return 1


def refusal(said: Sequence[Mapping[str, Any]], allowed: Sequence[str] = ()) -> tuple[str, str]:
    """Why processes that say this cannot train together, and what is allowed to differ and does; empty for none.

    Args:
        said: by rank: the host, its facts, and why it failed or None.

    >>> said = [{"host": host, "failed": None, "facts": {"recipe": {"seed": ord(host) - 96}}} for host in "ab"]
    >>> refusal(said)[0]
    'the processes do not train the same: seed is 1 on process 0 (a) and 2 on process 1 (b)'
    """
    failed = {each["failed"] for each in said if each["failed"] is not None}
    if len(failed) == 1 and all(each["failed"] is not None for each in said):
        return failed.pop(), ""
    found: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kind for each in said for kind in each["facts"]):
        found[kind] = list(_differences(said, kind))
    borne = [text for kind in allowed for text in found.pop(kind, [])]
    texts = [text for kind in found for text in _first(found[kind], kind)]
    for rank, each in enumerate(said):
        if each["failed"] is not None:
            return "; ".join([f"{_who(said, rank)} cannot train: {each['failed']}", *texts]), ""
    if not texts:
        return "", "; ".join(borne)
    advice = [text for kind, text in ADVICE.items() if found.get(kind)]
    return f"the processes do not train the same: {'; '.join([*texts, *advice])}", ""


def _first(texts: list[str], kind: str) -> list[str]:
    more = [f"and {len(texts) - SHOWN} more of the {kind}"] if len(texts) > SHOWN else []
    return [*texts[:SHOWN], *more]


def _differences(said: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Of each name that two processes have other values for: process 0, or the first that has one, and another."""
    everything = kind == "recipe"
    texts = []
    known = [each["facts"].get(kind) for each in said]
    for name in dict.fromkeys(name for facts in known if facts is not None for name in facts):
        values = {
            rank: facts.get(name, "not given")
            for rank, facts in enumerate(known)
            if facts is not None and (everything or name in facts)
        }
        first, *others = values
        other = [rank for rank in others if values[rank] != values[first]]
        if other:
            more = f", as on {len(other) - 1} more" if len(other) > 1 else ""
            one, two = (f"{_shown(values[rank])} on {_who(said, rank)}" for rank in (first, other[0]))
            texts.append(f"{name} is {one} and {two}{more}")
    return texts


def _who(said: Sequence[Mapping[str, Any]], rank: int) -> str:
    return f"process {rank} ({said[rank]['host']})"


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
