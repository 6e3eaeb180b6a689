"""What is wrong with one file, as an error and as a line of a list: where, what, and how to fix it."""

from __future__ import annotations

from onehour.messages import shown

__all__ = ["FaultError"]


class FaultError(ValueError):
    """One file, folder or image that cannot be used as it is. Its text is one line.

    Args:
        path: of what is wrong.
        problem: continues the path to a sentence, e.g. "is an empty file".
        remedy: what to do.
        note: True where nothing is lost but a person should know.

    >>> print(FaultError("a.jpg", "is an empty file", "replace or remove it"))
    a.jpg is an empty file; replace or remove it
    """

    def __init__(self, path: str, problem: str, remedy: str, *, note: bool = False) -> None:
        super().__init__(shown(f"{path} {problem}; {remedy}"))
        self.path, self.problem, self.remedy, self.note = path, problem, remedy, note

    def __reduce__(self) -> tuple[type[FaultError], tuple[str, str, str], dict[str, bool]]:
        return type(self), (self.path, self.problem, self.remedy), {"note": self.note}
