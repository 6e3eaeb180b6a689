"""Edits of the weight decay (§3, Remark 1; §5.1), of BatchNorm (§2.3), and of the first weights."""

from __future__ import annotations

import ast

from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import UnsureError

__all__ = [
    "average_statistics",
    "decay_in_optimizer",
    "decay_with_rate",
    "keep_n",
    "keep_statistics",
    "one_start",
    "own_statistics",
    "parameter_groups",
]


def parameter_groups(fix: Fix) -> None:
    """onehour.parameter_groups(model, weight_decay=λ) in place of the optimizer's parameters."""
    source, call, story = fix.source, fix.optimizer(), fix.case.story
    if not call.args or len(call.args) > 2:
        raise UnsureError("the optimizer's parameters are not its first argument")
    groups = story.optimizers[story.main or 0].facts["groups"]
    if any({group[key] for group in groups} != {groups[0][key]} for group in groups for key in ("lr", "momentum")):
        raise UnsureError("the optimizer's groups have rates of their own")
    given = next((source.segment(k.value) for k in call.keywords if k.arg == "weight_decay"), None)
    decay = given or f"{max(group['weight_decay'] for group in groups):g}"
    fix.changes.replace(call.args[0], f"onehour.parameter_groups({fix.model(call)}, weight_decay={decay})")
    if given is not None:
        fix.changes.keyword(call, "weight_decay", None)
    fix.changes.imported("onehour")


def decay_in_optimizer(fix: Fix) -> None:
    """The penalty goes out of the loss, and its λ into the optimizer."""
    source, case, call = fix.source, fix.case, fix.optimizer()
    story = case.story
    facts = story.optimizers[story.main or 0].facts
    penalty = next((e.facts["penalty"] for e in story.tape.of("backward") if e.facts.get("penalty")), None)
    if penalty is None or facts["adaptive"] is not False:
        raise UnsureError("this optimizer's weight_decay is not the gradient of a penalty")
    if penalty["parameters"] != sum(group["parameters"] for group in facts["groups"]):
        raise UnsureError("the penalty is not on all that the optimizer has")
    if any(group["weight_decay"] for group in facts["groups"]):
        raise UnsureError("the optimizer decays weights too")
    function = source.scope(source.at(fix.line))
    sums = [n for n in source.every(ast.BinOp, function) if isinstance(n.op, ast.Add)]
    found = [(n, n.left) for n in sums if _is_penalty(fix, n.right) and not _is_penalty(fix, n.left)]
    found += [(n, n.right) for n in sums if _is_penalty(fix, n.left) and not _is_penalty(fix, n.right)]
    added = [
        n for n in source.every(ast.AugAssign, function) if isinstance(n.op, ast.Add) and _is_penalty(fix, n.value)
    ]
    if len(found) + len(added) != 1:
        raise UnsureError("the penalty is not added to the loss in one place")
    for statement in added:
        fix.changes.delete(statement)
    for node, rest in found:
        statement = source.statement(node)
        targets = statement.targets if isinstance(statement, ast.Assign) and statement.value is node else []
        if [source.segment(target) for target in targets] == [source.segment(rest)]:
            fix.changes.delete(statement)
        else:
            fix.changes.replace(node, source.segment(rest))
    fix.changes.keyword(call, "weight_decay", f"{penalty['strength']:.3g}")


def _is_penalty(fix: Fix, node: ast.expr) -> bool:
    text = fix.source.segment(node)
    squares = any(word in text for word in ("pow(2)", "** 2", "**2", "square(", "norm("))
    return "parameters()" in text and squares


def decay_with_rate(fix: Fix) -> None:
    """The loss's factor goes to the rate."""
    source, call = fix.source, fix.optimizer()
    scale = float(fix.measured(r"multiplied by ([\d.e+]+)"))
    rate = next((keyword.value for keyword in call.keywords if keyword.arg == "lr"), None)
    if rate is None:
        raise UnsureError("the rate is not in the optimizer's call by its name")
    scope = source.scope(source.at(fix.line))
    found = []
    for product in source.every(ast.BinOp, scope):
        for factor, rest in ((product.left, product.right), (product.right, product.left)):
            known = fix.constant(factor)
            if isinstance(product.op, ast.Mult) and known is not None and abs(known - scale) < 1e-3 * scale:
                found.append((product, factor, rest))
    losses = [each for each in found if source.every(ast.Call, each[2])]
    if len(losses) != 1:
        raise UnsureError("the factor of the loss is not found in one place")
    product, factor, rest = losses[0]
    text = source.segment(rate)
    text = f"({text})" if isinstance(rate, ast.BinOp) and isinstance(rate.op, ast.Add | ast.Sub) else text
    fix.changes.replace(product, source.segment(rest))
    fix.changes.replace(rate, f"{text} * {source.segment(factor)}")


