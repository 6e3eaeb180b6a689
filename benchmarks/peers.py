"""onehour's trainer beside what people would write or take in its place: CPU time and the clock, interleaved.

    make .venv-frameworks/.ready
    .venv-frameworks/bin/python benchmarks/peers.py [--rounds 9 | --rehearse] [--minutes 240] [--cases …] [--sides …]
                                                    [--processes 1,2] [--against SRC]

A round measures every case on every side, each in a fresh process (two, under Gloo, for p = 2), from the third
iteration to the last: neither evaluations nor saves are in it. What saves cost is in checkpoint.py. A ratio is
bare / side, of one round, so 1 is as fast as the bare loop and above 1 faster; its interval is the median's, from the
order of the rounds, with at least 95 %. A side whose package is not installed is named in the results. With --against,
the src of another state of this repository, its trainer is a side too, "earlier". Writes results/peers.json after every
round; rows of other cases and processes stay as they are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import onehour
from onehour.models.load import MODELS
from processes import measured
from results import RESULTS, made_by, write

LEFT_OUT, REHEARSED = 2, 5
"""Iterations at the beginning; all of a rehearsal."""
SIZES = {"resnet8": (8192, 1, 8), "resnet50": (64, 3, 224)}
"""Images, channels and pixels of a side."""


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        per_worker: n of ours; None takes all samples of a process, as the peers do.
        iterations: that are measured, and those before them.
    """

    model: str
    minibatch: int
    iterations: int
    bf16: bool = False
    per_worker: int | None = None


CASES = {
    "digits-32": Case("resnet8", 32, 800),
    "digits-32-groups-of-16": Case("resnet8", 32, 800, per_worker=16),
    "digits-512": Case("resnet8", 512, 160),
    "digits-512-groups-of-16": Case("resnet8", 512, 160, per_worker=16),
    "resnet50": Case("resnet50", 8, 8),
    "resnet50-bf16": Case("resnet50", 8, 8, bf16=True),
}
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


@dataclass
class Watch:
    """The clock and the CPU time at the beginning of every iteration."""

    ticks: list[tuple[float, float]] = field(default_factory=list)

    def tick(self) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> tuple[float, float]:
        """An iteration by the clock and by CPU time."""
        (wall, cpu), (wall_end, cpu_end) = self.ticks[LEFT_OUT], self.ticks[-1]
        count = len(self.ticks) - LEFT_OUT - 1
        return (wall_end - wall) / count, (cpu_end - cpu) / count


@dataclass(frozen=True)
class Task:
    """A case, with its images."""

    case: Case
    images: Tensor
    labels: Tensor

    @property
    def share(self) -> int:
        return self.case.minibatch // PROCESSES

    def model(self) -> nn.Module:
        return MODELS[self.case.model](channels=self.images.shape[1], classes=10)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.bf16):
            return F.cross_entropy(model(images), labels)

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """As many as there are iterations, epoch after epoch."""
        left = self.case.iterations
        while left:
            for batch in loader:
                yield batch
                left -= 1
                if not left:
                    return

    def loader(self, *, divided: bool) -> DataLoader[Any]:
        """As people write it.

        Args:
            divided: among the processes; some frameworks do it themselves.
        """
        dataset = TensorDataset(self.images, self.labels)
        sampler = DistributedSampler(dataset) if divided and PROCESSES > 1 else None
        return DataLoader(dataset, self.share, shuffle=sampler is None, sampler=sampler, drop_last=True)


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True)


