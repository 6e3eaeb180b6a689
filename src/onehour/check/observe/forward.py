"""Models: the samples of each pass, what BatchNorm sees, and which parameters decay or learn (§2.3, §5.1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from onehour.check.observe.backward import Backwards
from onehour.check.observe.digests import first_tensor, in_a_graph, projections
from onehour.check.observe.internals import BATCHNORM
from onehour.check.observe.recorder import Hook, Patches, TapeRecorder, nothing, quiet
from onehour.check.tape import BatchNormSizes, ModelSeen

WRAPPER = re.compile(r"^(?:module\.)+|\b(?:_orig_mod|_fsdp_wrapped_module)\.")
"""What wrappers put into a parameter's name."""


class Forwards:
    """Watches the outermost modules that are called, or `only` one model; tells `backwards` the samples of a pass."""

    def __init__(self, recorder: TapeRecorder, backwards: Backwards, only: nn.Module | None = None) -> None:
        self.recorder, self.backwards, self.optimizers = recorder, backwards, backwards.optimizers
        # What is wrapped is evaluated without its wrapper, too.
        self.only = only.module if isinstance(only, DistributedDataParallel) else only
        self.depth = 0
        self.models: list[nn.Module] = []
        self.outside: dict[int, list[float]] = {}
        """Parameters that were in no optimizer at first, as they were; a loop may update them without one."""
        self.on_evaluation: Callable[..., object] = nothing  # called when a model is used without training it
        self.sizes: set[int] = set()
        self.handles = Patches()  # hooks on each BatchNorm, which are there for the first updates

    def install(self, patches: Patches) -> None:
        if self.only is None:
            patches.callback(register_module_forward_pre_hook(self._enter).remove)
            patches.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            return
        patches.callback(self.only.register_forward_pre_hook(Hook(self._enter)).remove)
        patches.callback(self.only.register_forward_hook(Hook(self._leave), always_call=True).remove)
        for module in self.only.modules():
            for kind, look in ((BATCHNORM, self._batchnorm), (nn.RNNBase, self._recurrent)):
                if isinstance(module, kind) and module is not self.only:
                    self.handles.callback(module.register_forward_pre_hook(Hook(look)).remove)
        patches.callback(self.handles.close)

    @quiet
    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if in_a_graph():
            return
        if self.depth == 0 and not self.backwards.running:
            self._outermost(module, inputs)
        if isinstance(module, BATCHNORM):
            self._batchnorm(module, inputs)
        elif isinstance(module, nn.RNNBase):
            self._recurrent(module, inputs)
        self.depth += 1

    @quiet
    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if in_a_graph():
            return
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and not _trains(module):
            self.backwards.evaluations.said(output)

    def _outermost(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and self._learns(module):
            tensor = first_tensor(inputs)
            if tensor is not None and tensor.ndim:
                self.backwards.samples = tensor.shape[0]
                if self.recorder.cut and not self.backwards.loaders.loading:
                    self.backwards.content = projections([tensor.double()])
        if not _trains(module) and self._is_known(module):
            self.on_evaluation()

    def _is_known(self, module: nn.Module) -> bool:
        parts = {id(part) for model in self.models for part in model.modules()}
        return any(id(part) in parts for part in module.modules())

    def _learns(self, module: nn.Module) -> bool:
        if any(module is model for model in self.models):
            return True
        learns = any(p.requires_grad for p in module.parameters())
        if learns:
            self.models.append(module)
            held = _decays([*self.optimizers.watched, *self.optimizers.others])
            outside = [p for p in module.parameters() if id(p) not in held and not is_lazy(p) and p.is_floating_point()]
            self.outside = {id(p): projections([p]) for p in outside} | self.outside
        return learns

    @quiet
    def _batchnorm(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if in_a_graph():
            return
        if self.recorder.updates >= self.recorder.deep_updates:
            self.handles.close()
        elif module.training and torch.is_grad_enabled():
            n = getattr(module, "per_worker", None) or inputs[0].shape[0]
            self.sizes.add(int(n))

    @quiet
    def _recurrent(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        state = None if in_a_graph() else first_tensor(inputs[1:])
        if state is not None and not state.requires_grad and torch.is_grad_enabled():
            self.backwards.carried |= bool(state.any())

    @property
    def watched(self) -> list[nn.Module]:
        return self.models if self.only is None else [self.only]

    def names(self, parameters: list[Tensor]) -> dict[str, Tensor]:
        """Parameters by their names in the model that was trained; by their number where it was not seen."""
        known = {id(p): WRAPPER.sub("", name) for one in reversed(self.watched) for name, p in one.named_parameters()}
        named: dict[str, Tensor] = {}
        for number, p in enumerate(parameters):
            name = known.get(id(p), f"parameter {number}")
            named[f"{name} ({number})" if name in named else name] = p
        return named

    @quiet
    def describe(self) -> None:
        """Write down the models that were trained: what their optimizers decay and leave out; called at the end."""
        decays = _decays([*self.optimizers.watched, *self.optimizers.others])
        for model in self.watched:
            self.recorder.tape.add(_described(model, decays, self.outside))
        if self.sizes:
            self.recorder.tape.add(BatchNormSizes(sizes=sorted(self.sizes)))


def _described(model: nn.Module, decays: dict[int, tuple[int, float]], outside: dict[int, list[float]]) -> ModelSeen:
    normalising = [(name, m) for name, m in model.named_modules() if isinstance(m, BATCHNORM)]
    decayed = [
        (f"{name}.{kind}" if name else kind, decays[id(p)])
        for name, module in normalising
        for kind, p in module.named_parameters(recurse=False)
        if id(p) in decays and decays[id(p)][1] > 0
    ]
    return ModelSeen(
        affine=sum(1 for _, module in normalising for _ in module.parameters(recurse=False)),
        synced=sum(isinstance(m, nn.SyncBatchNorm) for _, m in normalising),
        decayed=[name for name, _ in decayed],
        decay=max((decay for _, (_, decay) in decayed), default=0.0),
        optimizer=decayed[0][1][0] if decayed else None,
        unused=[
            name
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in decays and p.grad is not None and bool(p.grad.any())
            if outside.get(id(p), now := projections([p])) == now
        ],
        parameters=len(decays.keys() | {id(p) for p in model.parameters() if p.requires_grad}),
    )


def _trains(module: nn.Module) -> bool:
    """Whether a pass is one of training: wrappers do not always follow what they wrap in its mode."""
    return torch.is_grad_enabled() and any(part.training for part in module.modules())


def _decays(optimizers: list[Optimizer]) -> dict[int, tuple[int, float]]:
    """For each trainable parameter that an optimizer holds: a number for the optimizer, and its weight decay."""
    return {
        id(p): (number, float(group.get("weight_decay") or 0.0))
        for number, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    }
