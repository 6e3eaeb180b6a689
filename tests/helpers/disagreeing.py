"""Two hosts that are about to train something else: one difference a case, all cases in one start of two processes.

    python disagreeing.py FOLDER PORT…

Host r works in FOLDER/host-r and writes what it heard to FOLDER/heard-r.json. Modules of a case have names of its own,
since Python imports a name once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import images
import numpy
import tinytask
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onehour
from onehour import train

FIELDS: dict[str, tuple[Any, Any]] = {
    "name": ("mine", "yours"),
    "seed": (0, 7),
    "epochs": (2, 3),
    "minibatch": (8, 16),
    "per_worker": (4, 2),
    "base_lr": (0.125, 0.25),
    "base_minibatch": (8, 4),
    "scaling": ("linear", "sqrt"),
    "momentum": (0.9, 0.8),
    "nesterov": (True, False),
    "weight_decay": (0.0001, 0.0),
    "optimizer": ("sgd", "rmsprop"),
    "decay": ("step", "cosine"),
    "milestones": (("1",), ("3/2",)),
    "decay_factor": (0.1, 0.2),
    "warmup": ("gradual", "none"),
    "warmup_epochs": (1, 2),
    "zero_gamma": (True, False),
    "reduce": ("fast", "canonical"),
    "canonical_threads": (1, 2),
    "canonical_pass": (2, 4),
    "precision": ("float32", "float64"),
    "channels_last": (False, True),
    "compile": (False, True),
    "classes": (3, 4),
    "model": ("tinytask:net", "resnet8"),
    "data": ("tinytask:data", "tinytask:listed"),
    "pitfall": ("not given", "decay-on-batchnorm"),
}
"""A recipe's fields, and a value on each host."""
MET = ("seed", "base_lr", "milestones", "nesterov", "data", "pitfall")
"""Those over which two hosts meet: whole numbers, others, several, flags, names, and what is not given."""


class Host:
    """One of the two.

    Args:
        rank: its process's.
        case: the name of the modules that it writes.
    """

    def __init__(self, rank: int, case: str) -> None:
        self.second, self.case = rank == 1, case

    def module(self, text: str, suffix: str = "") -> str:
        """Write a module of this case."""
        name = f"case_{self.case}{suffix}"
        Path(f"{name}.py").write_text(text)
        return name

    def pick(self, first: Any, second: Any) -> Any:
        return second if self.second else first

    @property
    def comment(self) -> str:
        """That makes another file of the same module."""
        return self.pick("", "  # another")

    def knob(self, text: str) -> str:
        """Write a module that is the same on both hosts, with a number from the environment, which is not."""
        os.environ["KNOB"] = self.pick("0.25", "0.75")
        return self.module(f"import os\nimport torch\nfrom torch import nn\nknob = float(os.environ['KNOB'])\n{text}")

    def net(self) -> Any:
        torch.manual_seed(0)
        return tinytask.net()

    def old(self, module: Any) -> dict[str, Any]:
        if self.second:
            vars(module)["__version__"] = "0.0.1"
        return {}


Plant = Callable[[Host], dict[str, Any]]
CASES: dict[str, tuple[Plant, tuple[str, ...]]] = {}
"""What host 0 and host 1 are about to train, as options of `train`, and what the message must hold."""


