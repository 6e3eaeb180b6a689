"""Edits of a source's text at the positions of its syntax tree; everything else stays as it was written."""

from __future__ import annotations

import ast

from onehour.check.remedies.source import Source, UnsureError

__all__ = ["Changes"]

Edit = tuple[int, int, str]
"""From, to, and the new text."""


class Changes:
    """What is to be changed in a source.

    Args:
        source: that they are made in.

    >>> source = Source("t.py", "a = f(1, b=2)\\n")
    >>> changes = Changes(source)
    >>> changes.keyword(source.call(1, "f"), "b", "3"); changes.insert_after(source.at(1), "g()")
    >>> changes.text()
    'a = f(1, b=3)\\ng()\\n'
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.edits: list[Edit] = []

    def replace(self, node: ast.AST, text: str) -> None:
        """Put a text in a node's place.

        >>> source = Source("t.py", "f(x)\\n")
        >>> changes = Changes(source)
        >>> changes.replace(source.call(1, "f"), "g()")
        >>> changes.text()
        'g()\\n'
        """
        self.edits.append((*self.source.span(node), text))

    def keyword(self, call: ast.Call, name: str, value: str | None) -> None:
        """Set, add or remove (None) an argument that is given by its name.

        Raises:
            UnsureError: if it may be among arguments that are unpacked.

        >>> source = Source("t.py", "f(a, b=1)\\n")
        >>> changes = Changes(source)
        >>> changes.keyword(source.call(1, "f"), "b", None)
        >>> changes.text()
        'f(a)\\n'
        """
        given = next((keyword for keyword in call.keywords if keyword.arg == name), None)
        if given is None and any(keyword.arg is None for keyword in call.keywords):
            raise UnsureError(f"{name} may be among the arguments that line {call.lineno} unpacks")
        if given is not None and value is not None:
            self.replace(given.value, value)
        elif given is not None:
            self._remove(call, given)
        elif value is not None:
            _, end = self.source.span(call)
            inside = self.source.text[: end - 1].rstrip()
            comma = "" if inside.endswith("(") else " " if inside.endswith(",") else ", "
            self.edits.append((len(inside), len(inside), f"{comma}{name}={value}"))

    def _remove(self, call: ast.Call, given: ast.keyword) -> None:
        text = self.source.text
        start, end = self.source.span(given)
        before = text[:start].rstrip()
        if before.endswith(","):
            start = len(before) - 1
        else:  # the first argument goes with the comma behind it
            rest = text[end:].lstrip()
            if rest.startswith(","):
                end = len(text) - len(rest[1:].lstrip(" "))
        self.edits.append((start, end, ""))

    def insert_after(self, statement: ast.stmt, *lines: str) -> None:
        """New lines behind a statement, indented as it is.

        >>> source = Source("t.py", "if a:\\n    b = 1")
        >>> changes = Changes(source)
        >>> changes.insert_after(source.at(2), "c = 2")
        >>> changes.text()
        'if a:\\n    b = 1\\n    c = 2'
        """
        source, last = self.source, statement.end_lineno or statement.lineno
        rest = source.text[source.span(statement)[1] : source.starts[last]].strip()
        if rest and not rest.startswith("#"):
            raise UnsureError(f"line {last} holds several statements")
        indent = self._indent(statement)
        text = "".join(f"{indent}{line}{source.end}" for line in lines)
        if not source.lines[last - 1].endswith("\n"):
            text = source.end + text.removesuffix(source.end)
        self.edits.append((source.starts[last], source.starts[last], text))

    def insert_before(self, statement: ast.stmt, *lines: str) -> None:
        """New lines in front of a statement, indented as it is.

        >>> source = Source("t.py", "if a:\\n    b = 1\\n")
        >>> changes = Changes(source)
        >>> changes.insert_before(source.at(2), "c = 2")
        >>> changes.text()
        'if a:\\n    c = 2\\n    b = 1\\n'
        """
        source, indent = self.source, self._indent(statement)
        decorators = getattr(statement, "decorator_list", [])
        at = source.starts[min([statement.lineno, *(d.lineno for d in decorators)]) - 1]
        self.edits.append((at, at, "".join(f"{indent}{line}{source.end}" for line in lines)))

    def delete(self, statement: ast.stmt) -> None:
        """Take a statement away, with its lines.

        Raises:
            UnsureError: if it shares a line, or is all that its block has.

        >>> source = Source("t.py", "a = 1\\nb = 2\\n")
        >>> changes = Changes(source)
        >>> changes.delete(source.at(1))
        >>> changes.text()
        'b = 2\\n'
        """
        source, last = self.source, statement.end_lineno or statement.lineno
        self._indent(statement)
        rest = source.text[source.span(statement)[1] : source.starts[last]].strip()
        if rest and not rest.startswith("#"):
            raise UnsureError(f"line {last} holds several statements")
        parent = next(iter(source.around(statement)))
        if any(getattr(parent, name, None) == [statement] for name in ("body", "orelse", "finalbody")):
            raise UnsureError(f"line {statement.lineno} is all that its block has")
        self.edits.append((source.starts[statement.lineno - 1], source.starts[last], ""))

    def imported(self, module: str) -> None:
        """Import a module if the file does not: behind the imports that it has at its head.

        >>> changes = Changes(Source("t.py", "import os\\na = 1\\n"))
        >>> changes.imported("onehour")
        >>> changes.text()
        'import os\\nimport onehour\\na = 1\\n'
        """
        body = self.source.tree.body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {a.name for node in imports if isinstance(node, ast.Import) for a in node.names if not a.asname}
        if module in names or any(name.startswith(f"{module}.") for name in names):
            return
        head = imports[-1] if imports else None
        if head is None and body and ast.get_docstring(self.source.tree) is not None:
            head = body[0]
        text = f"import {module}{self.source.end}"
        at = self.source.starts[(head.end_lineno or 0) if head is not None else 0]
        self.edits.append((at, at, text))

    def text(self) -> str:
        """The source's text with all edits, those at one place in the order in which they were made.

        >>> Changes(Source("t.py", "a\\n")).text()
        'a\\n'
        """
        parts, at = [], 0
        for start, end, new in sorted(self.edits, key=lambda edit: edit[:2]):
            assert start >= at, "edits overlap"
            parts += [self.source.text[at:start], new]
            at = end
        return "".join([*parts, self.source.text[at:]])

    def _indent(self, statement: ast.stmt) -> str:
        """The white space before a statement that is the first on its line."""
        start, _ = self.source.span(statement)
        before = self.source.text[self.source.starts[statement.lineno - 1] : start]
        if before.strip():
            raise UnsureError(f"line {statement.lineno} holds several statements")
        return before


def overlap(edits: list[Edit], others: list[Edit]) -> bool:
    """Whether some edits change what others change; insertions at one place do not.

    >>> overlap([(0, 4, "")], [(2, 2, "a")]), overlap([(2, 2, "a")], [(2, 2, "b")]), overlap([(2, 4, "")], [(0, 2, "")])
    (True, False, False)
    """
    for start, end, new in edits:
        for a, b, other in others:
            same = (start, end, new) == (a, b, other)
            if not same and start < b and a < end:
                return True
    return False
