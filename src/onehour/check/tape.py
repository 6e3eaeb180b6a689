"""What was observed, in the order in which it happened: plain values that travel as JSON from process to process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Event", "Tape"]

LIMIT = 200_000
"""Events that a tape holds: some 20 thousand iterations; later ones are dropped, and `full` says so."""


@dataclass(slots=True)
class Event:
    """One thing that happened.

    Args:
        kind: what: "step", "backward", "batch" …; see the observers.
        where: file:line of the user's code.
        facts: numbers, texts and lists of them.

    >>> Event("step", "train.py:7", {"rates": [0.1]}).kind
    'step'
    """

    kind: str
    where: str | None
    facts: dict[str, Any] = field(default_factory=dict)


class Tape:
    """Events in order.

    >>> tape = Tape()
    >>> tape.add("step", "train.py:7", rates=[0.1])
    >>> [event.facts for event in tape.of("step")]
    [{'rates': [0.1]}]
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.full = False

    def add(self, kind: str, where: str | None = None, /, **facts: Any) -> None:
        """Append an event.

        >>> Tape().add("end", loader=0)
        """
        if len(self.events) < LIMIT:
            self.events.append(Event(kind, where, facts))
        else:
            self.full = True

    def of(self, *kinds: str) -> Iterator[Event]:
        """The events of some kinds.

        >>> list(Tape().of("step"))
        []
        """
        return (event for event in self.events if event.kind in kinds)

    def save(self, path: Path) -> None:
        """Write all as JSON."""
        content = {"full": self.full, "events": [[e.kind, e.where, e.facts] for e in self.events]}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)  # so that who sees the file sees all of it

    @classmethod
    def load(cls, path: Path) -> Tape:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        tape = cls()
        tape.full = content["full"]
        tape.events = [Event(*event) for event in content["events"]]
        return tape