def case(*parts: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        CASES[plant.__name__] = plant, parts
        return plant

    return add


@case("all training labels", "int64 (48,)")
def one_label(host: Host) -> dict[str, Any]:
    train, validation = tinytask.data()
    train.tensors[1][17] += host.second
    return {"data": (train, validation)}


@case("all validation images", "float32 (20, 1, 4, 4)")
def one_byte(host: Host) -> dict[str, Any]:
    train, validation = tinytask.data()
    validation.tensors[0].view(torch.uint8).view(-1)[99] ^= host.second
    return {"data": (train, validation)}


@case("the label of training sample", "is 0 on process 0 (host0) and 2 on process 1 (host1)")
def labels_read_one_by_one(host: Host) -> dict[str, Any]:
    train, validation = tinytask.listed()
    labels = train.tensors.tensors[1]
    labels.copy_(host.pick(labels, labels.flip(0)))
    return {"data": (train, validation)}


@case("the image of training sample", "float32 (1, 4, 4)")
def images_read_one_by_one(host: Host) -> dict[str, Any]:
    train, validation = tinytask.listed()
    train.tensors.tensors[0][:, 0, 3, 3] += host.pick(0.0, 0.001)
    return {"data": (train, validation)}


@case("the label of training sample 18 is 0 on process 0 (host0) and 2 on process 1 (host1)", "more of the samples")
def order(host: Host) -> dict[str, Any]:
    train, validation = tinytask.data()
    turned = [tensor.flip(0) for tensor in train.tensors]
    return {"data": (TensorDataset(*host.pick(train.tensors, turned)), validation)}


@case("training samples is 48", "40")
def samples(host: Host) -> dict[str, Any]:
    train, validation = tinytask.data()
    return {"data": (TensorDataset(*train[: host.pick(48, 40)]), validation)}


@case("validation samples is 20", "19")
def validation_samples(host: Host) -> dict[str, Any]:
    train, validation = tinytask.data()
    return {"data": (train, TensorDataset(*validation[: host.pick(20, 19)]))}


@case("float32", "float64")
def type_of_images(host: Host) -> dict[str, Any]:
    kind = host.pick(torch.float32, torch.float64)
    sides = [TensorDataset(side.tensors[0].to(kind), side.tensors[1]) for side in tinytask.data()]
    return {"data": sides, "precision": "float64"}


@case("all training images", "all validation images")
def drawn_without_a_seed(host: Host) -> dict[str, Any]:
    torch.manual_seed(host.pick(1, 2))
    return {"data": [TensorDataset(torch.rand(48, 1, 4, 4), torch.arange(48) % 3) for _ in "ab"]}


@case("base_lr is 0.125", "0.375")
def toml(host: Host) -> dict[str, Any]:
    Path("mine.toml").write_text(tinytask.recipe(base_lr=host.pick(0.125, 0.375)).to_toml())
    return {"recipe": "mine.toml", "trust": True}


@case("the source of case_source_of_data is", "process 1")
def source_of_data(host: Host) -> dict[str, Any]:
    return {"data": host.module(f"from tinytask import data{host.comment}") + ":data"}


@case("the source of case_source_beside_data_beside is", "process 1")
def source_beside_data(host: Host) -> dict[str, Any]:
    beside = host.module(f"from tinytask import data{host.comment}", "_beside")
    return {"data": host.module(f"from {beside} import data") + ":data"}


@case("the source of case_source_of_model is", "process 1")
def source_of_model(host: Host) -> dict[str, Any]:
    return {"model": host.module(f"from tinytask import net{host.comment}") + ":net"}


@case("the source of case_source_of_object is", "process 1")
def source_of_object(host: Host) -> dict[str, Any]:
    """The network is torch's own, a layer in it someone's."""
    layer = host.module(f"from torch import nn\nclass Flat(nn.Flatten): pass{host.comment}")
    return {"model": lambda: nn.Sequential(importlib.import_module(layer).Flat(), nn.Linear(16, 3))}


@case("the source of case_source_of_optimizer is", "process 1")
def source_of_optimizer(host: Host) -> dict[str, Any]:
    return {"optimizer": host.module(f"import torch\nclass Mine(torch.optim.SGD): pass{host.comment}") + ":Mine"}


@case("the source of case_source_of_logger is", "process 1")
def source_of_logger(host: Host) -> dict[str, Any]:
    text = f"class Mine:\n    def start(self, *a): pass{host.comment}\n    log = finish = start"
    return {"log": host.module(text) + ":Mine"}


@case("the source of case_source_of_transform is", "process 1")
def source_of_transform(host: Host) -> dict[str, Any]:
    transform = host.module(f"from images import noisy{host.comment}") + ":noisy"
    images.tree(Path("few"), train=8, val=2)
    return {"data": "few", "image_size": 8, "train_transform": transform}


@case("the initial 0.weight", "seed before the model is built")
def weights_without_a_seed(host: Host) -> dict[str, Any]:
    torch.manual_seed(host.pick(1, 2))
    return {"model": tinytask.net()}


@case("the initial 4.weight", "float32 (3, 16)")
def initial_weights(host: Host) -> dict[str, Any]:
    net = host.net()
    with torch.no_grad():
        net[4].weight *= host.pick(1.0, 2.0)
    return {"model": net}


@case("(4, 1, 3, 3)", "(5, 1, 3, 3)")
def width(host: Host) -> dict[str, Any]:
    width = host.pick(4, 5)
    return {"model": lambda: nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(4 * width, 3))}


