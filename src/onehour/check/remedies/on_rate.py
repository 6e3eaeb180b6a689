"""Edits of the rate (§2.1), its warmup (§2.2), and a decay that does not follow it (§3, Remark 1)."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator

from onehour.check.case import Case
from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import Source, UnsureError, name_of

__all__ = [
    "add_warmup",
    "fractional_epoch",
    "scale_decay",
    "scale_rate",
    "scale_rate_by_root",
    "start_warmup",
]

_CHAINED = ("StepLR", "MultiStepLR", "CosineAnnealingLR")
"""They multiply the rate as it is, so that a warmup beside them multiplies it too."""
_OTHERS = (
    "ExponentialLR",
    "OneCycleLR",
    "CyclicLR",
    "LambdaLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "ChainedScheduler",
)


def scale_rate(fix: Fix) -> None:
    """lr = base_lr · kn / base_minibatch, with a warmup from the base's rate."""
    lr, base, minibatch = _scaled(fix)
    kn = _minibatch(fix, minibatch)
    _rate(fix, f"{lr:g} * {kn} / {base}")
    factor = f"{base} / {kn}" if kn.isdigit() else f"{base} / ({kn})"
    warmups = fix.source.calls("LinearLR")
    if len(warmups) == 1:
        fix.changes.keyword(warmups[0], "start_factor", factor)
    elif minibatch >= 2 * base and not warmups and "warmup" not in fix.source.text.lower():
        before = len(fix.changes.edits)
        try:
            _warmup(fix, factor)
        except UnsureError:  # the rate is right without it; the check says that it is missing
            del fix.changes.edits[before:]


def scale_rate_by_root(fix: Fix) -> None:
    """lr = base_lr · √(kn / base_minibatch)."""
    lr, base, minibatch = _scaled(fix)
    _rate(fix, f"{lr:g} * ({_minibatch(fix, minibatch)} / {base}) ** 0.5")


def scale_decay(fix: Fix) -> None:
    """λ = the base's · kn / base_minibatch, for a decay that knows only η/η₀."""
    decay = fix.case.base.weight_decay
    _, base, minibatch = _scaled(fix)
    call = fix.optimizer()
    if decay is None or not any(keyword.arg == "weight_decay" for keyword in call.keywords):
        raise UnsureError("the base's weight decay is not declared, or the optimizer's is not in its call")
    fix.changes.keyword(call, "weight_decay", f"{decay:g} * {_minibatch(fix, minibatch)} / {base}")


def _scaled(fix: Fix) -> tuple[float, int, int]:
    if fix.case.scaled_from is None:
        raise UnsureError("the base is not declared")
    return fix.case.scaled_from


def _minibatch(fix: Fix, minibatch: int) -> str:
    """kn as a number, or as one that follows the processes where the script's does."""
    case = fix.case
    alone = Case([case.alone]).minibatch if case.alone is not None else minibatch
    if case.processes < 2 or alone == minibatch:
        return str(minibatch)
    if not alone or alone * case.processes != minibatch:
        raise UnsureError("the minibatch does not grow with the processes as the rate would")
    return f"{alone} * {_processes(fix)}"


def _processes(fix: Fix) -> str:
    """What the script calls the number of its processes."""
    source, scope = fix.source, fix.source.scope(fix.optimizer())
    for call in source.calls("Accelerator"):
        statement = source.statement(call)
        if isinstance(statement, ast.Assign) and statement.value is call and isinstance(statement.targets[0], ast.Name):
            fix.need(statement.targets[0].id, scope)
            return f"{statement.targets[0].id}.num_processes"
    return fix.world(scope)