def own_statistics(fix: Fix) -> None:
    """convert_sync_batchnorm goes, or a trainer's sync_batchnorm=True."""
    source = fix.source
    converted = source.calls("convert_sync_batchnorm")
    given = [(c, k) for c in source.every(ast.Call) for k in c.keywords if k.arg == "sync_batchnorm"]
    if len(converted) + len(given) != 1:
        raise UnsureError("the conversion is not found in one place")
    for call, keyword in given:
        fix.changes.keyword(call, keyword.arg or "", None)
    for call in converted:
        statement = source.statement(call)
        model = source.segment(call.args[0]) if call.args else None
        if model is None:
            raise UnsureError("the conversion has no model")
        targets = [source.segment(t) for t in statement.targets] if isinstance(statement, ast.Assign) else []
        if targets == [model] and isinstance(statement, ast.Assign) and statement.value is call:
            fix.changes.delete(statement)
        else:
            fix.changes.replace(call, model)


def average_statistics(fix: Fix) -> None:
    """The running statistics are averaged over processes at the end of each epoch's training."""
    source, loop = fix.source, fix.batches()
    called = {n.func.id for n in source.every(ast.Call, loop) if isinstance(n.func, ast.Name)}
    trained = [c.func.value for c in source.calls("train") if isinstance(c.func, ast.Attribute) and not c.args]
    models = called & {node.id for node in trained if isinstance(node, ast.Name)}
    if len(models) != 1:
        raise UnsureError("the model that the loop trains is not found by its name")
    group = fix.group()
    lines = [
        f"for name, buffer in {models.pop()}.named_buffers():",
        '    if name.endswith(("running_mean", "running_var")):',
        f"        {group}.all_reduce(buffer)",
        f"        buffer /= {group}.get_world_size()",
    ]
    if not fix.grouped():
        lines = [f"if {group}.is_initialized():", *(f"    {line}" for line in lines)]
    fix.changes.insert_after(loop, *lines)


def keep_statistics(fix: Fix) -> None:
    """DistributedDataParallel leaves the statistics alone, and they are averaged instead."""
    wrapped, accelerators = fix.source.calls("DistributedDataParallel", "DDP"), fix.source.calls("Accelerator")
    if len(wrapped) + len(accelerators) != 1:
        raise UnsureError("DistributedDataParallel is not called in one place")
    for call in wrapped:
        fix.changes.keyword(call, "broadcast_buffers", "False")
    for call in accelerators:
        if any(keyword.arg == "kwargs_handlers" for keyword in call.keywords):
            raise UnsureError("Accelerator has handlers already")
        handler = "accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)"
        fix.changes.keyword(call, "kwargs_handlers", f"[{handler}]")
        fix.changes.imported("accelerate")
    if fix.source.calls("distribute_bn"):  # timm's average then has all processes' own
        return
    if not all(any(story.tape.of("statistics")) for story in fix.case.stories):
        raise UnsureError("one process alone evaluates or saves")
    average_statistics(fix)


def keep_n(fix: Fix) -> None:
    """onehour.convert_batchnorm(model, per_worker=n) before the optimizer is made."""
    n = fix.case.base.per_worker
    if n is None:
        raise UnsureError("the base's n is not declared")
    source, call = fix.source, fix.optimizer()
    if source.calls("DistributedDataParallel", "DDP", "prepare", "compile"):
        raise UnsureError("the model is wrapped, and would have to be converted before")
    statement = source.statement(call)
    model = fix.model(call)
    if not isinstance(statement, ast.Assign) or model == "self":
        raise UnsureError("the model is not converted by its name")
    fix.changes.insert_before(statement, f"{model} = onehour.convert_batchnorm({model}, per_worker={n})")
    fix.changes.imported("onehour")


def one_start(fix: Fix) -> None:
    """Process 0's weights for all, before the optimizer is made."""
    call = fix.optimizer()
    statement, model = fix.source.statement(call), fix.model(call)
    name = fix.fresh("tensor", "weight")
    fix.changes.insert_before(
        statement,
        f"for {name} in {model}.state_dict().values():",
        f"    {fix.need_group()}.broadcast({name}, src=0)",
    )
