"""What one GPU shows in a few minutes: plain loops beside ours, the kernels, the tests that need one, a sweep.

    python benchmarks/gpu.py --out DIR [--rows resnet50,small,…]     # where the GPU is: DIR/gpu.jsonl, a row at a time
    python benchmarks/gpu.py --collect DIR/gpu.jsonl                 # in a clone of the same commit: results/gpu.json
    python benchmarks/gpu.py --rehearse                              # every row in miniature on the CPU

Each loop is a process of its own. Those of a row get ready beside each other (compiling takes a minute) and are timed
one after another, alone. A figure is the median of three timed stretches. The plain loops are as good as we can write
them: channels_last, bfloat16, fused SGD, cudnn.benchmark, compiled, and the whole iteration as one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import onehour
from onehour.models.load import MODELS
from onehour.models.resnet import SmallResNet

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ("tests/test_gpu.py", "tests/data/test_loader.py")
BYTES_AN_IMAGE = 359e6
"""That ResNet-50 must move for an image of 224 pixels in bfloat16, BatchNorm, ReLU and addition in one pass."""


class Setting(NamedTuple):
    """A network, its images and minibatch."""

    model: str
    shape: tuple[int, int, int]
    minibatch: int
    per_worker: int
    precision: Literal["bf16", "float32"] = "bf16"


SETTINGS = {
    "resnet50": Setting("resnet50", (3, 224, 224), 256, 32),
    "small-64": Setting("resnet8_unstrided", (1, 28, 28), 64, 32, "float32"),
    "small-512": Setting("resnet8_unstrided", (1, 28, 28), 512, 32, "float32"),
}
LOOPS: dict[str, dict[str, Any]] = {
    "plain eager": {},
    "plain compiled": {"compile": True},
    "plain graph": {"graph": True},
    "plain compiled graph": {"compile": True, "graph": True},
    "ours": {},
    "ours compiled": {"compile": True},
    "ours without BatchNorm's groups": {"per_worker": "minibatch"},
    "ours canonical": {"reduce": "canonical"},
    "ours NCHW": {"channels_last": False},
}
ROWS = {
    "resnet50": (
        "resnet50",
        ["plain compiled graph", "plain eager", "ours", "ours without BatchNorm's groups", "ours canonical"],
    ),
    "resnet50-more": ("resnet50", ["plain graph", "plain compiled", "ours compiled", "ours NCHW"]),
    "small": ("small-64", ["plain eager", "plain graph", "ours"]),
    "large": ("small-512", ["plain eager", "plain graph", "ours"]),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resnet8_unstrided(channels: int, classes: int) -> nn.Module:
    """The network of the recipe `fashion` without a stride in its stem: four times the work."""
    return SmallResNet((16, 32, 64), channels=channels, classes=classes)


def network(name: str, channels: int) -> nn.Module:
    return (MODELS | {"resnet8_unstrided": resnet8_unstrided})[name](channels=channels, classes=10)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def rate(run: Callable[[], Any], images: int, *, repeat: int) -> float:
    """Images a second: the median of three stretches of `repeat` calls."""
    found = []
    for _ in range(3):
        synchronise()
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        synchronise()
        found.append(images * repeat / (time.perf_counter() - began))
    return statistics.median(found)


def plain(setting: Setting, options: dict[str, Any], ready: Callable[[], None], repeat: int) -> dict[str, Any]:
    """A loop as its users write it, at its best: BatchNorm over the whole minibatch, no data to load."""
    torch.backends.cudnn.benchmark = True
    model = network(setting.model, setting.shape[0]).to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = DEVICE.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=fused
    )
    images = torch.randn(setting.minibatch, *setting.shape, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (setting.minibatch,), device=DEVICE)
    forward = torch.compile(model) if options.get("compile") else model

    def iteration() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = F.cross_entropy(forward(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        iteration()
    synchronise()
    ready()
    run: Callable[[], Any] = iteration
    if options.get("graph") and DEVICE.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                iteration()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            iteration()
        run = graph.replay
    for _ in range(3):
        run()
    return {"images_per_second": rate(run, setting.minibatch, repeat=repeat)}


def ours(setting: Setting, options: dict[str, Any], ready: Callable[[], None], repeat: int) -> dict[str, Any]:
    """`onehour.train` whole, on data in device memory; epochs of `repeat` iterations, the median of the last three."""
    samples = setting.minibatch * repeat
    distinct = min(samples, 4 * setting.minibatch)
    images = torch.randn(distinct, *setting.shape).repeat(samples // distinct, 1, 1, 1)
    data = TensorDataset(images, torch.randint(0, 10, (len(images),)))
    few = TensorDataset(images[:2], torch.zeros(2, dtype=torch.long))
    per_worker = setting.minibatch if options.get("per_worker") == "minibatch" else setting.per_worker
    recipe = onehour.Recipe(
        name="benchmark",
        model="resnet50",
        minibatch=setting.minibatch,
        per_worker=per_worker,
        base_lr=0.01,
        base_minibatch=setting.minibatch,
        epochs=5,
        warmup="none",
        milestones=("4",),
        nesterov=True,
        precision=setting.precision,
        reduce=options.get("reduce", "fast"),
        compile=bool(options.get("compile")),
        channels_last=options.get("channels_last", True),
    )
    ready()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
        sys.stdout, screen = silent, sys.stdout
        try:
            run = onehour.train(
                recipe,
                classes=10,
                model=lambda: network(setting.model, setting.shape[0]),
                data=(data, few),
                device=DEVICE.type,
                out=Path(folder) / "run",
            )
        finally:
            sys.stdout = screen
        measured = [epoch["images_per_second"] for epoch in run.timing[1:]]
    return {"images_per_second": statistics.median(measured[-3:]), "epochs": measured}


def one(setting: str, loop: str, small: bool) -> None:
    """One loop in this process: prints "ready", waits for a line, measures alone, prints JSON."""
    chosen = SETTINGS[setting]
    if small:
        chosen = chosen._replace(shape=(chosen.shape[0], 32, 32), minibatch=16, per_worker=8)
    repeat = 2 if small else (24 if setting == "resnet50" else 200)

    def ready() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        print("ready", flush=True)
        sys.stdin.readline()

    torch.manual_seed(0)
    found = (plain if loop.startswith("plain") else ours)(chosen, LOOPS[loop], ready, repeat)
    if DEVICE.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(found), flush=True)


def loops(row: str, emit: Callable[..., None], small: bool, before_timing: Callable[[], None]) -> None:
    """Start a row's loops beside each other; nobody gets ready while another is timed."""
    setting, names = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for name in names:
            command = [sys.executable, __file__, "--one", setting, name, *(["--rehearse"] if small else [])]
            with Path(folder, name).open("w") as errors:
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                started.append((name, subprocess.Popen(command, text=True, **pipes)))
        for _, child in started:
            child.stdout.readline()
        before_timing()
        for name, child in started:
            said, _ = child.communicate("go\n")
            if child.returncode:
                emit(row, loop=name, error=Path(folder, name).read_text()[-600:])
            else:
                emit(row, loop=name, **json.loads(said.splitlines()[-1]))


