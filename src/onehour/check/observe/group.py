"""Several processes: who joins them, whose BatchNorm statistics are used, and whether their random numbers are one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from onehour.check.observe.digests import leading, projections
from onehour.check.observe.forward import Forwards
from onehour.check.observe.internals import BATCHNORM, REFUSES_CPU
from onehour.check.observe.recorder import Patches, TapeRecorder, quiet
from onehour.check.observe.source import user_line
from onehour.check.tape import (
    GroupJoined,
    InitialWeights,
    ModelWrapped,
    OwnStatistics,
    SyncBatchNormMade,
    UsedStatistics,
)

WEIGHTS, EACH = 8, 4096
"""How many weights are compared before the first update, and how much of each."""


class Groups:
    """Watches process groups, DistributedDataParallel, SyncBatchNorm, and the statistics that are evaluated or saved.

    Args:
        recorder: takes the groups, what is wrapped, initial weights and running statistics.
        forwards: know the models.
    """

    def __init__(self, recorder: TapeRecorder, forwards: Forwards) -> None:
        self.recorder, self.forwards = recorder, forwards
        self.trained = False
        """Whether the statistics have moved since they were last looked at."""

    def install(self, patches: Patches) -> None:
        """Stand before the functions that make groups, wrap models and save them."""
        patches.around(dist, "init_process_group", self._join)
        patches.after(DistributedDataParallel, "__init__", self._wrapped)
        patches.around(DistributedDataParallel, REFUSES_CPU, self._allow)
        patches.after(nn.SyncBatchNorm, "__init__", self._synced)
        patches.around(nn.SyncBatchNorm, "forward", self._forward)
        patches.around(torch, "save", self._save)

    def _join(self, original: Any, *arguments: Any, **options: Any) -> Any:
        backend = arguments[0] if arguments else options.get("backend")
        if self.recorder.cut and isinstance(backend, str) and "nccl" in backend and not torch.cuda.is_available():
            if arguments:
                arguments = ("gloo", *arguments[1:])
            else:
                options |= {"backend": "gloo"}
        result = original(*arguments, **options)
        self._joined(backend)
        return result

    @quiet
    def _joined(self, backend: Any) -> None:
        self.recorder.rank, self.recorder.world = dist.get_rank(), dist.get_world_size()
        self.recorder.tape.add(GroupJoined(user_line(), dist.get_rank(), dist.get_world_size()))

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
        use_batch = module.training or module.running_mean is None
        share = 0.0 if module.momentum is None else module.momentum
        return F.batch_norm(
            values, module.running_mean, module.running_var, module.weight, module.bias, use_batch, share, module.eps
        )

    def _save(self, original: Any, thing: Any, *arguments: Any, **options: Any) -> Any:
        self.look("save")
        return original(thing, *arguments, **options)

    @quiet
    def stepped(self, optimizer: Optimizer) -> None:
        """An update was made: the statistics of this process, and at first its weights, are written down."""
        self.trained = True
        if self.recorder.world > 1 and self.recorder.attentive:
            numbers = projections([self._statistics()])
            self.recorder.tape.add(OwnStatistics(updates=self.recorder.updates, numbers=numbers))

    @quiet
    def first_step(self, optimizer: Optimizer) -> None:
        """Before the first update: the weights that this process begins with."""
        if self.recorder.world > 1:
            weights = [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1][:WEIGHTS]
            values = [value for p in weights for value in leading(p)[:EACH].tolist()]
            self.recorder.tape.add(InitialWeights(user_line(), values))

    @quiet
    def look(self, when: str) -> None:
        """Write down the statistics that are evaluated or saved.

        Args:
            when: "evaluation" or "save".
        """
        if self.recorder.world > 1 and self.trained:
            means = self._statistics()
            if means is not None:
                self.trained = when != "evaluation"
                numbers, values = projections([means]), leading(means).tolist()
                self.recorder.tape.add(UsedStatistics(user_line(), when, self.recorder.updates, numbers, values))

    def _statistics(self) -> Tensor | None:
        """The running means of all BatchNorms, one behind the other."""
        models = self.forwards.models if self.forwards.only is None else [self.forwards.only]
        modules = [module for model in models for module in model.modules() if isinstance(module, BATCHNORM)]
        means = [m.running_mean.flatten() for m in dict.fromkeys(modules) if m.running_mean is not None]
        return torch.cat([mean.to(means[0].device, torch.float64) for mean in means]) if means else None