def _rate(fix: Fix, text: str) -> None:
    """The rate in the optimizer's call, and in that of a cycle which has its own."""
    _refuse_by_hand(fix)
    call, source = fix.optimizer(), fix.source
    if not any(keyword.arg == "lr" for keyword in call.keywords):
        raise UnsureError("the rate is not in the optimizer's call by its name")
    groups = fix.case.story.optimizers[fix.case.story.main or 0].facts["groups"]
    if len({group["lr"] for group in groups}) > 1:
        raise UnsureError("the optimizer's groups have rates of their own")
    fix.changes.keyword(call, "lr", text)
    for cycle in source.calls("OneCycleLR", "CyclicLR"):
        top = next((keyword.value for keyword in cycle.keywords if keyword.arg == "max_lr"), None)
        if top is None:
            raise UnsureError("the cycle's highest rate is not given by its name")
        if "param_groups" not in source.segment(top):
            fix.changes.replace(top, text)


def _refuse_by_hand(fix: Fix) -> None:
    """Where the loop sets the rate itself, it overwrites what an edit of the optimizer's or a schedule's call gives."""
    for source in _own(fix.source):
        for node in source.every(ast.Subscript) if "param_groups" in source.text else ():
            if isinstance(node.ctx, ast.Store) and source.segment(node.slice) in ("'lr'", '"lr"'):
                where = f"{os.path.basename(source.file)}:{node.lineno}"
                raise UnsureError(f"{where} sets the rate itself; change it there")
    story = fix.case.story
    rates, scheduled = None, True
    for event in story.tape.of("scheduler", "schedule", "step"):
        if event.kind != "step":
            scheduled = True
        elif event.facts["optimizer"] == story.main:
            if not scheduled and event.facts["rates"] != rates:
                raise UnsureError("the rate is set by something other than torch's schedulers")
            rates, scheduled = event.facts["rates"], False


def _own(source: Source) -> Iterator[Source]:
    """The file, and those beside it that it imports."""
    yield source
    modules = {alias.name for node in source.every(ast.Import) for alias in node.names}
    modules |= {node.module for node in source.every(ast.ImportFrom) if node.module}
    for module in sorted(modules):
        found = Source.read(os.path.join(os.path.dirname(source.file), *module.split(".")) + ".py")
        if found is not None:
            yield found


def add_warmup(fix: Fix) -> None:
    """A LinearLR in front of a cosine over updates, or beside steps over epochs, for the first 5 epochs."""
    lr, target = fix.case.base.lr, fix.case.schedule().target
    if lr is None or not target:
        raise UnsureError("the base is not declared")
    _warmup(fix, _factor(fix, lr, target))


def _factor(fix: Fix, lr: float, target: float) -> str:
    """A warmup's first rate over its last."""
    case = fix.case
    if case.alone is not None and Case([case.alone]).schedule().target != target:
        raise UnsureError("the target depends on the number of processes")
    return f"{lr:g} / {target:g}"


def _warmup(fix: Fix, factor: str) -> None:
    _refuse_by_hand(fix)
    source, call = fix.source, fix.optimizer()
    made = source.statement(call)
    if not isinstance(made, ast.Assign) or made.value is not call or not isinstance(made.targets[0], ast.Name):
        raise UnsureError("the optimizer has no name")
    if (fix.case.story.planned or 10) < 10:
        raise UnsureError("the run is short for a warmup of 5 epochs")
    schedulers = source.calls(*_CHAINED)
    if source.calls(*_OTHERS, "LinearLR", "ConstantLR") or len(schedulers) > 1:
        raise UnsureError("another schedule sets the rate, which would have to be planned anew")
    optimizer, loader, scope = made.targets[0].id, fix.loader(), source.scope(made)
    fix.need(loader, scope)
    statements = [made, *source.assigned(loader, scope), *(source.statement(s) for s in schedulers)]
    if any(next(iter(source.around(s))) is not next(iter(source.around(made))) for s in statements):
        raise UnsureError("the optimizer, its schedule and the loader are made in different blocks")
    name, window = fix.fresh("warmup", "rate_warmup"), fix.case.story.window
    length = f"5 * len({loader})" + (f" // {window}" if window > 1 else "")
    ramp = f"start_factor={factor}, total_iters={length}"
    line = f"{name} = torch.optim.lr_scheduler.LinearLR({optimizer}, {ramp})"
    fix.changes.imported("torch")
    last = max(statements, key=lambda s: s.lineno)
    if schedulers and name_of(schedulers[0].func) == "CosineAnnealingLR":
        if last is not source.statement(schedulers[0]):
            raise UnsureError("the loader is made after the schedule")
        fix.changes.insert_before(last, line)
        _behind_warmup(fix, schedulers[0], optimizer, name, length)
        return
    step = fix.step()
    if source.scope(step) is not scope and not isinstance(scope, ast.Module):
        raise UnsureError("the optimizer is stepped in another function than it is made in")
    fix.changes.insert_after(last, line)
    fix.changes.insert_after(step, f"{name}.step()")


