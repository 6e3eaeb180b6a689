"""What p = 1, 2 and 4 processes do. Started once by conftest.py; the tests compare what then lies in their folders."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import tinytask
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Subset, TensorDataset

from onehour import Recipe, SampleStream, parameter_groups
from onehour import recipe as named
from onehour.cli import main
from onehour.data.digits import digits
from onehour.data.loader import Feed
from onehour.data.sources import Data, complete
from onehour.dist.group import Group, joined
from onehour.entry import asked_for
from onehour.execution import Execution
from onehour.models.load import load_model
from onehour.training.build import build_model
from onehour.training.evaluate import evaluate
from onehour.training.loop import train_run
from onehour.training.record import NonFiniteError, StoppedError
from onehour.training.state import digest_of, model_state
from onehour.training.statistics import Recalibration

STEPS = 20
EXACT: dict[str, Any] = {"precision": "float64", "base_lr": 0.1, "base_minibatch": 16, "warmup_epochs": 1}
SMALL: dict[str, Any] = {"base_lr": 0.05, "base_minibatch": 32, "warmup": "none"}
"""float32 is chaotic at large rates; .05 is where 20 steps stay below 1e-5 (design/measured.md)."""
K2, K4, K5 = ({"minibatch": 8 * k, "epochs": 8 * k * STEPS // 160} for k in (2, 4, 5))
SHORT = K4 | {"epochs": 2}

BEYOND: dict[str, Any] = {"reduce": "canonical", "clip_norm": 0.5, "ema": 0.9, "freeze": ("conv1.*", "bn1.*")}
BEYOND["layer_rates"] = ("fc.*=0.1",)
"""Fields beyond the paper's."""

RUNS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "k4-together": (EXACT | K4, 4, (1, 2, 4)),
    "k5-together": (EXACT | K5, 5, (1, 2)),
    "k5-apart": (EXACT | K5, 1, (1, 2)),
    "beyond": (SMALL | SHORT | BEYOND, 1, (1, 2)),
    "muon": (SMALL | SHORT | {"reduce": "canonical", "optimizer": "muon", "scaling": "fixed"}, 1, (1, 2)),
    "ramp": (SMALL | SHORT | BEYOND | {"ramp": ("16:3/2",)}, 1, (1, 2)),
    "adascale": (SMALL | SHORT | {"reduce": "canonical", "scaling": "adascale", "base_minibatch": 8}, 1, (1, 2)),
    "k2": (EXACT | K2, 1, (1, 2)),
    "float32": (SMALL | K4, 4, (1, 2, 4)),
    "start": (EXACT | K2 | {"init": "start.safetensors", "validation": 0.2}, 1, (1, 2)),
    # One iteration without decay: the velocity that it leaves is the gradient.
    "gradient": (SMALL | {"minibatch": 32, "epochs": 1, "weight_decay": 0.0, "samples": 32}, 4, (1, 2, 4)),
}
"""The recipe's changes, workers a pass, and the numbers of processes that run it."""

STOPPED = ("beyond", "adascale")
"""Of those that go beyond the paper's fields, which are stopped too."""

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
EXAMPLES = ("segmentation", "regression", "pairs", "characters")
ONE: dict[str, Any] = {"epochs": 2, "warmup_epochs": 1, "milestones": ("1.5",)}
SIZES = (1001, 100)
"""Validation samples: four chunks, the last one short; and fewer than a chunk, so that some processes have none."""


def sources(samples: int = 160, validation: int = 100) -> tuple[TensorDataset, TensorDataset]:
    """The first digits."""
    train, test = digits()
    return TensorDataset(*train[:samples]), TensorDataset(*test[:validation])


def run(group: Group, folder: Path, name: str, *, as_name: str = "", **options: Any) -> None:
    changes, together, _ = RUNS[name]
    common = {"per_worker": 8, "zero_gamma": False, "samples": 160, "milestones": ("3", "4")}
    recipe = named("digits", **(common | changes))
    given = sources(recipe.samples or 160)
    recipe, data = complete(recipe, given[0] if recipe.validation else given)
    execution = Execution(processes=group.size, workers_per_pass=together, out=folder / (as_name or name))
    train_run(recipe, data, execution, group, **options)


def tell(group: Group, folder: Path, name: str, said: Any) -> None:
    (folder / f"{name}-{group.rank}.json").write_text(json.dumps(said))


def act(group: Group, folder: Path) -> None:
    for name, (_, _, sizes) in RUNS.items():
        if group.size in sizes:
            run(group, folder, name)
    evaluations(group, folder)
    recalibrated(group, folder)
    sometimes_used(group, folder)
    if group.size == 2:
        ddp(group, folder)
        sharded(group, folder)
        stop_and_resume(group, folder)
        not_finite(group, folder)
        exchange(group, folder)


