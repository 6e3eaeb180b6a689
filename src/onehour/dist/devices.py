"""Where a process computes: for how many there are GPUs (NCCL lets no two have one), and what bits depend on there.

What the host does beside a device that works on its own: iterations as one graph, their times, flags read late.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.machine import cores
from onehour.messages import blame

ON_CPU = 2
"""Processes on one machine's CPU, where a person leaves it to us: torch's threads use the other cores."""
WARMUPS = 3
"""Iterations that are launched one kernel after another first: libraries choose their algorithms in them."""

Launch = Callable[[Iterable[Any], Tensor, Tensor], Tensor]
"""An iteration's work on the device: from a batch a pass, the rate, and whether to stop, to what it found."""


def pick_device(device: str) -> str:
    """ "cuda" where asked for or available, else "cpu"; it comes before anything that computes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # cuBLAS reads it once, and a canonical run may come later in this process
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def pick_processes(device: str, workers: int) -> tuple[int, str]:
    """How many processes to start on this machine, and a line for a person where a GPU decides it; else ""."""
    if device == "cpu":
        return min(ON_CPU, cores(), workers), ""
    gpus = torch.cuda.device_count()
    processes = min(gpus, workers)
    why = f"torch sees {_gpus(gpus)} here, and each process needs one of its own; k does not change"
    return processes, f"{processes} process{'es' * (processes > 1)}: {why}"


def refuse_too_few_gpus(processes: int, device: str) -> None:
    gpus = torch.cuda.device_count() if device == "cuda" else processes
    if gpus < processes:
        raise ValueError(
            f"--processes {processes} needs {processes} GPUs, one each, and torch sees {_gpus(gpus)} here; use"
            f" --processes {gpus} (k does not change), or --device cpu"
        )


def own_gpu(local_rank: int, local_size: int, *, shared: bool) -> int:
    """The number of the GPU that a process takes, one of `local_size` on this host.

    All of them see the same GPUs if `shared`; a launcher such as srun may give each some of its own.
    """
    gpus = torch.cuda.device_count()
    started = max(local_size, local_rank + 1)
    if shared and started > gpus:
        raise ValueError(
            f"{started} processes were started on this host, and torch sees {_gpus(gpus)} here: each needs one of its"
            f" own; start {gpus} (k does not change), or use --device cpu"
        )
    return local_rank % gpus


def name_of(device: torch.device) -> str:
    """A device's name, which no other device of its machine has."""
    return f"GPU {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


def refuse_other_devices(places: Sequence[tuple[str, str, str]]) -> None:
    """Refuse processes of which some compute on GPUs and some do not, or two that have one GPU between them.

    Args:
        places: by rank: the host's name, its machine, and `name_of` the device.
    """
    first: dict[tuple[str, str], int] = {}
    for rank, (host, machine, name) in enumerate(places):
        if (name == "cpu") != (places[0][2] == "cpu"):
            one, two = ("the CPU" if each == "cpu" else "a GPU" for each in (places[0][2], name))
            raise ValueError(
                f"process 0 ({places[0][0]}) computes on {one} and process {rank} ({host}) on {two}; give all the same"
                " --device"
            )
        other = first.setdefault((machine, name), rank)
        if name != "cpu" and other != rank:
            raise ValueError(
                f"processes {other} and {rank} ({host}) would both compute on {name}, and each needs one of its own;"
                " start as many processes on a host as it has GPUs (k does not change), or use --device cpu"
            )


@contextmanager
def deterministic(recipe: Recipe) -> Generator[None]:
    """For a canonical recipe: its number of threads, deterministic algorithms, no TF32, no algorithm by trial.

    Convolution gradients differ in bits between 1 and 2 threads, so the number is part of the recipe.
    """
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    memory: Any = torch.utils.deterministic
    benchmark, threads, strict = cudnn.benchmark, torch.get_num_threads(), torch.get_deterministic_debug_mode()
    coarse, filled = (cudnn.allow_tf32, matmul.allow_tf32), memory.fill_uninitialized_memory
    canonical = recipe.reduce == "canonical"
    cudnn.benchmark = not canonical
    if canonical:
        torch.set_num_threads(recipe.canonical_threads)
        torch.use_deterministic_algorithms(True)
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        memory.fill_uninitialized_memory = False  # it would write all of each result twice
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        if canonical:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(strict)
            cudnn.allow_tf32, matmul.allow_tf32 = coarse
            memory.fill_uninitialized_memory = filled


def build_of(device: torch.device) -> dict[str, str]:
    """What the bits of a canonical run depend on beside its recipe: it is recorded, and named when it changes."""
    if device.type == "cuda":
        name, instructions = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    else:
        name, instructions = "cpu", torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": name, "instructions": instructions}