def on_all_processes(model: nn.Module) -> nn.Module:
    if PROCESSES == 1:
        return model
    dist.init_process_group("gloo")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def bare(task: Task, watch: Watch) -> None:
    """The loop that a user would write: plain BatchNorm2d, foreach SGD, images in memory, DDP for two."""
    model = on_all_processes(task.model())
    optimizer = optimizer_of(model)
    losses = torch.zeros(())
    minibatch, share = task.case.minibatch, task.share
    order, start = torch.randperm(len(task.images)), 0
    for _ in range(task.case.iterations):
        watch.tick()
        if start + minibatch > len(order):
            order, start = torch.randperm(len(task.images)), 0
        chosen = order[start + RANK * share : start + (RANK + 1) * share]
        start += minibatch
        loss = task.loss(model, task.images[chosen], task.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.detach()


def dataloader(task: Task, watch: Watch) -> None:
    """The same with torch's DataLoader."""
    model = on_all_processes(task.model())
    optimizer = optimizer_of(model)
    for images, labels in task.batches(task.loader(divided=True)):
        watch.tick()
        optimizer.zero_grad()
        task.loss(model, images, labels).backward()
        optimizer.step()


def timm_shaped(task: Task, watch: Watch) -> None:
    """An epoch as timm's train.py has it: a mean of the losses, a rate for every update, a line now and then."""
    model = on_all_processes(task.model())
    optimizer = optimizer_of(model)
    total = seen = 0.0
    for update, (images, labels) in enumerate(task.batches(task.loader(divided=True))):
        watch.tick()
        loss = task.loss(model, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, seen = total + loss.item() * len(images), seen + len(images)
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * (1 + math.cos(math.pi * update / task.case.iterations))
        if update % 50 == 0:
            print(f"Train: {update} Loss: {total / seen:.3f} LR: {optimizer.param_groups[0]['lr']:.3e}")


def accelerate(task: Task, watch: Watch) -> None:
    """Accelerate's loop."""
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task.case.bf16 else "no")
    plain = task.model()
    model, optimizer, loader = accelerator.prepare(plain, optimizer_of(plain), task.loader(divided=False))
    for images, labels in task.batches(loader):
        watch.tick()
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()


def lightning(task: Task, watch: Watch) -> None:
    """Lightning's Trainer, with nothing that it need not do."""
    from lightning import LightningModule, Trainer  # pyright: ignore[reportMissingImports]

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def training_step(self, batch: Any, number: int) -> Tensor:
            watch.tick()
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model)

    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto",
        precision="bf16-mixed" if task.case.bf16 else "32-true",
        max_steps=task.case.iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), task.loader(divided=False))


