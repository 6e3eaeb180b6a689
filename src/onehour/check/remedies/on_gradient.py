"""Edits of the loss, its backward pass and the step (§2.1, eq 2; §3, Remark 3)."""

from __future__ import annotations

import ast
import re

from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import UnsureError, name_of, place

__all__ = [
    "clear_gradients",
    "clear_later",
    "divide_by_window",
    "divide_tail",
    "mean_of_processes",
    "one_step",
    "unscaled_loss",
]


def divide_by_window(fix: Fix) -> None:
    """(loss / a).backward(), by the name that the loop has for a."""
    loss, window = _loss(fix), fix.case.story.window
    fix.changes.replace(loss, _over(fix, loss, _name_of_window(fix, window)))


def _over(fix: Fix, loss: ast.expr, divisor: str) -> str:
    """A loss divided, with the brackets that it needs where it stands."""
    text = fix.source.segment(loss)
    text = f"({text})" if isinstance(loss, ast.BinOp | ast.IfExp | ast.Lambda) else text
    outer = next(iter(fix.source.around(loss)))
    return f"({text} / {divisor})" if isinstance(outer, ast.Attribute) else f"{text} / {divisor}"


def _loss(fix: Fix) -> ast.expr:
    """L of L.backward(), scaler.scale(L).backward(), accelerator.backward(L) or manual_backward(L)."""
    source = fix.source
    calls = source.calls("backward", "manual_backward")
    here = [c for c in calls if source.statement(c).lineno <= fix.line <= (source.statement(c).end_lineno or 0)]
    near = here or [c for c in calls if source.scope(c) is source.scope(source.at(fix.line))]
    if len(near) != 1:
        raise UnsureError("the backward pass is not found in one place")
    (call,) = near
    if call.args:
        return call.args[0]
    if not isinstance(call.func, ast.Attribute):
        raise UnsureError("the loss is not its own backward's")
    owner = call.func.value
    if isinstance(owner, ast.Call):
        if name_of(owner.func) != "scale" or len(owner.args) != 1:
            raise UnsureError("the backward pass is taken of a call")
        return owner.args[0]
    return owner


def _name_of_window(fix: Fix, window: int) -> str:
    """a in `(i + 1) % a == 0`, if that is what an update gathers."""
    found = {
        fix.source.segment(node.right)
        for node in fix.source.every(ast.BinOp)
        if isinstance(node.op, ast.Mod) and fix.constant(node.right) == window
    }
    return found.pop() if len(found) == 1 else str(window)


def divide_tail(fix: Fix) -> None:
    """The last window is taken, and divided by its own count of batches."""
    source, loop, loader = fix.source, fix.batches(), fix.loader()
    numbered = isinstance(loop.iter, ast.Call) and name_of(loop.iter.func) == "enumerate" and len(loop.iter.args) == 1
    if not (numbered and isinstance(loop.target, ast.Tuple) and isinstance(loop.target.elts[0], ast.Name)):
        raise UnsureError("the loop does not number its batches with enumerate")
    i = loop.target.elts[0].id
    tests = [n.test for n in source.every(ast.If, loop) if fix.step() in source.every(ast.stmt, n)]
    if len(tests) != 1:
        raise UnsureError("the step does not stand under one if")
    window = [
        n.left.right
        for n in source.every(ast.Compare, tests[0])
        if isinstance(n.left, ast.BinOp) and re.sub(r"\W", "", source.segment(n.left.left)) == f"{i}1"
        if isinstance(n.left.op, ast.Mod) and fix.constant(n.left.right) == fix.case.story.window
    ]
    if len(window) != 1:
        raise UnsureError("the step is not taken at (i + 1) % a == 0")
    a = source.segment(window[0])
    divided = [
        n
        for n in source.every(ast.BinOp, loop)
        if isinstance(n.op, ast.Div) and source.segment(n.right) == a and not any(x is n for x in ast.walk(tests[0]))
    ]
    if len(divided) != 1:
        raise UnsureError(f"the loss is not divided by {a} in one place")
    fix.changes.replace(divided[0].right, f"min({a}, len({loader}) - {i} + {i} % {a})")
    if f"len({loader})" not in source.segment(tests[0]):
        brackets = isinstance(tests[0], ast.BoolOp)
        test = source.segment(tests[0])
        fix.changes.replace(tests[0], f"{f'({test})' if brackets else test} or {i} + 1 == len({loader})")