def tasks(group: Group, folder: Path) -> None:
    """The examples' tasks: five workers whose counts differ, 20 iterations in float64."""
    sys.path.append(str(TASKS))
    for name in EXAMPLES:
        mine, given = importlib.import_module(name), Recipe.from_toml(TASKS / f"{name}.toml")
        recipe = asked_for(given, trust=True).replace(samples=400, precision="float64", **ONE)
        recipe, data = complete(recipe, tuple(Subset(side, range(400)) for side in mine.data()[:1] * 2))
        torch.manual_seed(0)
        model = mine.Model() if name == "characters" else mine.net()
        if group.rank == 0:
            torch.save(model.state_dict(), folder / f"{name}-start.pt")
        execution = Execution(processes=group.size, out=folder / name, loaders=0)
        train_run(recipe, data, execution, group, model=model)


def evaluations(group: Group, folder: Path) -> None:
    """The same weights on every number of processes: bits, from tensors and from a data set of someone's own."""
    recipe, data = complete(named("digits", zero_gamma=False))
    model = build_model(recipe, data, torch.device("cpu"))
    model.train()
    model(data.train.tensors[0][:64])
    said = {}
    for samples in SIZES:
        some = TensorDataset(*data.validation[:samples])
        for kind, dataset in (("tensors", some), ("listed", tinytask.Listed(some))):
            feed = Feed(dataset, seed=0, loaders=0, device=group.device)
            (result,) = evaluate(model, feed, recipe, group=group)
            said[f"{kind} {samples}"] = [result.errors, result.samples, result.loss.hex()]
    tell(group, folder, "evaluations", said)


def recalibrated(group: Group, folder: Path) -> None:
    """Statistics of 1,000 images in 125 workers: four passes, the last one smaller."""
    recipe, data = complete(named("digits", zero_gamma=False, per_worker=8))
    model = build_model(recipe, data, torch.device("cpu"))
    Recalibration(model, recipe, data, images=1000, group=group, loaders=0).apply()
    if group.rank == 0:
        save_file(model_state(model), folder / "recalibrated.safetensors")


def sometimes_used(group: Group, folder: Path) -> None:
    """One marked image, in the share of worker 1 at iteration 2; the values of both parameters at every iteration."""
    recipe = tinytask.recipe(epochs=1, weight_decay=0.1, precision="float64")
    train, validation = tinytask.data()
    train.tensors[0][of_worker(recipe, iteration=2, worker=1), 0, 0, 0] = tinytask.Branching.MARK
    torch.manual_seed(0)
    model = tinytask.Branching()
    seen = []

    def look() -> bool:
        seen.append([model.sometimes.tolist(), model.never.tolist()])
        return False

    execution = Execution(processes=group.size, workers_per_pass=1, out=folder / "branching")
    if group.size <= 2:
        train_run(*complete(recipe, (train, validation)), execution, group, model=model, stop_asked=look)
        look()
        tell(group, folder, "branching", seen)


def of_worker(recipe: Recipe, *, iteration: int, worker: int) -> int:
    """A sample that this worker takes in this iteration."""
    stream = SampleStream(samples=tinytask.SAMPLES, minibatch=recipe.workers, seed=recipe.seed)
    return int(stream.indices(iteration, worker)[0])


def ddp(group: Group, folder: Path) -> None:
    """The same iterations in torch's own data parallelism: plain BatchNorm, a process a worker, a scaled sum loss."""
    recipe, data = complete(Recipe.from_toml(folder / "k2" / "recipe.toml"), sources())
    plain = start_of(recipe, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(plain, broadcast_buffers=False)
    groups = parameter_groups(plain, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
    stream = SampleStream(samples=len(data.train), minibatch=recipe.workers, seed=recipe.seed)
    for iteration in range(STEPS):
        images, labels = data.train[torch.from_numpy(stream.indices(iteration, worker=group.rank))]
        for part in optimizer.param_groups:
            part["lr"] = recipe.schedule(iteration * recipe.minibatch / len(data.train))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.double()), labels, reduction="sum")
        (loss * group.size / recipe.minibatch).backward()
        optimizer.step()
    # Each process has moved its own statistics; ours move by the workers' mean, and averaging is linear.
    for buffer in (b for b in plain.buffers() if b.is_floating_point()):
        group.sum(buffer).div_(group.size)
    if group.rank == 0:
        velocity = {f"{n}/momentum_buffer": optimizer.state[p]["momentum_buffer"] for n, p in plain.named_parameters()}
        save_file(model_state(plain), folder / "ddp-model.safetensors")
        save_file(velocity, folder / "ddp-optimizer.safetensors")


