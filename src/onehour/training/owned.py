"""A run whose folder is moved or removed under it: what can still be saved is, and all processes leave together."""

from __future__ import annotations

from onehour.dist.group import Group
from onehour.lock import FolderLostError
from onehour.training.record import Recorder

__all__ = ["Owned"]


class Owned:
    """Whether a run's folder is still its own, which process 0 finds where it writes.

    A folder that was moved is written to its end under the new name, since its lock is held still; one that was
    removed, or that another process may write, never again.

    Args:
        recorder: of process 0; None in the others.
        group: all processes.

    >>> owned = Owned(None, Group())
    >>> owned.look(), owned.lost, owned.leave("stopped")
    (False, None, None)
    """

    def __init__(self, recorder: Recorder | None, group: Group) -> None:
        self.recorder, self.group = recorder, group
        self.lost: FolderLostError | None = None
        """What became of the folder; process 0 then asks all for a stop."""

    def look(self) -> bool:
        """Look at the folder; whether this process may write there."""
        if self.recorder is None:
            return False
        try:
            self.recorder.check()
        except FolderLostError as error:
            self.lost = error
        return self.lost is None or self.lost.now is not None

    def leave(self, how: str) -> None:
        """Have all processes end, if process 0 has lost its folder; all call it together.

        Args:
            how: the run ended.

        Raises:
            FolderLostError: in each of them, with what became of the folder and how to go on.
        """
        said = self.group.broadcast(self.lost.ended(how).encode() if self.lost is not None else b"")
        if said:
            raise FolderLostError(said.decode(), now=self.lost.now if self.lost is not None else None)