def ceilings(emit: Callable[..., None], small: bool) -> None:
    """Bytes and multiplications a second: what nothing can exceed."""
    size, side = (2**24, 256) if small else (2**30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=DEVICE).bfloat16()
    copied = rate(lambda: target.copy_(source), 2 * size, repeat=10)
    emit("ceilings", bytes_per_second=copied, flops=rate(lambda: a @ a, 2 * len(a) ** 3, repeat=10))


def kernels(emit: Callable[..., None], small: bool) -> None:
    """BatchNorm + ReLU, with a shortcut and without, forward and backward, beside torch's; errors against float64."""
    if DEVICE.type != "cuda":
        return  # tests/rules/test_kernels.py runs them by the interpreter
    from triton.testing import do_bench

    from onehour.rules.kernels import ghost_backward, ghost_forward

    for channels, side in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
        x = torch.randn(256, channels, side, side, device=DEVICE).bfloat16().to(memory_format=torch.channels_last)
        shortcut, grad = torch.randn_like(x), torch.randn_like(x)
        gamma, beta = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
        y, found = ghost_forward(x, gamma, beta, shortcut, 32, 1e-5, True)
        rows = x[3::8].double()
        variance, mean = torch.var_mean(rows, dim=(0, 2, 3), correction=0, keepdim=True)
        exact = (rows - mean) / (variance + 1e-5).sqrt() * gamma.double()[:, None, None]
        exact = (exact + beta.double()[:, None, None] + shortcut[3::8].double()).relu()
        error = float((y[3::8].double() - exact).norm() / exact.norm())
        del rows, exact
        options = (gamma, beta)
        calls = {
            "forward": (3, ghost_forward, (x, *options, None, 32, 1e-5, True)),
            "forward with shortcut": (4, ghost_forward, (x, *options, shortcut, 32, 1e-5, True)),
            "backward": (5, ghost_backward, (grad, x, None, *options, found, 32, 1e-5, True, False)),
            "backward with shortcut": (7, ghost_backward, (grad, x, y, *options, found, 32, 1e-5, True, True)),
            "torch's forward": (5, _native, (x, *options)),
        }
        timed = {}
        for name, (moved, call, given) in calls.items():
            ms: Any = do_bench(lambda call=call, given=given: call(*given), warmup=5, rep=25, return_mode="median")
            timed[name] = {"ms": ms, "bytes_per_second": moved * x.numel() * 2 / ms * 1e3}
        emit("kernels", channels=channels, side=side, relative_error=error, **timed)