def mean_of_processes(fix: Fix) -> None:
    """A gradient that was summed over processes is divided by their number."""
    source = fix.source
    found = [
        c for c in source.calls("all_reduce") if c.args and source.segment(c.args[0]).endswith((".grad", ".grad.data"))
    ]
    if len(found) != 1 or any(keyword.arg == "async_op" for keyword in found[0].keywords):
        raise UnsureError("the gradients are not reduced in one place")
    statement = source.statement(found[0])
    if not isinstance(statement, ast.Expr):
        raise UnsureError("the reduction is part of another statement")
    world = fix.world(source.scope(statement))
    fix.changes.insert_after(statement, f"{source.segment(found[0].args[0])} /= {world}")


def unscaled_loss(fix: Fix) -> None:
    """The world size is taken out of the loss's product."""
    source = fix.source
    lines = {fix.line}
    for update in fix.case.story.updates:
        for micro in update.micros:
            at = [place(term.get("where")) for term in micro.terms]
            lines |= {line for file, line in filter(None, at) if file == source.file}
    scope = source.scope(source.at(fix.line))
    lines |= {call.lineno for call in source.calls("backward") if source.scope(call) is scope}
    found: list[tuple[ast.AST, str]] = []
    for node in source.every(ast.BinOp):
        for factor, rest in ((node.right, node.left), (node.left, node.right)):
            of_world = _WORLD.search(source.segment(factor)) and not _WORLD.search(source.segment(rest))
            if isinstance(node.op, ast.Mult) and of_world and _near(node, lines, fix):
                found.append((node, source.segment(rest)))
    scaled = [
        n
        for n in source.every(ast.AugAssign)
        if isinstance(n.op, ast.Mult) and _WORLD.search(source.segment(n.value)) and _near(n, lines, fix)
    ]
    if len(found) + len(scaled) != 1:
        raise UnsureError("the product with the world size is not found in one place")
    for node, rest in found:
        fix.changes.replace(node, rest)
    for statement in scaled:
        fix.changes.delete(statement)


def _near(node: ast.AST, lines: set[int], fix: Fix) -> bool:
    """On the line of the backward pass or of the loss, or between two of them in one function."""
    first, last = min(lines), max(lines)
    line = node.lineno  # type: ignore[attr-defined]
    whole = fix.source.statement(node)
    return any(whole.lineno <= at <= (whole.end_lineno or 0) for at in lines) or (first < line < last <= first + 40)


_WORLD = re.compile(r"world|num_processes|num_replicas|ngpus|n_gpu", re.IGNORECASE)


def one_step(fix: Fix) -> None:
    """The plain second step of an optimizer goes; a GradScaler's stays."""
    source = fix.source
    call = source.call(fix.line, "step")
    statement = source.statement(call)
    if call.args:  # scaler.step(optimizer): the plain one of the same block is the one too many
        name = source.segment(call.args[0])
        block = [n for n in source.every(ast.Expr) if _block(fix, n) is _block(fix, statement)]
        plain = [n for n in block if source.segment(n) == f"{name}.step()"]
        if len(plain) != 1:
            raise UnsureError("the second step is not found")
        statement = plain[0]
    if not isinstance(statement, ast.Expr):
        raise UnsureError("the step is part of another statement")
    fix.changes.delete(statement)


def _block(fix: Fix, node: ast.AST) -> ast.AST:
    return next(iter(fix.source.around(node)))


def clear_gradients(fix: Fix) -> None:
    """zero_grad() behind the step."""
    call = fix.source.call(fix.line, "step")
    if not isinstance(call.func, ast.Attribute):
        raise UnsureError("the step is no method's call")
    optimizer = fix.source.segment(call.args[0] if call.args else call.func.value)
    statement = fix.source.statement(call)
    if fix.source.calls("unscale_") or not isinstance(statement, ast.Expr):
        raise UnsureError("the step is part of more")
    fix.changes.insert_after(statement, f"{optimizer}.zero_grad()")


def clear_later(fix: Fix) -> None:
    """zero_grad() between the backward pass and the step goes behind the step."""
    fix.measured(r"^(the gradients are zero)")
    source, step = fix.source, fix.step()
    block = [n for n in source.every(ast.Expr) if _block(fix, n) is _block(fix, step)]
    clears = [n for n in block if isinstance(n.value, ast.Call) and name_of(n.value.func) == "zero_grad"]
    if len(clears) != 1 or clears[0].lineno >= step.lineno:
        raise UnsureError("the zero_grad() before the step is not found")
    fix.changes.delete(clears[0])
    fix.changes.insert_after(step, source.segment(clears[0]))
