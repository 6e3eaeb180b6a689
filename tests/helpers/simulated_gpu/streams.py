"""What work is queued in, what is known of memory, and what a capture records."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .device import SimulatedGpu

GPU = torch.device("cuda", 0)
GARBAGE = 0xA5
STAGED = 65536
"""Bytes up to which CUDA stages a pageable copy, so that the host goes on."""


class GpuError(RuntimeError):
    """What CUDA, NCCL or the caching allocator would refuse or get wrong."""


Clock = dict["Stream", int]
"""Up to which time each stream's work is known to be done."""


ACTIVE: list[SimulatedGpu] = []
"""The one that the program is in, if it is in one."""


def now() -> SimulatedGpu:
    """The device that the program sees."""
    return ACTIVE[-1]


class Stream:
    """A queue of work: its own time, and how far it knows the others to be."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        now().must_be_own("torch.cuda.Stream")
        self.time = 0
        self.seen: Clock = {}

    def knows(self, other: Stream, time: int) -> bool:
        return other is self or self.seen.get(other, 0) >= time

    def learn(self, clock: Clock) -> None:
        for stream, time in clock.items():
            self.seen[stream] = max(time, self.seen.get(stream, 0))

    def clock(self) -> Clock:
        return self.seen | {self: self.time}

    def tick(self) -> int:
        self.time += 1
        return self.time

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.clock())

    def wait_event(self, event: Event) -> None:
        self.learn(event.clock)

    def synchronize(self) -> None:
        now().waited("Stream.synchronize", self.clock())


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.timing = enable_timing
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        gpu = now()
        gpu.must_be_own("Event.record")
        stream = stream or gpu.current
        stream.tick()
        self.clock = stream.clock()

    def synchronize(self) -> None:
        now().waited("Event.synchronize", self.clock)

    def query(self) -> bool:
        return now().host_knows(self.clock)

    def elapsed_time(self, other: Event) -> float:
        if not (self.timing and other.timing):
            raise GpuError("elapsed_time of events without timing")
        if not other.query():
            raise GpuError("elapsed_time of an event that the host has not waited for")
        return 1.0


class Work:
    """A collective that was launched; what is given to it lies there once this was waited for."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self.work, self.clock = work, clock

    def wait(self) -> None:
        gpu = now()
        with gpu.unseen():
            self.work.wait()
        gpu.current.learn(self.clock)


class Memory:
    """What is known of a storage: where it lies, who wrote it last and reads it since."""

    __slots__ = ("copies", "on_gpu", "owner", "pinned", "readers", "recorded", "ref", "writer")

    def __init__(self, ref: StorageWeakRef, *, on_gpu: bool, pinned: bool, owner: Stream) -> None:
        self.ref, self.on_gpu, self.pinned, self.owner = ref, on_gpu, pinned, owner
        self.writer: tuple[Stream, int] | None = None
        self.readers: Clock = {}
        self.recorded: set[Stream] = set()
        self.copies: list[tuple[str, Stream, int]] = []
        """Copies in flight "from" or "to" this host memory."""


class Graph:
    """What was launched while it was captured; nothing of it has run, and each replay runs all of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.reads: list[Tensor] = []
        self.writes: list[Tensor] = []

    def keep(self, tensor: Tensor) -> None:
        """Remember what this held before the capture, which changes nothing."""
        cdata = tensor.untyped_storage()._cdata
        if cdata not in self.before:
            content = bytes_of(tensor)
            self.before[cdata] = (content, content.clone())

    def add(self, call: Callable[..., Any], args: Any, kwargs: Any, made: list[Tensor]) -> None:
        """A launch reads a number of the host's when it is captured, and memory of the device's when it runs."""
        gpu = now()

        def frozen(leaf: Any) -> Any:
            return leaf.clone() if isinstance(leaf, Tensor) and not gpu.on_gpu(leaf) else leaf

        self.calls.append((call, tree_map(frozen, args), tree_map(frozen, kwargs), made))

    def replay(self) -> None:
        gpu = now()
        gpu.must_be_own("CUDAGraph.replay")
        stream = gpu.current
        stream.tick()
        stream.learn(gpu.host)
        for tensor in self.reads:
            gpu.reads(tensor, stream, "a graph")
        with gpu.unseen(), torch.no_grad():
            for call, args, kwargs, made in self.calls:
                for old, new in zip(made, gpu.new_tensors(call(*args, **kwargs), (args, kwargs)), strict=True):
                    old.copy_(new)
        for tensor in self.writes:
            gpu.writes(tensor, stream, "a graph")
        gpu.launches["a graph", gpu.line()] += 1


def bytes_of(tensor: Tensor) -> Tensor:
    """All of its storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # pyright: ignore[reportArgumentType]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