@case("the initial 0.weight", "not trained")
def frozen(host: Host) -> dict[str, Any]:
    net = host.net()
    net[0].requires_grad_(not host.second)
    return {"model": net}


@case("the initial 1.running_mean", "float32 (4,)")
def statistics(host: Host) -> dict[str, Any]:
    net = host.net()
    net[1].running_mean.fill_(host.pick(0.0, 0.5))
    return {"model": net}


@case("scale of the model is 1.5", "2.5")
def a_number_of_the_model(host: Host) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": Scaled(host.pick(1.5, 2.5))}


@case("LeakyReLU(negative_slope=0.25)", "LeakyReLU(negative_slope=0.75)")
def slope(host: Host) -> dict[str, Any]:
    text = "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.LeakyReLU(knob))"
    return {"model": host.knob(text) + ":net"}


@case("Dropout(p=0.25, inplace=False)", "Dropout(p=0.75, inplace=False)")
def dropout(host: Host) -> dict[str, Any]:
    text = "def net(): return nn.Sequential(nn.Flatten(), nn.Dropout(knob), nn.Linear(16, 3))"
    return {"model": host.knob(text) + ":net"}


@case("momentum of the optimizer's group 0 is 0.25", "0.75")
def setting_of_the_optimizer(host: Host) -> dict[str, Any]:
    text = "def Mine(params, lr): return torch.optim.SGD(params, lr=lr, momentum=knob)"
    return {"optimizer": host.knob(text) + ":Mine"}


@case("betas of the optimizer's group 0 is (0.25, 0.9)", "(0.75, 0.9)")
def settings_of_the_optimizer(host: Host) -> dict[str, Any]:
    text = "def Mine(params, lr): return torch.optim.AdamW(params, lr=lr, betas=(knob, 0.9))"
    return {"optimizer": host.knob(text) + ":Mine"}


@case("params of the optimizer's group 0 is 0.weight", "4.weight")
def order_of_parameters(host: Host) -> dict[str, Any]:
    text = "def Mine(params, lr):\n    params[0]['params'] = params[0]['params'][:: 1 if knob < 0.5 else -1]\n"
    return {"optimizer": host.knob(text + "    return torch.optim.SGD(params, lr=lr)") + ":Mine"}


@case("all training images", "float32 (48, 1, 4, 4)")
def data_of_the_environment(host: Host) -> dict[str, Any]:
    text = "import tinytask\ndef data():\n    train, val = tinytask.data()\n    train.tensors[0].mul_(knob)\n"
    return {"data": host.knob(text + "    return train, val") + ":data"}


@case("the version of torch is", "0.0.1")
def version_of_torch(host: Host) -> dict[str, Any]:
    return host.old(torch)


@case("the version of onehour is", "0.0.1")
def version_of_onehour(host: Host) -> dict[str, Any]:
    return host.old(onehour)


@case("the version of numpy is", "0.0.1")
def version_of_numpy(host: Host) -> dict[str, Any]:
    return host.old(numpy)


@case("instructions of a canonical run is", "AVX9")
def instructions_of_a_canonical_run(host: Host) -> dict[str, Any]:
    if host.second:
        torch.backends.cpu.get_cpu_capability = lambda: "AVX9"
    return {"reduce": "canonical"}


@case("process 1 (host1) cannot train: data", "No module named")
def data_is_missing(host: Host) -> dict[str, Any]:
    if not host.second:
        host.module("from tinytask import data")
    return {"data": f"case_{host.case}:data"}