def _gpus(number: int) -> str:
    return f"{number or 'no'} GPU{'s' * (number != 1)}"


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    Not `torch.manual_seed`, which without CUDA notes a stack trace for every call and keeps them all.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def own_numbers(device: torch.device) -> AbstractContextManager[None]:
    """While entered, whoever draws or seeds has torch's generators for itself: they are put back at the end."""
    random: Any = torch.random  # which has no types
    return random.fork_rng(devices=[device] if device.type == "cuda" else [])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or on the host.

    The CPU's allocator has no type of its own for it, only its words.
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class StepTimer:
    """Laps of iterations, without waiting for the device: by the clock on the CPU, by events of the stream on CUDA.

    Args:
        parts: of an iteration, in the order in which they are told.
    """

    def __init__(self, parts: Sequence[str], device: torch.device) -> None:
        self._parts, self._on_device = parts, device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []
        self._closed: list[list[tuple[str, Any]]] = []
        self._silent = False

    def begin(self) -> None:
        """Begin an iteration."""
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """What happened since the last lap, or the beginning, was `part`; an iteration may have several of each."""
        if not self._silent:
            self._laps.append((part, self._now()))

    @contextmanager
    def silent(self) -> Generator[None]:
        """While entered, laps are left out: an event of a stream that is captured would become part of the graph."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def end(self) -> None:
        self._closed.append(self._laps)

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part for every iteration since the last call."""
        if self._on_device:
            torch.cuda.synchronize()
        closed, self._closed = self._closed, []
        return [self._by_part(laps) for laps in closed]

    def _by_part(self, laps: list[tuple[str, Any]]) -> dict[str, float]:
        parts: dict[str, float] = dict.fromkeys(self._parts, 0.0)
        for (_, before), (part, after) in pairwise(laps):
            parts[part] += before.elapsed_time(after) if self._on_device else (after - before) * 1e3
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class CapturedIteration:
    """Runs `launch` as it is for some iterations, then as a graph that does the same with what its inputs then hold.

    What `launch` reads and writes must lie where it lay before, and nothing in it may wait for the device. If a model
    does, its iterations go on being launched one kernel after another, and people are told which call it was.

    Args:
        timer: is told how long a replay took, which has no parts.
        device: where the numbers lie.
        warn: is told why a model cannot be captured.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        timer: StepTimer,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        self._launch, self._timer, self._warn = launch, timer, warn
        self._stream = torch.cuda.Stream()
        self._launched, self._usable = 0, True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batches: list[Any] = []
        self._rate, self._stopping = torch.zeros((), device=device), torch.zeros((), device=device)
        self._found: Tensor | None = None

    def __call__(self, batches: Iterable[Any], rate: float, stopping: float) -> Tensor:
        """What `launch` returns; it is overwritten by the next call."""
        given = list(batches)
        self._rate.fill_(rate)
        self._stopping.fill_(stopping)
        if self._graph is None and self._usable and self._launched >= WARMUPS:
            self._capture(given)
        if self._graph is None:
            return self._launch_beside(given)
        targets = [tensor for batch in self._batches for tensor in batch]
        sources = [tensor for batch in given for tensor in batch]
        for target, source in zip(targets, sources, strict=True):
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            target.copy_(source, non_blocking=True)
        self._graph.replay()
        self._timer.lap("compute")
        assert self._found is not None
        return self._found

    def _launch_beside(self, batches: Sequence[Any]) -> Tensor:
        """On the stream that is captured later, whose autograd must not wait for another's."""
        self._launched += 1
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self._launch(batches, self._rate, self._stopping)
        here.wait_stream(self._stream)
        return found

    def _capture(self, batches: Sequence[Any]) -> None:
        kept = [tuple(tensor.clone() for tensor in batch) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream), self._timer.silent():
                found = self._launch(kept, self._rate, self._stopping)
        except Exception as error:
            self._usable = False
            torch.cuda.synchronize()
            self._warn(
                "the model cannot be captured as a CUDA graph, so its kernels are launched one by one, which is slower"
                f" where they are short: {blame(error)}"
            )
            return
        self._graph, self._batches, self._found = graph, kept, found


class HostFlags:
    """Two booleans an iteration: a stop was asked for, no seed is alive any more.

    On the CPU they are read at once. On CUDA they are copied behind the iteration and read one iteration later, so that
    the device always has work; every process reads the same iteration's, so all act alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._cuda = device.type == "cuda"
        self.late = 0
        """How many iterations before the one that it was read at a run had halted."""

    def read(self, stop: Tensor, alive: Tensor, *, now: bool = False) -> tuple[bool, bool]:
        """(stop asked, halted) of this iteration; on CUDA of the one before, and of this one where `now`."""
        if not self._cuda:
            return stop.item() > 0, not alive.any().item()
        earlier, self._pending = self._pending, self._copy(stop, alive)
        stopped = halted = False
        for late, copied in ((1, earlier), (0, self._pending if now else None)):
            if copied is not None:
                flags, event = copied
                event.synchronize()
                stopped |= bool(flags[0])
                if flags[1] and not halted:
                    halted, self.late = True, late
        return stopped, halted

    def _copy(self, stop: Tensor, alive: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
        on_host.copy_(torch.stack((stop > 0, ~alive.any())), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
