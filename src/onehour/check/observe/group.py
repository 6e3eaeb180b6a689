"""Several processes: who joins them, whose BatchNorm statistics are used, and whether their random numbers are one."""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from onehour.check.observe.digests import folded, leading, projections
from onehour.check.observe.forward import Forwards
from onehour.check.observe.internals import BATCHNORM, REFUSES_CPU
from onehour.check.observe.recorder import Patches, TapeRecorder, quiet
from onehour.check.observe.source import user_line
from onehour.check.tape import (
    GroupJoined,
    InitialWeights,
    ModelWrapped,
    RunningStatistics,
    SyncBatchNormMade,
    WeightsUpdated,
)

WEIGHTS, EACH = 8, 4096  # how many weights are compared before the first update, and how much of each
UPDATES, FEW, NUMBERS = 40, 4, 100_000_000
"""After which all weights are compared: of a large model or in a watched loop few."""

PARTED = re.compile(r"(?i)(?:^|[._])(?:experts?|moe|flat_param|shards?)(?=[._\d]|$)")
"""In the name of a parameter that each process has for itself."""
MARKS = ("is_expert", "expert", "is_sharded", "tensor_model_parallel", "_is_sharded")
"""What libraries set on such a parameter; DeepSpeed sets `allreduce` to False."""


class Groups:
    """Watches process groups, DistributedDataParallel, SyncBatchNorm, and statistics that are evaluated or saved."""

    def __init__(self, recorder: TapeRecorder, forwards: Forwards) -> None:
        self.recorder, self.forwards = recorder, forwards
        self.trained = False  # whether the statistics have moved since they were last looked at
        self.left: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        """Of each optimizer, how many of its steps are still to be compared in full."""
        self.before: dict[Optimizer, tuple[dict[str, Tensor], dict[str, list[float]]]] = {}
        """The parameters of the steps that are under way, and what they were."""

    def install(self, patches: Patches) -> None:
        if dist.is_initialized():
            self._joined()
        patches.around(dist, "init_process_group", self._join)
        patches.beside(DistributedDataParallel, "__init__", after=self._wrapped)
        patches.around(DistributedDataParallel, REFUSES_CPU, self._allow)
        patches.beside(nn.SyncBatchNorm, "__init__", after=self._synced)
        patches.around(nn.SyncBatchNorm, "forward", self._forward)
        patches.beside(torch, "save", before=lambda *_, **__: self.look("save"))

    def _join(self, original: Any, backend: Any = None, *arguments: Any, **options: Any) -> Any:
        if self.recorder.cut and isinstance(backend, str) and "nccl" in backend and not torch.cuda.is_available():
            backend = "gloo"
        result = original(backend, *arguments, **options)
        self._joined()
        return result

    @quiet
    def _joined(self) -> None:
        self.recorder.world = dist.get_world_size()
        self.recorder.tape.add(GroupJoined(user_line()))

    @quiet
    def _wrapped(self, wrapped: Any, *arguments: Any, **options: Any) -> None:
        broadcast = bool(getattr(wrapped, "broadcast_buffers", False)) and any(
            isinstance(module, BATCHNORM) and module.track_running_stats for module in wrapped.modules()
        )
        self.recorder.tape.add(ModelWrapped(user_line(), broadcast))

    def _allow(self, original: Any, wrapped: Any, module: nn.Module) -> None:
        """SyncBatchNorm on a CPU, which torch refuses, and `_forward` stands in for."""
        if not self.recorder.cut or all(p.device.type != "cpu" for p in module.parameters()):
            original(wrapped, module)

    @quiet
    def _synced(self, *arguments: Any, **options: Any) -> None:
        self.recorder.tape.add(SyncBatchNormMade(user_line()))

    def _forward(self, original: Any, module: Any, values: Any) -> Any:
        if values.device.type != "cpu" or not self.recorder.cut:
            return original(module, values)
        # There is none for CPUs: the check goes on with this process's statistics.
        return BATCHNORM.forward(module, values)

    @quiet
    def stepped(self, optimizer: Optimizer) -> None:
        """An update was made: the statistics of this process, and at first its weights, are written down."""
        self.trained = True
        if optimizer in self.before:
            named, before = self.before.pop(optimizer)
            self.recorder.tape.add(
                WeightsUpdated(
                    user_line(),
                    self.forwards.optimizers.numbers.of(optimizer),
                    before=before,
                    after={name: folded(p) for name, p in named.items()},
                    gradients={name: folded(p.grad) for name, p in named.items() if p.grad is not None},
                    parted=[name for name, p in named.items() if _parted(name, p)],
                )
            )
        if self.recorder.world > 1 and self.recorder.attentive:
            self._statistics("update")

    @quiet
    def steps(self, optimizer: Optimizer) -> None:
        """Before a step: the weights that this process has."""
        if self.recorder.world < 2:
            return
        every = [p for group in optimizer.param_groups for p in group["params"]]
        left = self.left.get(optimizer)
        if left is None:
            compared = [p for p in every if p.ndim > 1 and not _sharded(p)][:WEIGHTS]
            values = [value for p in compared for value in leading(p)[:EACH].tolist()]
            self.recorder.tape.add(InitialWeights(user_line(), values))
            large = sum(p.numel() for p in every) * UPDATES > NUMBERS
            left = FEW if large or not self.recorder.cut else UPDATES
        self.left[optimizer] = left - 1
        if left > 0:
            named = self.forwards.names(every)
            self.before[optimizer] = named, {name: folded(p) for name, p in named.items()}

    @quiet
    def look(self, when: str) -> None:
        """Write down the statistics that are evaluated or saved: `when` is "evaluation" or "save"."""
        if self.recorder.world > 1 and self.trained:
            self._statistics(when)

    def _statistics(self, when: str) -> None:
        modules = [module for model in self.forwards.watched for module in model.modules()]
        norms = dict.fromkeys(module for module in modules if isinstance(module, BATCHNORM))
        means = [norm.running_mean.flatten() for norm in norms if norm.running_mean is not None]
        if means:
            all_means = torch.cat([mean.to(means[0].device, torch.float64) for mean in means])
            place, values = (None, []) if when == "update" else (user_line(), leading(all_means).tolist())
            numbers = projections([all_means])
            self.recorder.tape.add(RunningStatistics(place, when, self.recorder.updates, numbers, values))
            self.trained = when != "evaluation"


def _parted(name: str, parameter: Tensor) -> bool:
    """Whether it looks like a parameter that each process has for itself: an expert, or a shard."""
    marked = any(getattr(parameter, mark, False) for mark in MARKS) or getattr(parameter, "allreduce", True) is False
    return marked or _sharded(parameter) or bool(PARTED.search(name))


def _sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, or the first FSDP's: each process holds its part."""
    return hasattr(parameter, "placements") or type(parameter).__name__ == "FlatParameter"