def sharded(group: Group, folder: Path) -> None:
    """The example with `fully_shard`, in float64: its whole weights, the samples of this process and their rates."""
    sys.path.append(str(TASKS.parent))
    mine = importlib.import_module("sharded_adamw")
    torch.manual_seed(0)
    net, (features, labels) = mine.network().double(), mine.random_data().tensors
    samples, rates = [], []

    class Noted(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            samples.append(index)
            return super().__getitem__(index)

    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: rates.append([part["lr"] for part in optimizer.param_groups])
    )
    mine.train(net, Noted(features.double(), labels))
    hook.remove()
    weights = {name: parameter.full_tensor() for name, parameter in net.named_parameters()}
    torch.save({"weights": weights, "samples": samples, "rates": rates}, folder / f"sharded-{group.rank}.pt")


def start_of(recipe: Recipe, data: Data) -> nn.Module:
    """A plain model in float64 with the run's initial weights."""
    plain = load_model(recipe.model, channels=data.channels, classes=recipe.classes).double()
    plain.load_state_dict(build_model(recipe, data, torch.device("cpu")).state_dict())
    return plain


def stop_and_resume(group: Group, folder: Path) -> None:
    """The last process alone is asked to stop in mid-epoch; the copy is for others to go on with."""
    for name in ("float32", "k4-together", *STOPPED):
        calls = []
        asked = group.rank == group.size - 1
        try:
            run(
                group,
                folder,
                name,
                as_name=f"stopped-{name}",
                stop_asked=lambda calls=calls, asked=asked: calls.append(1) or (asked and len(calls) == 8),
            )
        except StoppedError as error:
            tell(group, folder, f"stopped-{name}", str(error))
        if group.rank == 0:
            shutil.copytree(folder / f"stopped-{name}", folder / f"copy-{name}")
        run(group, folder, name, as_name=f"stopped-{name}")


def not_finite(group: Group, folder: Path) -> None:
    """A pixel whose square is infinite for worker 1 at iteration 3; the state of every process at every iteration."""
    recipe = tinytask.recipe(epochs=1)
    train, validation = tinytask.data()
    train.tensors[0][of_worker(recipe, iteration=3, worker=1), 0, 0, 0] = tinytask.HUGE
    torch.manual_seed(0)
    model = tinytask.net()
    seen, said = [], ""

    def look() -> bool:
        seen.append(digest_of(model_state(model)))
        return False

    execution = Execution(processes=2, workers_per_pass=1, save_every=1, out=folder / "not-finite")
    try:
        train_run(*complete(recipe, (train, validation)), execution, group, model=model, stop_asked=look)
    except NonFiniteError as error:
        said = str(error)
    look()
    tell(group, folder, "not-finite", {"seen": seen, "said": said})


def exchange(group: Group, folder: Path) -> None:
    payloads = (None, b"", b"\x00state" * 1000)
    heard = [group.broadcast(payload if group.rank == 0 else None) for payload in payloads]
    total = group.sum(torch.tensor([group.rank + 1.0, 10.0])).tolist()
    tell(group, folder, "exchange", [heard == list(payloads), total])


def commands(folder: Path, ports: list[str]) -> None:
    """The command line in processes that torchrun, or anyone, has started."""
    out = folder / "launched"
    commands = {
        "first": ["train", "digits", *tinytask.FLAGS, "--out", str(out)],
        "again": ["train", "digits", *tinytask.FLAGS, "--out", str(out)],
        "not finite": ["train", "digits", *tinytask.FLAGS, "--data", "tinytask:poisoned", "--out", f"{out}-poisoned"],
    }
    codes = {}
    for port, (name, arguments) in zip(ports, commands.items(), strict=True):
        os.environ["MASTER_PORT"] = port
        codes[name] = [main(arguments), (out / "metrics.jsonl").stat().st_mtime_ns]
    (folder / f"commands-{os.environ['RANK']}.json").write_text(json.dumps(codes))


def live(folder: Path, rank: int, processes: int, ports: list[str]) -> None:
    """The life of one process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    with joined("cpu") as group:
        if processes <= 3:
            tasks(group, folder)
        if processes != 3:
            act(group, folder)
    if processes == 2:
        commands(folder, ports[1:])


def begin(folder: Path, rank: int, processes: int, ports: list[str]) -> int:
    """Fork a process, so that torch is imported once for all; what it prints goes to a file."""
    number = os.fork()
    if number:
        return number
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        live(folder, rank, processes, ports)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world(folder: Path, processes: int, ports: list[str]) -> int:
    """Start p processes and wait; where one fails, end the others, which would wait for it."""
    folder.mkdir()
    numbers = [begin(folder, rank, processes, ports) for rank in range(processes)]
    for _ in range(processes):
        ended, status = os.wait()
        numbers.remove(ended)
        if status:
            for number in numbers:
                os.kill(number, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    base, *all_ports = sys.argv[1:]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    save_file(load_model("resnet8", channels=1, classes=7).state_dict(), "start.safetensors")
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # newer Pythons'; no thread runs
    failed = [world(Path(base) / f"world-{p}", p, all_ports) for p in (1, 2, 3, 4)]
    sys.exit(any(failed))
