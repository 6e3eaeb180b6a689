"""What torch's calls mean on the device: what they launch, and what they say of devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .device import SimulatedGpu
from .streams import GPU, GpuError, tensors

WAITS = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "repeat_interleave"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
}
CPU = torch.device("cpu")


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return found


class Launches(TorchDispatchMode):
    """Below autograd: who meets whom, what waits, what runs on which stream, what a capture records."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, self.gpu
        if gpu.blind:
            return func(*args, **kwargs)
        name, given = func._schema.name, tensors((args, kwargs))
        ours = [tensor for tensor in given if gpu.on_gpu(tensor)]
        others = [tensor for tensor in given if not gpu.on_gpu(tensor)]
        writes = written(func, args, kwargs)
        if name.startswith("c10d::"):
            if any(tensor.numel() for tensor in others):
                gpu.fault(f"{name} on a CPU tensor, and the group is NCCL's")
        elif ours and any(tensor.ndim and tensor.numel() for tensor in others):
            gpu.fault(f"{name}: a CPU tensor meets tensors on the GPU")
        if not ours:
            for tensor in given:
                gpu.touched(tensor, name, write=any(tensor is each for each in writes))
            return func(*args, **kwargs)
        return self._launch(func, args, kwargs, name=name, ours=ours, writes=writes)

    def _launch(self, func: Any, args: Any, kwargs: Any, *, name: str, ours: list[Tensor], writes: list[Tensor]) -> Any:
        gpu = self.gpu
        gpu.must_be_own(name)
        stream, graph = gpu.current, gpu.capturing
        if graph is not None:
            for tensor in writes:
                graph.keep(tensor)
        out = func(*args, **kwargs)
        if name in WAITS or (name == "aten::index" and any(t.dtype is torch.bool for t in ours[1:])):
            gpu.waited(name, stream.clock())
        made = gpu.new_tensors(out, (args, kwargs))
        if made or writes:
            gpu.launches[name, gpu.line()] += 1
        for tensor in made:
            gpu.place(tensor, on_gpu=True)
        read = [tensor for tensor in ours if not any(tensor is each for each in writes)]
        if graph is not None:
            if made or writes:
                graph.add(func, args, kwargs, made)
            graph.reads += read
            graph.writes += [*made, *writes]
            return out
        stream.tick()
        stream.learn(gpu.host)
        for tensor in read:
            gpu.reads(tensor, stream, name)
        for tensor in [*made, *(tensor for tensor in writes if gpu.on_gpu(tensor))]:
            gpu.writes(tensor, stream, name)
        gpu.look_for_freed()
        return out