def _native(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-5), inplace=True)


class Tests:
    """Those that need a GPU, while loops get ready; in a rehearsal they are collected."""

    def __init__(self, small: bool) -> None:
        more = ["--collect-only"] if small else ["--durations=5", "-n", "4"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        self._began, self._output = time.perf_counter(), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            [*command, *more, *GPU_TESTS], stdout=self._output, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def end(self, emit: Callable[..., None]) -> None:
        """Wait for them."""
        code = self._child.wait()
        self._output.seek(0)
        said = self._output.read()
        failures = re.findall(r"^(?:FAILED|ERROR|E  ) .*", said, re.MULTILINE)
        seconds = time.perf_counter() - self._began
        emit("tests", summary=said.strip().splitlines()[-1], exit_code=code, seconds=seconds, failures=failures[:30])


def sweep(emit: Callable[..., None], small: bool) -> None:
    """Seconds for `onehour sweep digits`, all of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "onehour", "sweep", "digits", "--out", f"{folder}/sweep"]
        command += (
            ["--minibatch", "1k", "--seeds", "1", "--epochs", "1", "--warmup", "none", "--arm", "none"] if small else []
        )
        began = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=75)
            ended = {"exit_code": done.returncode, "said": done.stdout[-300:] + done.stderr[-300:]}
        except subprocess.TimeoutExpired:
            ended = {"exit_code": None}
        cells = len(list(Path(folder).glob("sweep/cells/*/summary.json")))
        emit("sweep", seconds=time.perf_counter() - began, cells=cells, **ended)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that the aims are about, of those that were measured."""
    speed = {
        (row["row"], row["loop"]): row["images_per_second"]
        for row in rows
        if "loop" in row and "images_per_second" in row
    }
    ratios = {}
    for row in ROWS:
        plains = {loop: value for (of, loop), value in speed.items() if of == row and loop.startswith("plain")}
        for (of, loop), value in speed.items():
            if of == row and loop.startswith("ours") and plains:
                ratios[f"{row}: {loop} / best plain"] = value / max(plains.values())
                if "plain eager" in plains:
                    ratios[f"{row}: {loop} / plain eager"] = value / plains["plain eager"]
    bandwidth = [row["bytes_per_second"] for row in rows if row["row"] == "ceilings"]
    if bandwidth and ("resnet50", "ours") in speed:
        ratios["resnet50: ours / memory floor"] = speed["resnet50", "ours"] * BYTES_AN_IMAGE / bandwidth[0]
    return ratios


def machine() -> dict[str, Any]:
    """The card and the versions."""
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def collect(path: Path) -> None:
    """Write the result of what a machine with a GPU has measured."""
    from results import write  # which asks git

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write(__file__, "gpu", {"rows": rows, "ratios": summary(rows)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="tests,resnet50,ceilings,small,kernels,sweep,large,resnet50-more")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(*given.one, small=given.rehearse)
    elif given.collect:
        collect(given.collect)
    elif DEVICE.type == "cpu" and not given.rehearse:
        raise SystemExit("torch sees no GPU here; --rehearse runs every row in miniature on the CPU")
    else:
        measure(given.rows.split(","), given.out / "gpu.jsonl", given.rehearse)


def measure(names: list[str], path: Path, small: bool) -> None:
    began, rows = time.perf_counter(), []

    def emit(row: str, **found: Any) -> None:
        rows.append({"row": row, **found, "at_second": round(time.perf_counter() - began)})
        print(json.dumps(rows[-1]), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    emit("machine", **machine())
    running = [Tests(small)] if "tests" in names else []

    def before_timing() -> None:
        while running:
            running.pop().end(emit)

    for name in names:
        if name in ROWS:
            loops(name, emit, small, before_timing)
        elif name != "tests":
            before_timing()
            {"ceilings": ceilings, "kernels": kernels, "sweep": sweep}[name](emit, small)
    before_timing()
    print(json.dumps(summary(rows), indent=2))


if __name__ == "__main__":
    main()
