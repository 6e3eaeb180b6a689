"""Edits of loaders, samplers and random numbers (§3, Remark 4), and of what an evaluation takes (§5.1)."""

from __future__ import annotations

import ast

from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import UnsureError, name_of

__all__ = [
    "drop_nothing",
    "every_sample_once",
    "other_seeds",
    "share_the_samples",
    "share_what_is_shuffled",
    "shuffle",
]


def drop_nothing(fix: Fix) -> None:
    """drop_last is taken away, or a trainer's dataloader_drop_last."""
    given = [c for c in fix.source.every(ast.Call) if any(k.arg == "dataloader_drop_last" for k in c.keywords)]
    if len(given) == 1:
        fix.changes.keyword(given[0], "dataloader_drop_last", None)
        return
    call = fix.source.call(fix.line, "DataLoader")
    if not any(keyword.arg == "drop_last" for keyword in call.keywords):
        raise UnsureError("drop_last is not in the loader's call")
    fix.changes.keyword(call, "drop_last", None)


def shuffle(fix: Fix) -> None:
    """shuffle=True, or set_epoch for a sampler that knows it."""
    call = fix.source.call(fix.line, "DataLoader")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "batch_sampler" in given or len(call.args) > 2:
        raise UnsureError("the loader takes its batches from a sampler of its own")
    if "sampler" not in given:
        fix.changes.keyword(call, "shuffle", "True")
        return
    if "DistributedSampler" not in fix.finding.measured:
        raise UnsureError("the sampler is one of the loop's own")
    if isinstance(given["sampler"], ast.Call):
        _set_epoch(fix, f"{_loader_of(fix, call)}.sampler")
    else:
        _set_epoch(fix, fix.source.segment(given["sampler"]))


def share_the_samples(fix: Fix) -> None:
    """A DistributedSampler in place of each process's own shuffle; Accelerate's loader is prepared."""
    call = fix.source.call(fix.line, "DataLoader")
    prepares = [p for p in fix.source.calls("prepare") if isinstance(p.func, ast.Attribute)]
    if prepares:
        _prepare(fix, call, prepares)
        return
    _sampler(fix, call, fix.source.segment(_data(call)))


def _prepare(fix: Fix, call: ast.Call, prepares: list[ast.Call]) -> None:
    source, name = fix.source, _loader_of(fix, call)
    own = [p for p in prepares if source.scope(p) is source.scope(call)]
    if len(own) != 1 or any(name == source.segment(a) for a in own[0].args):
        raise UnsureError("it is not clear which prepare() the loader belongs to")
    statement = source.statement(own[0])
    fix.changes.insert_after(statement, f"{name} = {source.segment(own[0].func)}({name})")


def share_what_is_shuffled(fix: Fix) -> None:
    """A DistributedSampler over all samples in place of a Subset that is shuffled by itself."""
    source = fix.source
    call = source.call(fix.line, "DataLoader")
    data = _data(call)
    made = source.assigned(data.id, source.scope(call)) if isinstance(data, ast.Name) else []
    subset = made[0].value if len(made) == 1 else data
    if not (isinstance(subset, ast.Call) and name_of(subset.func) == "Subset" and len(subset.args) == 2):
        raise UnsureError("the samples are not a Subset that this file makes")
    whole, indices = subset.args
    pieces = indices.args if isinstance(indices, ast.Call) and name_of(indices.func) == "range" else []
    if len(pieces) != 3 or source.segment(pieces[1]) != f"len({source.segment(whole)})":
        raise UnsureError("the Subset is not every k-th sample")
    fix.changes.replace(data, source.segment(whole))
    _sampler(fix, call, source.segment(whole))


def _sampler(fix: Fix, call: ast.Call, data: str) -> None:
    if not fix.grouped():
        raise UnsureError("the script may run without a group of processes")
    given = {keyword.arg for keyword in call.keywords}
    if given & {"sampler", "batch_sampler", None} or len(call.args) > 2:
        raise UnsureError("the loader has a sampler already")
    fix.changes.keyword(call, "shuffle", None)
    fix.changes.keyword(call, "sampler", f"torch.utils.data.DistributedSampler({data})")
    fix.changes.imported("torch")
    _set_epoch(fix, f"{_loader_of(fix, call)}.sampler")