def _behind_warmup(fix: Fix, cosine: ast.Call, optimizer: str, warmup: str, length: str) -> None:
    """The cosine takes what is left of the run."""
    made = fix.source.statement(cosine)
    plan = next(
        (k.value for k in cosine.keywords if k.arg == "T_max"), cosine.args[1] if len(cosine.args) > 1 else None
    )
    if not isinstance(made, ast.Assign) or made.value is not cosine or not isinstance(made.targets[0], ast.Name):
        raise UnsureError("the schedule has no name")
    if plan is None or fix.case.schedule().a_update != 1:
        raise UnsureError("the cosine is not planned in updates")
    text, name = fix.source.segment(plan), made.targets[0].id
    text = text if isinstance(plan, ast.Name | ast.Constant | ast.BinOp | ast.Call | ast.Attribute) else f"({text})"
    fix.changes.replace(plan, f"{text} - {length}")
    both = f"{optimizer}, [{warmup}, {name}], milestones=[{length}]"
    fix.changes.insert_after(made, f"{name} = torch.optim.lr_scheduler.SequentialLR({both})")


def start_warmup(fix: Fix) -> None:
    """A warmup's first rate is the base's: LinearLR's factor, or timm's warmup_lr."""
    lr, target = fix.case.base.lr, fix.case.schedule().target
    linear = fix.source.calls("LinearLR")
    timm = [c for c in fix.source.every(ast.Call) if any(k.arg in ("warmup_lr", "warmup_lr_init") for k in c.keywords)]
    if lr is None or not target or len(linear) + len(timm) != 1:
        raise UnsureError("the warmup is not one call")
    if linear:
        _refuse_by_hand(fix)
    for call in linear:
        fix.changes.keyword(call, "start_factor", _factor(fix, lr, target))
    for call in timm:
        name = next(k.arg for k in call.keywords if k.arg in ("warmup_lr", "warmup_lr_init"))
        fix.changes.keyword(call, name or "", f"{lr:g}")


def fractional_epoch(fix: Fix) -> None:
    """rate(epoch + i / len(loader)) in place of rate(epoch), in a loop that numbers its batches."""
    source, loop, loader = fix.source, fix.batches(), fix.loader()
    _, epoch = fix.epochs()
    numbered = isinstance(loop.iter, ast.Call) and name_of(loop.iter.func) == "enumerate"
    if not (numbered and isinstance(loop.target, ast.Tuple) and isinstance(loop.target.elts[0], ast.Name)):
        raise UnsureError("the loop does not number its batches with enumerate")
    functions = {n.name: n for n in source.every(ast.FunctionDef)}
    found = [
        call
        for call in source.every(ast.Call, loop)
        if isinstance(call.func, ast.Name) and call.func.id in functions
        if [source.segment(argument) for argument in call.args] == [epoch]
    ]
    if len(found) != 1:
        raise UnsureError("the rate is not a function of the epoch that the loop over batches calls")
    body = functions[name_of(found[0].func) or ""]
    whole = [n for n in source.every(ast.Subscript, body) if isinstance(n.ctx, ast.Load)]
    if whole or any(isinstance(n.op, ast.FloorDiv | ast.Mod) for n in source.every(ast.BinOp, body)):
        raise UnsureError("the rate's function may need whole epochs")
    if any(isinstance(o, ast.Eq | ast.NotEq | ast.In) for n in source.every(ast.Compare, body) for o in n.ops):
        raise UnsureError("the rate's function may need whole epochs")
    fix.changes.replace(found[0].args[0], f"{epoch} + {loop.target.elts[0].id} / len({loader})")