class Rows(Dataset[Any]):
    """As Transformers expects samples."""

    def __init__(self, task: Task) -> None:
        self.images, self.labels = task.images, task.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def transformers(task: Task, watch: Watch) -> None:
    """The Hugging Face Trainer, with nothing that it need not do."""
    from transformers import Trainer, TrainingArguments  # pyright: ignore[reportMissingImports]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            watch.tick()
            return {"loss": F.cross_entropy(self.model(images), labels)}

    model = Model()
    optimizer = optimizer_of(model)
    options = TrainingArguments(
        output_dir=os.environ["BENCH_OUT"],
        use_cpu=True,
        bf16=task.case.bf16,
        max_steps=task.case.iterations,
        per_device_train_batch_size=task.share,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    Trainer(model=model, args=options, train_dataset=Rows(task), optimizers=(optimizer, constant)).train()


def ours(task: Task, watch: Watch) -> None:
    """The whole of onehour.train: stream, ghost BatchNorm, the look for what is not finite, record."""

    def stop_asked() -> bool:
        watch.tick()
        return False

    case, samples = task.case, task.case.iterations * task.case.minibatch
    rows = torch.arange(samples) % len(task.images)
    onehour.train(
        onehour.Recipe(
            name="bench",
            model=case.model,
            minibatch=case.minibatch,
            per_worker=case.per_worker or task.share,
            base_lr=0.01,
            base_minibatch=case.minibatch,
            epochs=1,
            warmup="none",
            precision="bf16" if case.bf16 else "float32",
        ),
        classes=10,
        data=(TensorDataset(task.images[rows], task.labels[rows]), TensorDataset(task.images[:2], task.labels[:2])),
        out=Path(os.environ["BENCH_OUT"]) / "run",
        stop_asked=stop_asked,
    )


Side = Callable[[Task, Watch], None]
SIDES: dict[str, Side] = {
    each.__name__: each for each in (bare, ours, dataloader, timm_shaped, accelerate, lightning, transformers)
}
PACKAGES = ("accelerate", "lightning", "transformers")
"""Sides that need the package of their name."""


def child(name: str, side: str, iterations: int) -> None:
    """One measurement in this process; prints JSON."""
    case = dataclasses.replace(CASES[name], iterations=iterations)
    torch.set_num_threads(threads_of(case, PROCESSES))
    torch.manual_seed(0)
    samples, channels, size = SIZES[case.model]
    task = Task(case, torch.randn(samples, channels, size, size), torch.randint(0, 10, (samples,)))
    watch = Watch()
    SIDES[side](task, watch)
    assert len(watch.ticks) == iterations
    wall, cpu = watch.seconds()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print()  # some leave a line open
    print(json.dumps({"wall": wall, "cpu": cpu, "memory": memory}), flush=True)
    os._exit(0)  # Gloo's threads may abort a process that shuts down


def measure(name: str, side: str, processes: int, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in fresh processes; process 0's numbers."""
    case, older = CASES[name], side == "earlier"
    arguments = ("--child", name, "ours" if older else side, str(REHEARSED if options.rehearse else case.iterations))
    environment = {"PYTHONPATH": str(options.against.resolve())} if older else {}
    threads = threads_of(case, processes)
    with tempfile.TemporaryDirectory() as folder:
        return measured(__file__, *arguments, processes=processes, threads=threads, BENCH_OUT=folder, **environment)


def threads_of(case: Case, processes: int) -> int:
    return 2 if case.model == "resnet50" and processes == 1 else 1


def interval(values: list[float]) -> tuple[float, float] | None:
    """Between which values the median lies with at least 95 %, whatever they are spread like; None of under six."""
    n, outside, rank = len(values), 0.0, 0
    while outside + math.comb(n, rank) / 2**n <= 0.025:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    ordered = sorted(values)
    return (ordered[rank - 1], ordered[n - rank]) if rank else None


def compared(rounds: list[dict[str, float]], others: list[dict[str, float]], what: str) -> dict[str, Any]:
    """How many times as fast the first are; of memory, how many times as much they take."""
    pairs = zip(rounds, others, strict=True)
    ratios = [a[what] / b[what] if what == "memory" else b[what] / a[what] for a, b in pairs]
    bounds = interval(ratios)
    return {"median": round(statistics.median(ratios), 3), "interval": bounds and [round(bound, 3) for bound in bounds]}


def row_of(case: str, processes: int, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What the rounds of a case say."""
    sides = {
        side: {what: compared(rounds, found["bare"], what) for what in ("cpu", "wall", "memory")}
        | {
            "images_per_cpu_second": round(
                CASES[case].minibatch / processes / statistics.median(r["cpu"] for r in rounds)
            )
        }
        for side, rounds in found.items()
    }
    ahead = {side: compared(found["ours"], rounds, "cpu") for side, rounds in found.items() if side != "ours"}
    rounds = len(found["bare"])
    row = {"case": case, "processes": processes, "rounds": rounds, "sides": sides, "ours_against": ahead}
    return row | made_by()


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised, and whether it holds."""

    def claim(text: str, bound: float, values: list[float]) -> dict[str, Any]:
        measured = min(values, default=math.inf)
        return {"claim": text, "relation": "≥", "bound": bound, "measured": measured, "holds": measured >= bound}

    def ratios(case: str, what: str) -> list[float]:
        return [row["sides"]["ours"][what]["median"] for row in rows if row["case"] == case]

    peers = [
        each["median"]
        for row in rows
        if CASES[row["case"]].per_worker is None
        for side, each in row["ours_against"].items()
        if side not in ("bare", "earlier")
    ]
    found = [
        ("the slowest row against its fastest peer, CPU time", 1.0, peers),
        ("digits at 32 against the bare loop, CPU time", 1.0, ratios("digits-32", "cpu")),
        ("digits at 32 in groups of 16 against the bare loop, CPU time", 0.85, ratios("digits-32-groups-of-16", "cpu")),
        ("ResNet-50 against the bare loop, clock", 0.99, ratios("resnet50", "wall")),
    ]
    return [claim(*each) for each in found if each[2]]


def main() -> None:
    """Measure round after round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round that would end later")
    parser.add_argument("--rehearse", action="store_true", help="a few iterations of each, which measure nothing")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--sides", default=",".join(SIDES), help="of the peers; bare and ours are always measured")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument(
        "--against", type=Path, metavar="SRC", help="src of an older state, whose trainer is a side too"
    )
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], options.child[1], int(options.child[2]))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    asked = ["bare", "ours", *(side for side in options.sides.split(",") if side not in ("bare", "ours", *missing))]
    cells = [(case, int(p)) for case in options.cases.split(",") for p in options.processes.split(",")]
    found: dict[tuple[str, int], dict[str, list[dict[str, float]]]] = {cell: {} for cell in cells}
    path = RESULTS / "peers.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() and not options.rehearse else []
    began = time.monotonic()
    for number in range(1 if options.rehearse else options.rounds):
        for case, processes in cells:
            sides = asked if CASES[case].per_worker is None else asked[:2]
            sides = [*sides, *(["earlier"] if options.against else [])]
            turned = sides[number % len(sides) :] + sides[: number % len(sides)]
            for side in turned if number % 2 else reversed(turned):
                found[case, processes].setdefault(side, []).append(measure(case, side, processes, options))
        rows = {(row["case"], row["processes"]): row for row in known}
        rows |= {(case, processes): row_of(case, processes, found[case, processes]) for case, processes in cells}
        rows = sorted(rows.values(), key=lambda row: ([*CASES].index(row["case"]), row["processes"]))
        write(__file__, "peers", {"not_installed": missing, "rows": rows, "claims": claims_of(rows)})
        minutes = (time.monotonic() - began) / 60
        print(f"round {number + 1} of {options.rounds} after {minutes:.0f} minutes", flush=True)
        if minutes * (number + 2) / (number + 1) > options.minutes:
            break
    return None


if __name__ == "__main__":
    main()
