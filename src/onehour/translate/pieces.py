"""The Python text that every tool on torch's loop shares: constants, rate, parameter groups, γ, the order of samples.

Whatever differs between two jobs is a constant or the body of `rate`; the rest is the same text for all. It imports
torch and nothing of ours, so that it can be pasted anywhere.
"""

from __future__ import annotations

from fractions import Fraction

from onehour.rules.schedule import parse_milestones
from onehour.translate.job import Job
from onehour.translate.limits import Limit, as_comments, comment

__all__ = ["optimizer_call", "python", "rate_body"]

OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "nadam": "NAdam",
    "radam": "RAdam",
}

IMPORTS = """\
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.data import DataLoader, Sampler
"""

GROUPS = '''
def parameter_groups(model: nn.Module) -> list[dict]:
    """λ for all parameters but normalisation's, told apart by the type of their module, never by name (§3, §5.1)."""
    kept, decayed = {}, {}
    for module in model.modules():
        owner = kept if isinstance(module, NORMALISATION) else decayed
        owner.update({id(p): p for p in module.parameters(recurse=False) if p.requires_grad})
    groups = [
        {"params": list(decayed.values()), "weight_decay": WEIGHT_DECAY},
        {"params": [p for key, p in kept.items() if key not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
'''

ZERO_GAMMA = """\
    for block in model.modules():  # γ = 0 in each residual block's last BatchNorm: it starts as the identity (§5.1)
        shortcuts = [name for name in ("downsample", "shortcut") if hasattr(block, name)]
        inner = [m for name, m in block.named_modules() if name.split(".")[0] not in shortcuts]
        last = [m for m in inner if isinstance(m, _BatchNorm) and m.affine][-1:]
        if shortcuts and last:
            nn.init.zeros_(last[0].weight)
"""

STREAM = '''
class Stream(Sampler):
    """One process's batches: a new permutation of all samples an epoch, cut into full minibatches (§3, Remark 4).

    Nothing is dropped, padded or repeated; a minibatch may straddle two epochs. A run resumes from any update.
    """

    def __init__(self, rank: int, start: int = 0):
        self.rank, self.start = rank, start

    def __iter__(self):
        orders = {}
        for update in range(self.start, ITERATIONS):
            first, end = update * MINIBATCH, (update + 1) * MINIBATCH
            epochs = range(first // SAMPLES, (end - 1) // SAMPLES + 1)
            orders = {e: orders[e] if e in orders else self.permutation(e) for e in epochs}
            parts = [orders[e][max(first - e * SAMPLES, 0) : end - e * SAMPLES] for e in epochs]
            yield from torch.cat(parts).view(PASSES, PROCESSES, BATCH)[:, self.rank].tolist()

    def __len__(self):  # of the whole run wherever it starts: resumed trainers count so
        return ITERATIONS * PASSES

    @staticmethod
    def permutation(epoch: int) -> torch.Tensor:
        seed = random.Random(f"{SEED} {epoch}").getrandbits(32)  # torch's generator would use no more of it
        return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
'''

STATISTICS = '''
@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """The mean over processes of BatchNorm's running statistics; on all processes, before evaluating or saving."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and PROCESSES > 1:
            for statistics in (module.running_mean, module.running_var):
                dist.all_reduce(statistics)
                statistics /= PROCESSES
'''


def python(job: Job, tool: str, *, start: str, imports: str, rest: str, limits: list[Limit], **more: str) -> str:
    """A whole file: what it is, imports, constants, the shared functions, the tool's own, and what it leaves open.

    Args:
        start: the command that starts it.
        imports: the tool's own imports.
        rest: the tool's own functions.
        limits: what comes behind the code.
        more: `standard`, imports from the standard library; `constants` of the tool.

    >>> from onehour.planner import plan
    >>> text = python(Job.of(plan("digits")), "torch", start="python train.py", imports="", rest="", limits=[])
    >>> text.splitlines()[0]
    '# digits at minibatch 32 for torch: 2 processes × 1 pass × 16 images = 32 an update, 6144 updates. Made by'
    """
    recipe = job.recipe
    about = (
        f"{recipe.name} at minibatch {recipe.minibatch} for {tool}: {job}. Made by `onehour plan --as`; its rate is"
        " onehour's at every update, to 1e-9. Model, images and their augmentation stay yours."
    )
    standard = [*["import math"] * (recipe.decay == "cosine"), "import random", *more.get("standard", "").splitlines()]
    others = sorted(
        [*IMPORTS.splitlines(), *imports.splitlines()], key=lambda line: (line.split()[0] != "import", line)
    )
    head = [comment(about), f"# Start: {start}", *standard, "", *others]
    constants = f"{_constants(job)}{more.get('constants', '')}"
    functions = [_rate(job), GROUPS, _prepare(job), _make_optimizer(job), STREAM, STATISTICS, rest]
    blocks = ["\n".join(head) + f"\n\n{constants}", *functions, as_comments(tool, limits)]
    return "\n\n\n".join(block.strip("\n") for block in blocks if block)