@case("process 1 (host1) cannot train: model", "nothing of that kind is installed here")
def model_cannot_be_imported(host: Host) -> dict[str, Any]:
    text = "from tinytask import net\nif knob > 0.5:\n    raise ImportError('nothing of that kind is installed here')"
    return {"model": host.knob(text) + ":net"}


@case("process 1 (host1) cannot train: the model's function failed when called: ValueError: no weights on this host")
def model_cannot_be_built(host: Host) -> dict[str, Any]:
    def make() -> nn.Module:
        if host.second:
            raise ValueError("no weights on this host")
        return tinytask.net()

    return {"model": make}


@case("process 1 (host1) cannot train", "truncated file")
def a_sample_is_gone(host: Host) -> dict[str, Any]:
    train, validation = tinytask.listed()
    return {"data": (host.pick(train, tinytask.Unreadable(train.tensors, 5)), validation)}


class Scaled(nn.Module):
    """With a number that no layer prints."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net, self.scale = tinytask.net(), scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(images)


def field(name: str) -> Plant:
    def plant(host: Host) -> dict[str, Any]:
        value = host.pick(*FIELDS[name])
        return {} if value == "not given" else {name: value}

    return plant


ALL = {f"field_{name}": field(name) for name in MET} | {name: plant for name, (plant, _) in CASES.items()}


def heard(rank: int, folder: Path, name: str, plant: Plant, **more: Any) -> str:
    """What `train` says to this host."""
    versions = [(module, module.__version__) for module in (torch, onehour, numpy)]
    capability = torch.backends.cpu.get_cpu_capability
    options = {"out": folder / "runs" / name, "hang_timeout": None} | more | plant(Host(rank, name))
    try:
        train(options.pop("recipe", None) or tinytask.recipe(), **options)
        return "trained"
    except ValueError as error:
        return str(error)
    finally:
        torch.backends.cpu.get_cpu_capability = capability
        for module, before in versions:
            vars(module)["__version__"] = before
        for module in [module for module in sys.modules if module.startswith("case_")]:
            del sys.modules[module]  # which would count as beside the next one's


def live(rank: int, folder: Path, ports: list[str]) -> None:
    home = folder / f"host-{rank}"
    home.mkdir()
    os.chdir(home)
    sys.path.insert(0, str(home))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    socket.gethostname = lambda: f"host{rank}"
    said = {}
    taken = iter(ports)

    def ask(name: str, *arguments: Any, **options: Any) -> None:
        os.environ["MASTER_PORT"] = next(taken)
        said[name] = heard(rank, folder, *arguments, **options)

    ask("alike", "alike", lambda host: {})
    ask("alike, finished", "alike", lambda host: {})
    ask("finished", "alike", field("seed"))
    ask("augmented", "augmented", lambda host: {"data": [*map(tinytask.Augmented, tinytask.data())]})
    ask("by chance", "by-chance", lambda host: {"data": [*map(ByChance, tinytask.data())]})
    both: dict[str, Any] = {"allow_different": ("versions",)}
    ask("allowed", "allowed", version_of_torch, **both)
    ask("allowed by one", "by-one", lambda host: version_of_torch(host) | host.pick({}, both))
    ask("more than versions", "more", lambda host: version_of_torch(host) | field("seed")(host), **both)
    for name, plant in ALL.items():
        ask(name, name, plant)
    (folder / f"heard-{rank}.json").write_text(json.dumps(said))


class ByChance(tinytask.Listed):
    """With numbers that no key decides, so that two readings of a sample differ."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, label = self.tensors[index]
        return image + 0.01 * torch.frombuffer(bytearray(os.urandom(1)), dtype=torch.uint8).float(), label


NUMBER = 8 + len(ALL)
"""Of meetings, each at a port of its own."""


if __name__ == "__main__":
    base, *all_ports = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    second = os.fork()
    try:
        live(0 if second else 1, Path(base), all_ports)
    except BaseException:
        traceback.print_exc()
        os.kill(second or os.getppid(), signal.SIGKILL)  # it would wait for this one
        os._exit(1)
    sys.stdout.flush()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0)
