"""A file's text with its syntax tree: which statement, call, loop and scope a line belongs to."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

__all__ = ["Source", "UnsureError", "place"]

Block = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)


class UnsureError(LookupError):
    """The code is written in a way for which no edit is known to be right; the text says in which.

    >>> str(UnsureError("line 7 holds several statements"))
    'line 7 holds several statements'
    """


def place(where: str | None) -> tuple[str, int] | None:
    """file and line of a place.

    >>> place("train.py:7"), place(None)
    (('train.py', 7), None)
    """
    file, _, line = (where or "").rpartition(":")
    return (file, int(line)) if file and line.isdigit() else None


def name_of(node: ast.AST) -> str | None:
    """The last part of a dotted name.

    >>> name_of(ast.parse("a.b.c", mode="eval").body)
    'c'
    """
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def parsed(text: str) -> ast.Module:
    """The syntax tree, without what Python would warn of in someone's code.

    >>> len(parsed("a = 1").body)
    1
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def lines_of(text: str) -> list[str]:
    """With their ends, as the syntax tree counts them: str.splitlines also splits at form feeds and others.

    >>> lines_of("a\\n\\fb\\n")
    ['a\\n', '\\x0cb\\n']
    """
    lines = [f"{line}\n" for line in text.split("\n")]
    return [*lines[:-1], lines[-1][:-1]] if lines[-1] != "\n" else lines[:-1]


class Source:
    """One file, as it is.

    Args:
        file: its path.
        text: its content; "\\r" only before "\\n".

    Raises:
        SyntaxError: if it is no Python.

    >>> source = Source("train.py", "a = nn.f(1, b=2)\\n")
    >>> source.segment(source.call(1, "f"))
    'nn.f(1, b=2)'
    """

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.tree = parsed(text)
        self.end = "\r\n" if "\r\n" in text else "\n"
        self.lines = lines_of(text)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    @classmethod
    def read(cls, file: str) -> Source | None:
        """A file's, or None if it cannot be read or parsed.

        >>> Source.read("nowhere.py") is None
        True
        """
        try:
            text = Path(file).read_bytes().decode("utf-8")
            return None if "\r" in text.replace("\r\n", "") or text.startswith("\ufeff") else cls(file, text)
        except (OSError, SyntaxError, ValueError):
            return None

    @cached_property
    def _parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """A node's ancestors, the nearest first.

        >>> source = Source("t.py", "if a:\\n    b = f(1)\\n")
        >>> [type(node).__name__ for node in source.around(source.call(2, "f"))]
        ['Assign', 'If', 'Module']
        """
        while node in self._parents:
            node = self._parents[node]
            yield node

    def scope(self, node: ast.AST) -> Block:
        """The function that a node stands in, or the module.

        >>> source = Source("t.py", "def g():\\n    f(1)\\n")
        >>> source.scope(source.call(2, "f")).name
        'g'
        """
        return next(n for n in self.around(node) if isinstance(n, Block))

    def every(self, kind: type[Node], within: ast.AST | None = None) -> list[Node]:
        """All nodes of a kind, in the file or in a node.

        >>> len(Source("t.py", "f(g(1))\\n").every(ast.Call))
        2
        """
        return [node for node in ast.walk(within or self.tree) if isinstance(node, kind)]

    def segment(self, node: ast.AST) -> str:
        """The text of a node.

        >>> source = Source("t.py", "f(x)\\n")
        >>> source.segment(source.tree.body[0])
        'f(x)'
        """
        start, end = self.span(node)
        return self.text[start:end]

    def statement(self, node: ast.AST) -> ast.stmt:
        """The statement that a node is in, or is.

        >>> source = Source("t.py", "a = f(1)\\n")
        >>> source.segment(source.statement(source.call(1, "f")))
        'a = f(1)'
        """
        found = node if isinstance(node, ast.stmt) else next(n for n in self.around(node) if isinstance(n, ast.stmt))
        assert isinstance(found, ast.stmt)
        return found

    def at(self, line: int) -> ast.stmt:
        """The one simple statement that a line belongs to.

        Raises:
            UnsureError: if it has none, or several.

        >>> source = Source("t.py", "if a:\\n    b = 1\\n")
        >>> source.segment(source.at(2))
        'b = 1'
        """
        found = [n for n in self.every(ast.stmt) if not hasattr(n, "body") and _covers(n, line)]
        if len(found) != 1:
            raise UnsureError(f"line {line} holds {'several statements' if found else 'no simple statement'}")
        return found[0]

    def call(self, line: int, *names: str) -> ast.Call:
        """The one call of a function, by the last part of its name, in the statement that a line belongs to.

        Raises:
            UnsureError: if there is none, or several.

        >>> Source("t.py", "a = nn.f(1)\\n").call(1, "f").args[0].value
        1
        """
        found = [call for call in self.calls(*names) if _covers(self._head(call), line)]
        if len(found) != 1:
            raise UnsureError(f"line {line} has {'several calls' if found else 'no call'} of {' or '.join(names)}")
        return found[0]

    def calls(self, *names: str) -> list[ast.Call]:
        """All calls of some functions, by the last part of their names.

        >>> len(Source("t.py", "f(1)\\nf(2)\\n").calls("f"))
        2
        """
        return [node for node in self.every(ast.Call) if name_of(node.func) in names]

    def assigned(self, name: str, scope: Block) -> list[ast.Assign]:
        """The plain assignments to a name in a scope, or else in the module.

        >>> source = Source("t.py", "a = 1\\na = 2\\n")
        >>> len(source.assigned("a", source.tree))
        2
        """
        found = [
            n for n in self.every(ast.Assign) if [name_of(t) for t in n.targets if isinstance(t, ast.Name)] == [name]
        ]
        own = [n for n in found if self.scope(n) is scope]
        return own or [n for n in found if self.scope(n) is self.tree]

    def visible(self, expression: str, scope: Block) -> bool:
        """Whether the first name of an expression is a scope's parameter, or assigned in it or in the module.

        >>> source = Source("t.py", "def f(a):\\n    b = 1\\n")
        >>> [source.visible(name, source.tree.body[0]) for name in ("a", "b.c", "d")]
        [True, True, False]
        """
        root = expression.partition(".")[0].partition("[")[0].partition("(")[0]
        if not isinstance(scope, ast.Module):
            arguments = scope.args
            if root in {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}:
                return True
        stored = [n for n in self.every(ast.Name) if isinstance(n.ctx, ast.Store) and n.id == root]
        return any(self.scope(n) in (scope, self.tree) for n in stored)

    def uses(self, name: str) -> bool:
        """Whether a name stands anywhere in the file.

        >>> Source("t.py", "a = b\\n").uses("b")
        True
        """
        arguments = {node.arg for node in self.every(ast.arg)}
        return name in arguments or any(node.id == name for node in self.every(ast.Name))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node's text begins and ends, in characters.

        >>> source = Source("t.py", "é = f(x)\\n")
        >>> source.span(source.call(1, "f"))
        (4, 8)
        """
        start = self._offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return start, self._offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _head(self, node: ast.AST) -> ast.AST:
        """A simple statement whole; of one with a body the expression in its head."""
        statement = self.statement(node)
        if not hasattr(statement, "body"):
            return statement
        inner = node
        for outer in self.around(node):
            if outer is statement:
                break
            inner = outer
        return inner

    def _offset(self, line: int, column: int) -> int:
        """ast counts columns in bytes."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())


def _covers(node: ast.AST, line: int) -> bool:
    return node.lineno <= line <= node.end_lineno  # type: ignore[attr-defined]