class Devices(TorchFunctionMode):
    """What the program says of devices, and hears."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.own = {
            Tensor.to: self._to,
            Tensor.cpu: lambda func, own, **kwargs: self._to(Tensor.to, own, CPU),
            Tensor.cuda: lambda func, own, *args, **kwargs: self._to(Tensor.to, own, GPU, **kwargs),
            Tensor.copy_: self._copy,
            Tensor.__setitem__: self._set_item,
            Tensor.__deepcopy__: self._deep_copy,
            Tensor.pin_memory: self._pin,
            Tensor.is_pinned: lambda func, own, *args: gpu.is_pinned(own),
            Tensor.tolist: self._to_list,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = dict(kwargs or {}), self.gpu
        if gpu.blind:
            return func(*args, **kwargs)
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if own is not None and getattr(func, "__name__", "") == "__get__":
            attribute = getattr(func, "__self__", None)
            if attribute is Tensor.device:
                return GPU if gpu.on_gpu(own) else func(*args)
            if attribute is Tensor.is_cuda:
                return gpu.on_gpu(own)
            if attribute is Tensor.is_cpu:
                return not gpu.on_gpu(own)
        elif own is not None and func in self.own:
            return self.own[func](func, own, *args[1:], **kwargs)
        elif kwargs.get("device") is not None or kwargs.get("pin_memory"):
            return self._make(func, args, kwargs)
        return func(*args, **kwargs)

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A new tensor, where it was asked for."""
        gpu, device = self.gpu, torch.device(kwargs.get("device") or "cpu")
        if device.type == "cuda":
            kwargs["device"] = CPU
        pinned = bool(kwargs.pop("pin_memory", False))
        with gpu.unseen():
            out = func(*args, **kwargs)
        if device.type == "cuda":
            gpu.place(out, on_gpu=True)
            if func in (torch.tensor, torch.as_tensor):
                gpu.upload(out, torch.empty(0), non_blocking=False)
            else:
                gpu.launches[func.__name__, gpu.line()] += 1
                gpu.writes(out, gpu.current, func.__name__)
                if gpu.capturing is not None:
                    gpu.capturing.add(func, args, kwargs, [out])
        elif pinned:
            gpu.place(out, on_gpu=False, pinned=True)
        return out

    def _to(self, func: Any, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gpu, device = self.gpu, kwargs.get("device")
        for value in args:
            if isinstance(value, torch.device | str) or (isinstance(value, int) and not isinstance(value, bool)):
                device = value
            elif isinstance(value, Tensor):
                device = GPU if gpu.on_gpu(value) else CPU
        if device is not None and torch.device(device).type == "meta":
            return func(own, *args, **kwargs)
        to_gpu = device is not None and torch.device(device).type == "cuda"
        here = [torch.empty(0, dtype=v.dtype) if isinstance(v, Tensor) else v for v in args]
        here = [CPU if isinstance(v, torch.device | str) else v for v in here]
        if "device" in kwargs:
            kwargs["device"] = CPU
        if device is None or to_gpu == gpu.on_gpu(own):
            return func(own, *here, **kwargs)
        with gpu.unseen():
            out = func(own, *here, **kwargs)
            if out.untyped_storage()._cdata == own.untyped_storage()._cdata:
                out = own.clone() if own.requires_grad else torch.empty_like(own).copy_(own)
        non_blocking = bool(kwargs.get("non_blocking", False))
        gpu.place(out, on_gpu=to_gpu)
        if to_gpu:
            gpu.touched(own, "to", write=False)
            gpu.upload(out, own, non_blocking=non_blocking)
        else:
            gpu.download(out, own, non_blocking=non_blocking)
        return out

    def _copy(self, func: Any, own: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        gpu = self.gpu
        if gpu.on_gpu(own) == gpu.on_gpu(source):
            return func(own, source, non_blocking)
        with gpu.unseen():
            out = func(own, source)
        if gpu.on_gpu(own):
            gpu.upload(own, source, non_blocking=non_blocking)
        else:
            gpu.download(own, source, non_blocking=non_blocking)
        return out

    def _set_item(self, func: Any, own: Tensor, index: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim and self.gpu.on_gpu(own) != self.gpu.on_gpu(value):
            value = self._to(Tensor.to, value, GPU if self.gpu.on_gpu(own) else CPU)  # as copy_ does, and waits
        return func(own, index, value)

    def _deep_copy(self, func: Any, own: Tensor, memo: Any) -> Tensor:
        with self.gpu.unseen():
            out = func(own, memo)
        return self.gpu.place(out, on_gpu=True) if self.gpu.on_gpu(own) else out

    def _pin(self, func: Any, own: Tensor, *args: Any) -> Tensor:
        if self.gpu.on_gpu(own):
            raise GpuError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        self.gpu.must_be_own("pin_memory")
        with self.gpu.unseen():
            return self.gpu.place(own.clone(), on_gpu=False, pinned=True)

    def _to_list(self, func: Any, own: Tensor) -> Any:
        if self.gpu.on_gpu(own):
            self.gpu.waited("tolist", self.gpu.current.clock())
        else:
            self.gpu.touched(own, "tolist", write=False)
        with self.gpu.unseen():
            return func(own)

    def _numpy(self, func: Any, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu.on_gpu(own):
            raise GpuError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        self.gpu.touched(own, "numpy", write=False)
        with self.gpu.unseen():
            return func(own, *args, **kwargs)
