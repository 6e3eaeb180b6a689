"""One finding with its source: what an edit works on, and the places that several edits look for."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from onehour.check.case import Case
from onehour.check.finding import Finding
from onehour.check.remedies.changes import Changes
from onehour.check.remedies.source import Block, Source, UnsureError, name_of, place

__all__ = ["Fix"]


@dataclass
class Fix:
    """A finding that is to be mended.

    Args:
        finding: with a place in the source.
        case: what was seen.
        source: the file that the finding lies in.
        line: of it.
        changes: take the edits.
    """

    finding: Finding
    case: Case
    source: Source
    line: int
    changes: Changes

    def line_of(self, where: str | None, what: str) -> int:
        """The line of a place, which must lie in this file."""
        at = place(where)
        if at is None or at[0] != self.source.file:
            raise UnsureError(f"{what} is in another file")
        return at[1]

    def step(self) -> ast.stmt:
        """The statement that steps the optimizer."""
        statement = self.source.at(self.line_of(self.case.step_line(), "the optimizer's step"))
        if not isinstance(statement, ast.Expr):
            raise UnsureError("the optimizer's step is part of another statement")
        return statement

    def optimizer(self) -> ast.Call:
        """The call that makes the main optimizer."""
        story = self.case.story
        event = story.optimizers.get(story.main) if story.main is not None else None
        line = self.line_of(event.where if event else None, "the optimizer's call")
        name = event.facts["name"] if event else ""
        try:
            return self.source.call(line, name)
        except UnsureError:
            value = getattr(self.source.at(line), "value", None)
        if not isinstance(value, ast.Call) or not any(keyword.arg == "lr" for keyword in value.keywords):
            raise UnsureError(f"line {line} has no call of {name}")
        return value

    def model(self, call: ast.Call) -> str:
        """M of an optimizer's M.parameters(), or of the groups that it is given."""
        source, given = self.source, call.args[0] if call.args else None
        seen: set[str] = set()
        waiting: list[ast.AST] = [given] if given is not None else []
        owners: set[str] = set()
        while waiting:
            node = waiting.pop()
            for part in source.every(ast.Call, node):
                if isinstance(part.func, ast.Attribute) and part.func.attr in _OF_A_MODULE:
                    owners.add(source.segment(part.func.value))
            for name in {n.id for n in source.every(ast.Name, node)} - seen:
                seen.add(name)
                waiting += [assign.value for assign in source.assigned(name, source.scope(call))]
        own = {owner for owner in owners if owner.isidentifier() and source.visible(owner, source.scope(call))}
        if len(own) != 1:
            raise UnsureError("the optimizer's parameters are not those of one module by its name")
        return own.pop()

    def batches(self) -> ast.For:
        """The loop over the training loader."""
        story = self.case.story
        events = story.epochs(story.training) if story.training is not None else []
        line = self.line_of(events[0].where if events else None, "the loop over batches")
        heads = [n for n in self.source.every(ast.For) if n.lineno <= line < n.body[0].lineno]
        if len(heads) != 1:
            raise UnsureError(f"line {line} is no loop over batches")
        return heads[0]

    def loader(self) -> str:
        """The name that the loop over batches goes over."""
        inner = self.batches().iter
        while isinstance(inner, ast.Call) and name_of(inner.func) in _WRAPPERS and inner.args:
            inner = inner.args[0]
        if name_of(inner) is None:
            raise UnsureError("the loop over batches does not go over a loader by its name")
        return self.source.segment(inner)

    def epochs(self) -> tuple[ast.For, str]:
        """The loop over epochs around that over batches, and the name of its number."""
        source, node = self.source, self.batches()
        for _ in range(4):
            loop = next((n for n in source.around(node) if isinstance(n, ast.For) and self._counts(n)), None)
            scope = source.scope(node)
            if loop is not None and source.scope(loop) is scope:
                return loop, self._named(loop)
            callers = [] if isinstance(scope, ast.Module) else [c for c in source.calls(scope.name) if _plain(c)]
            if len(callers) != 1:
                break
            node = callers[0]
        raise UnsureError("no loop over epochs with a range is found")

    def _counts(self, loop: ast.For) -> bool:
        heads = [name_of(call.func) for call in self.source.every(ast.Call, loop.iter)]
        return isinstance(loop.target, ast.Name) and bool({"range", "trange"} & {*heads})

    def _named(self, loop: ast.For) -> str:
        assert isinstance(loop.target, ast.Name)
        if loop.target.id != "_":
            return loop.target.id
        name = self.fresh("epoch")
        self.changes.replace(loop.target, name)
        return name

    def fresh(self, *names: str) -> str:
        """The first of some names that the file does not use."""
        for name in names:
            if not self.source.uses(name):
                return name
        raise UnsureError(f"the name {names[0]} is taken")

    def need(self, expression: str, scope: Block) -> None:
        """Refuse where a name is not known in a scope."""
        if not self.source.visible(expression, scope):
            raise UnsureError(f"{expression} is not known where it would be needed")

    def group(self) -> str:
        """The name by which the file calls torch.distributed; imported if it has none."""
        for node in self.source.every(ast.Import):
            for alias in node.names:
                if alias.name == "torch.distributed" and alias.asname:
                    return alias.asname
        for node in self.source.every(ast.ImportFrom):
            for alias in node.names:
                if node.module == "torch" and alias.name == "distributed":
                    return alias.asname or alias.name
        self.changes.imported("torch.distributed")
        return "torch.distributed"

    def grouped(self) -> bool:
        """Whether the script always has a group of processes, also as one."""
        starts = self.source.calls("init_process_group")
        return any(not any(isinstance(n, ast.If) and not _main(n) for n in self.source.around(s)) for s in starts)

    def rank(self, scope: Block) -> str:
        """This process's number, by the script's own name for it or as torch.distributed says it."""
        return self._of_group(scope, "RANK", "get_rank")

    def world(self, scope: Block) -> str:
        """The number of processes, by the script's own name for it or as torch.distributed says it."""
        return self._of_group(scope, "WORLD_SIZE", "get_world_size")

    def _of_group(self, scope: Block, variable: str, function: str) -> str:
        names = set()
        for name, value in self._settings():
            given = value.body if isinstance(value, ast.IfExp) else value
            whole = isinstance(given, ast.Call) and name_of(given.func) in ("int", function)
            said = re.search(rf"""["']{variable}["']|\b{function}\(\)""", self.source.segment(given))
            if whole and said and self.source.scope(name) in (scope, self.source.tree):
                names.add(name.id)
        return names.pop() if len(names) == 1 else f"{self.need_group()}.{function}()"

    def _settings(self) -> list[tuple[ast.Name, ast.expr]]:
        """Names and what they are set to, in plain assignments and in those of tuples."""
        pairs: list[tuple[ast.expr, ast.expr]] = []
        for assign in self.source.every(ast.Assign):
            for target in assign.targets:
                if isinstance(target, ast.Tuple) and isinstance(assign.value, ast.Tuple):
                    pairs += zip(target.elts, assign.value.elts, strict=False)
                else:
                    pairs.append((target, assign.value))
        return [(name, value) for name, value in pairs if isinstance(name, ast.Name)]

    def need_group(self) -> str:
        """`group`, where there always is one."""
        if not self.grouped():
            raise UnsureError("the script may run without a group of processes")
        return self.group()

    def constant(self, node: ast.expr) -> float | None:
        """A number, or that of a name which the module sets once; None for anything else."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if not isinstance(node, ast.Name):
            return None
        values = [value for name, value in self._settings() if name.id == node.id]
        known = values[0] if len(values) == 1 else None
        return self.constant(known) if known is not None and isinstance(known, ast.Constant) else None

    def measured(self, pattern: str) -> str:
        """What a part of the finding's measured text says."""
        match = re.search(pattern, self.finding.measured)
        if match is None:
            raise UnsureError("the finding is of another form")
        return match[1]


def _main(node: ast.If) -> bool:
    """if __name__ == "__main__": is always true of a script."""
    return isinstance(node.test, ast.Compare) and name_of(node.test.left) == "__name__"


def _plain(call: ast.Call) -> bool:
    """f() or self.f(): model.train() is no call of a function that this file may define."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return owner is None or (isinstance(owner, ast.Name) and owner.id == "self")


_OF_A_MODULE = ("parameters", "named_parameters", "modules", "named_modules")
_WRAPPERS = ("enumerate", "tqdm", "iter", "track", "islice")