def _constants(job: Job) -> str:
    recipe = job.recipe
    return f"""\
PROCESSES, PASSES, BATCH = {job.processes}, {job.passes}, {job.batch}
MINIBATCH = PROCESSES * PASSES * BATCH  # {recipe.minibatch} images an update
SAMPLES, ITERATIONS, SEED = {job.samples}, {job.iterations}, {recipe.seed}
WEIGHT_DECAY = {recipe.weight_decay!r}
NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # whose parameters do not decay
BF16 = {recipe.precision == "bf16"}
"""


def _rate(job: Job) -> str:
    return f'''
def rate(update: int) -> float:
    """The rate of update t = 0, 1 …, a function of the epoch t·kn/N alone (§2.2, §5.1)."""
    epoch = update * MINIBATCH / SAMPLES
{rate_body(job)}
'''


def _prepare(job: Job) -> str:
    lines = [
        "def prepare(model: nn.Module) -> None:",
        '    """Once, in place, for a model that is to be trained from the start; load a checkpoint after it."""',
        *ZERO_GAMMA.splitlines() * job.recipe.zero_gamma,
        *["    model.to(memory_format=torch.channels_last)"] * job.recipe.channels_last,
        *["    model.compile()"] * job.recipe.compile,
    ]
    return "\n".join(lines)


def _make_optimizer(job: Job) -> str:
    return f'''
def make_optimizer(model: nn.Module):
    """The optimizer, and the scheduler to step once after each update (not once a pass, nor once an epoch)."""
    optimizer = {optimizer_call(job)}
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)  # its lr is 1.0 · rate(t)
'''


def rate_body(job: Job) -> str:
    """The lines of `rate` that follow its epoch: warmup, then the usual schedule.

    >>> from onehour.planner import plan
    >>> print(rate_body(Job.of(plan("resnet50", minibatch=8192))))
        if epoch < 5:
            return 0.1 + (3.2 - 0.1) * (epoch / 5)
        return 3.2 * 0.1 ** sum(epoch >= milestone for milestone in [30, 60, 80])
    """
    recipe, peak = job.recipe, repr(job.recipe.target_lr)
    lines = []
    if job.warmup_epochs:
        base, epochs = repr(recipe.base_lr), job.warmup_epochs
        reached = repr(recipe.schedule(float(epochs)))
        gradual = f"{base} + ({reached} - {base}) * (epoch / {epochs})"
        lines += [f"if epoch < {epochs}:", f"    return {gradual if recipe.warmup == 'gradual' else base}"]
    if recipe.decay == "cosine":
        lines += [f"return {peak} * 0.5 * (1 + math.cos(math.pi * min(epoch / {recipe.epochs}, 1.0)))"]
    else:
        drops = ", ".join(_written(milestone) for milestone in parse_milestones(recipe.milestones))
        lines += [f"return {peak} * {recipe.decay_factor!r} ** sum(epoch >= milestone for milestone in [{drops}])"]
    return "\n".join(f"    {line}" for line in lines)


def optimizer_call(job: Job) -> str:
    """The optimizer, its rate 1.0: LambdaLR multiplies it by `rate`, so that nothing is rounded.

    >>> from onehour.planner import plan
    >>> optimizer_call(Job.of(plan("digits")))
    'torch.optim.SGD(parameter_groups(model), lr=1.0, momentum=0.9, nesterov=True)'
    """
    recipe = job.recipe
    if recipe.optimizer == "sgd":
        nesterov = ", nesterov=True" if recipe.nesterov else ""
        return f"torch.optim.SGD(parameter_groups(model), lr=1.0, momentum={recipe.momentum!r}{nesterov})"
    return f"torch.optim.{OPTIMIZERS[recipe.optimizer]}(parameter_groups(model), lr=1.0)"


def _written(milestone: Fraction) -> str:
    n, d = milestone.numerator, milestone.denominator
    return f"{n}" if d == 1 else f"{n} / {d}"