def _set_epoch(fix: Fix, sampler: str) -> None:
    loop, number = fix.epochs()
    fix.need(sampler, fix.source.scope(loop))
    fix.changes.insert_before(loop.body[0], f"{sampler}.set_epoch({number})")


def every_sample_once(fix: Fix) -> None:
    """Each process evaluates every k-th sample; with Accelerate gather_for_metrics."""
    source = fix.source
    gathers = [g for g in source.calls("gather") if isinstance(g.func, ast.Attribute)]
    if len(gathers) == 1 and isinstance(gathers[0].func, ast.Attribute) and source.calls("Accelerator"):
        fix.changes.replace(gathers[0].func, f"{source.segment(gathers[0].func.value)}.gather_for_metrics")
        return
    call = source.call(fix.line, "DataLoader")
    if "DistributedSampler" not in fix.finding.measured or not any(k.arg == "sampler" for k in call.keywords):
        raise UnsureError("the samples are not divided by a sampler in the loader's call")
    _alone(fix)
    data, scope = source.segment(_data(call)), source.scope(call)
    fix.changes.keyword(call, "sampler", f"range({fix.rank(scope)}, len({data}), {fix.world(scope)})")
    _counted(fix)


def _alone(fix: Fix) -> None:
    """Processes get unequal numbers of batches: nothing in the loop may wait for the others."""
    source, story = fix.source, fix.case.story
    if any(event.facts["broadcast"] for event in story.tape.of("ddp")) and any(story.tape.of("batchnorm")):
        raise UnsureError("DistributedDataParallel sends BatchNorm's buffers at every batch, also of an evaluation")
    training, epochs = fix.batches(), fix.epochs()[0]
    for loop in source.every(ast.For):
        heads = {name_of(call.func) for call in source.every(ast.Call, loop.iter)}
        if loop in (training, epochs) or training in source.around(loop) or heads & _OVER_A_MODEL:
            continue
        for call in source.every(ast.Call, loop):
            if name_of(call.func) in _TOGETHER:
                raise UnsureError(f"line {call.lineno} waits for the other processes at every batch")


def _counted(fix: Fix) -> None:
    """A total that was computed from the padded share is that of the data set."""
    source = fix.source
    for product in source.every(ast.BinOp):
        sides = [product.left, product.right]
        for side, other in (sides, sides[::-1]):
            if not (isinstance(product.op, ast.Mult) and _is_length_of_sampler(side) and isinstance(other, ast.Name)):
                continue
            assert isinstance(side, ast.Call)
            assert isinstance(side.args[0], ast.Attribute)
            fix.changes.replace(product, f"len({source.segment(side.args[0].value)}.dataset)")


def _is_length_of_sampler(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and name_of(node.func) == "len"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Attribute)
        and node.args[0].attr == "sampler"
    )


def other_seeds(fix: Fix) -> None:
    """Another seed on each process, before the first epoch."""
    source, measured = fix.source, fix.finding.measured
    seeds = [c for c in source.calls("set_seed") if source.calls("Accelerator")]
    if len(seeds) == 1 and measured.startswith("torch"):
        fix.changes.keyword(seeds[0], "device_specific", "True")
        return
    story = fix.case.story
    loader = story.loaders[story.training] if story.training is not None else None
    if loader is None or "DistributedSampler" not in loader.facts["sampler"]:
        raise UnsureError("the order of the samples may come from the same generator")
    if not measured.startswith("torch's"):
        raise UnsureError("the random numbers are not torch's")
    loop, _ = fix.epochs()
    rank = fix.rank(source.scope(loop))
    fix.changes.insert_before(loop, f"torch.manual_seed(torch.initial_seed() + {rank})")
    fix.changes.imported("torch")


def _data(call: ast.Call) -> ast.expr:
    given = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "dataset"), None)
    if given is None:
        raise UnsureError("the loader's data is not in its call")
    return given


def _loader_of(fix: Fix, call: ast.Call) -> str:
    """The name that a loader is given."""
    statement = fix.source.statement(call)
    if not isinstance(statement, ast.Assign) or statement.value is not call or len(statement.targets) != 1:
        raise UnsureError("the loader has no name")
    if name_of(statement.targets[0]) is None:
        raise UnsureError("the loader has no name")
    return fix.source.segment(statement.targets[0])


_OVER_A_MODEL = {"parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules"}
_TOGETHER = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "reduce_tensor",
    "gather",
    "reduce",
    "broadcast",
    "barrier",
)
