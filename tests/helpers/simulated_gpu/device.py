"""The device: what a program sees of it, what waited, what raced, what was captured."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from onehour.rules import batchnorm

from .streams import (
    ACTIVE,
    GARBAGE,
    GPU,
    STAGED,
    Clock,
    Event,
    GpuError,
    Graph,
    Memory,
    Stream,
    Work,
    bytes_of,
    tensors,
)


class SimulatedGpu:
    """The GPU that a program sees within it.

    Args:
        gpus: how many.

    Attributes:
        waits: what made the host wait, and the line.
        uploads, launches: how often which line copied to the device or launched something.
    """

    def __init__(self, *, gpus: int = 1) -> None:
        self.gpus, self.process = gpus, os.getpid()
        self.memory: dict[int, Memory] = {}
        self.shared: set[int] = set()
        self.waits: list[tuple[str, str]] = []
        self.launches: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.host: Clock = {}
        self.pending: list[tuple[Stream, int, Tensor, Tensor]] = []
        self.capturing: Graph | None = None
        self.blind = 0
        self.reduction: Stream | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        from .modes import Devices, Launches

        ACTIVE.append(self)
        self.default = self.current = Stream()
        for target, name, value in self._patches():
            self._stack.enter_context(mock.patch.object(target, name, value, create=True))
        self._stack.enter_context(Launches(self))
        self._stack.enter_context(Devices(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        ACTIVE.pop()

    # What torch.cuda is.

    def _patches(self) -> Iterator[tuple[Any, str, Any]]:
        def answers(name: str, value: Any = None) -> Callable[..., Any]:
            def call(*_: Any, **__: Any) -> Any:
                self.must_be_own(f"torch.cuda.{name}")
                return value

            return call

        properties = mock.Mock(uuid=os.environ.get("LOCAL_RANK", "0"), total_memory=2**36, multi_processor_count=132)
        replaced: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_is_in_bad_fork": lambda: os.getpid() != self.process,
            "device_count": lambda: self.gpus,
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "synchronize": lambda *_: self.waited("torch.cuda.synchronize", {s: s.time for s in self._streams()}),
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": self._graph,
            "stream": self._stream,
            "current_stream": self._current_stream,
            "default_stream": lambda *_: self.default,
            "get_device_properties": answers("get_device_properties", properties),
            "get_device_capability": answers("get_device_capability", (9, 0)),
            "get_device_name": answers("get_device_name", "simulated"),
            "current_device": answers("current_device", 0),
            **{name: answers(name) for name in ("_lazy_init", "set_device", "manual_seed", "manual_seed_all")},
            **{name: answers(name) for name in ("get_rng_state", "set_rng_state")},  # the host's generator draws
        }
        for name, value in replaced.items():
            yield torch.cuda, name, value
        # Kernels of our own cannot be launched on it, and their interpreter knows nothing of it.
        yield batchnorm, "_HAS_TRITON", False
        # Its argument is parsed before a mode hears of it.
        yield Tensor, "record_stream", lambda tensor, stream: self.known(tensor).recorded.add(stream)
        yield torch.distributed, "init_process_group", self._join(torch.distributed.init_process_group)
        for name in ("all_reduce", "broadcast", "all_gather", "batch_isend_irecv"):
            yield torch.distributed, name, self._collective(name, getattr(torch.distributed, name))
        autocast = torch.autocast.__init__

        def init(context: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            autocast(context, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        yield torch.autocast, "__init__", init
        grouping = torch.optim.Optimizer._group_tensors_by_device_and_dtype

        def grouped(lists: Any, with_indices: bool = False) -> Any:
            ours = any(t is not None and self.on_gpu(t) for t in lists[0])
            found = grouping(lists, with_indices)
            return {(GPU if ours else device, dtype): value for (device, dtype), value in found.items()}

        yield torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped)

    def _join(self, init: Callable[..., Any]) -> Callable[..., Any]:
        def joins(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> Any:
            if backend == "nccl" and self.gpus < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
                raise GpuError("Duplicate GPU detected: two ranks on one GPU")
            return init("gloo" if backend == "nccl" else backend, *args, **kwargs)

        return joins

    def _collective(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """As NCCL has it: on a stream of its own behind the caller's, which waits for it when it is told to."""

        def called(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            points = args[0] if name == "batch_isend_irecv" else ()
            given = [point.tensor for point in points] or tensors((args, kwargs))
            if not all(self.on_gpu(tensor) for tensor in given):
                self.fault(f"{name} on a CPU tensor, and the group is NCCL's")
            beside = self.reduction = self.reduction or Stream()
            beside.wait_stream(self.current)
            beside.tick()
            for tensor in given:
                self.writes(tensor, beside, name)
                self.known(tensor).recorded.add(beside)
            with self.unseen():
                if points:
                    return [Work(work, beside.clock()) for work in call(*args, **kwargs)]
                work = Work(call(*args, async_op=True, **kwargs), beside.clock())
            return work if async_op else work.wait()

        return called

    def _current_stream(self, *_: Any) -> Stream:
        self.must_be_own("torch.cuda.current_stream")
        return self.current

    @contextmanager
    def _stream(self, chosen: Stream | None) -> Iterator[None]:
        self.must_be_own("torch.cuda.stream")
        before, self.current = self.current, chosen or self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _graph(self, graph: Graph, stream: Stream, **_: Any) -> Iterator[None]:
        self.waited("torch.cuda.graph", {s: s.time for s in self._streams()})
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        self.capturing = graph
        try:
            with self._stream(stream):
                yield
            if torch._dynamo.utils.counters["stats"]["unique_graphs"] != compiled:
                raise GpuError("the model was compiled anew while it was captured")
        finally:
            self.capturing = None
            with self.unseen(), torch.no_grad():
                for content, before in graph.before.values():
                    content.copy_(before)
                for call in graph.calls:
                    for tensor in call[3]:
                        bytes_of(tensor).fill_(GARBAGE)

    # Memory.

    def known(self, tensor: Tensor) -> Memory:
        """What is known of it; it must be known."""
        found = self._find(tensor)
        assert found is not None
        return found

    def _find(self, tensor: Tensor) -> Memory | None:
        found = self.memory.get(tensor.untyped_storage()._cdata)
        return None if found is None or found.ref.expired() else found

    def on_gpu(self, tensor: Tensor) -> bool:
        found = self._find(tensor)
        return found is not None and found.on_gpu

    def is_pinned(self, tensor: Tensor) -> bool:
        found = self._find(tensor)
        return found is not None and found.pinned

    def place(self, tensor: Tensor, *, on_gpu: bool, pinned: bool = False) -> Tensor:
        """Say where it lies."""
        storage, found = tensor.untyped_storage(), self._find(tensor)
        if found is None:
            found = Memory(StorageWeakRef(storage), on_gpu=on_gpu, pinned=pinned, owner=self.current)
            self.memory[storage._cdata] = found
        found.on_gpu, found.pinned = on_gpu, pinned
        if len(self.memory) > 20_000:
            self.memory = {key: memory for key, memory in self.memory.items() if not memory.ref.expired()}
        return tensor

    def new_tensors(self, made: Any, given: Any) -> list[Tensor]:
        """Those of a call's results that are no views of what it was given."""
        old = {tensor.untyped_storage()._cdata for tensor in tensors(given)}
        return [tensor for tensor in tensors(made) if tensor.untyped_storage()._cdata not in old]

    # Time.

    def _streams(self) -> set[Stream]:
        every = {self.default, self.current, *self.host, *(stream for stream, *_ in self.pending)}
        return every | {seen for stream in every for seen in stream.seen}

    def host_knows(self, clock: Clock) -> bool:
        return all(time <= self.host.get(stream, 0) for stream, time in clock.items())

    def waited(self, what: str, clock: Clock) -> None:
        """The host waits until the streams have come to these times; copies that were in flight arrive."""
        self.must_be_own(what)
        if self.capturing is not None:
            raise GpuError(f"{what}: operation not permitted when stream is capturing [{self.line()}]")
        self.waits.append((what, self.line()))
        for stream, time in clock.items():
            self.host[stream] = max(self.host.get(stream, 0), time)
        with self.unseen(), torch.no_grad():
            for stream, time, target, value in self.pending:
                if self.host_knows({stream: time}):
                    target.copy_(value)
        self.pending = [copy for copy in self.pending if not self.host_knows({copy[0]: copy[1]})]

    def must_be_own(self, what: str) -> None:
        if os.getpid() != self.process:
            raise GpuError(f"{what}: Cannot re-initialize CUDA in forked subprocess")

    def fault(self, what: str) -> None:
        raise GpuError(f"{what} [{self.line()}]")

    def _behind(self, stream: Stream, other: Stream, time: int) -> bool:
        """Whether a stream may come to work before another has come to that time."""
        return not stream.knows(other, time) and self.host.get(other, 0) < time

    def reads(self, tensor: Tensor, stream: Stream, what: str) -> None:
        memory = self.known(tensor)
        if memory.writer is not None and self._behind(stream, *memory.writer):
            self.fault(f"race: {what} reads what another stream still writes")
        memory.readers[stream] = stream.time
        self._share(memory)

    def writes(self, tensor: Tensor, stream: Stream, what: str) -> None:
        memory = self.known(tensor)
        for user in [*memory.readers.items(), *([memory.writer] if memory.writer else [])]:
            if self._behind(stream, *user):
                self.fault(f"race: {what} writes what another stream still uses")
        memory.writer, memory.readers = (stream, stream.time), {}
        self._share(memory)

    def _users(self, memory: Memory) -> Clock:
        users = dict(memory.readers)
        if memory.writer is not None:
            stream, time = memory.writer
            users[stream] = max(time, users.get(stream, 0))
        return users

    def _share(self, memory: Memory) -> None:
        if set(self._users(memory)) - {memory.owner}:
            self.shared.add(memory.ref.cdata)

    def look_for_freed(self) -> None:
        """What was freed while another stream than its own may use it, and that stream was not recorded."""
        for cdata in list(self.shared):
            memory = self.memory[cdata]
            if not memory.ref.expired():
                continue
            behind = {memory.owner, *memory.recorded}
            for stream, time in self._users(memory).items():
                if all(self._behind(other, stream, time) for other in behind):
                    self.fault("freed while another stream uses it: record_stream is missing")
            self.shared.discard(cdata)
            del self.memory[cdata]

    def touched(self, tensor: Tensor, what: str, *, write: bool) -> None:
        """The host reads or writes memory of its own: no copy of it may be in flight."""
        memory = self._find(tensor)
        if memory is None:
            return
        memory.copies = [copy for copy in memory.copies if not self.host_knows({copy[1]: copy[2]})]
        for direction, *_ in memory.copies:
            if direction == "to" or write:
                self.fault(
                    f"the host {'writes' if write else 'reads'} ({what}) while a copy {direction} it is in flight"
                )

    # Copies.

    def upload(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        kind = "pinned" if self.is_pinned(source) else "pageable"
        if self.capturing is not None:
            self.fault(f"an upload ({kind}): operation not permitted when stream is capturing")
        self.uploads[f"{kind}{'' if non_blocking else ', blocking'}", self.line()] += 1
        stream = self.current
        time = stream.tick()
        if kind == "pinned" and non_blocking:
            self.known(source).copies.append(("from", stream, time))
        elif source.nbytes > STAGED or kind == "pinned":
            self.waited(f"upload ({kind})", stream.clock())
        self.writes(target, stream, "an upload")

    def download(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        stream = self.current
        time = stream.tick()
        self.reads(source, stream, "a download")
        if not (non_blocking and self.is_pinned(target)):
            self.waited("download" + (" (non_blocking into pageable memory)" if non_blocking else ""), stream.clock())
            return
        with self.unseen(), torch.no_grad():
            value = source.detach().clone()
            target.view(torch.uint8).fill_(GARBAGE if target.dtype is not torch.bool else 1)
        self.known(target).copies.append(("to", stream, time))
        self.pending.append((stream, time, target, value))

    # What the device's own work is not told of.

    @contextmanager
    def unseen(self) -> Iterator[None]:
        self.blind += 1
        try:
            yield
        finally:
            self.blind -= 1

    def line(self) -> str:
        """The innermost line that is neither torch's nor Python's, by its path in the package where it is ours."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_elsewhere(frame.f_code.co_filename):
            frame = frame.f_back
        path = frame.f_code.co_filename
        ours = path.rpartition("/src/onehour/")[2]
        return f"{ours if ours != path else os.path.basename(path)}:{frame.f_lineno}"


def _is_elsewhere(path: str) -> bool:
    return path.startswith("<") or any(part in path for part in ("/simulated_gpu/", "/lib/python", "/site-packages/"))
