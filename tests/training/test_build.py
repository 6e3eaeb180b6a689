"""From a recipe to the things that run it: everything wrong is found here, in one message."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onehour
from onehour.data.sources import Data, complete
from onehour.dist.devices import pick_device
from onehour.execution import Execution
from onehour.rules.batchnorm import GhostBatchNorm2d
from onehour.rules.momentum import momentum_form
from onehour.training.build import build_model, build_optimizer
from onehour.training.console import effects
from onehour.training.decisions import decisions_of
from onehour.training.feeds import pick_loaders, pick_workers_per_pass

CPU = torch.device("cpu")


@pytest.fixture
def data(tiny: ModuleType) -> Data:
    return Data.of(*tiny.data())


def test_what_the_data_knows_is_written_into_the_recipe(tiny: ModuleType):
    recipe, data = complete(tiny.recipe())
    assert (recipe.samples, recipe.classes) == (48, 3)
    assert len(data.validation) == 20


def test_the_data_of_today_counts_not_what_the_recipe_remembers(tiny: ModuleType):
    assert complete(tiny.recipe(samples=1000))[0].samples == 48


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"classes": 2}, None, r"sample 2: the label is 2; .* from 0 to 1, since C = 2 \(the recipe's classes\)"),
        ({"minibatch": 64, "base_minibatch": 64}, None, "minibatch 64 is larger than the data set of 48 samples"),
        ({}, "one", r"data is a str; expected \(train, validation\)"),
        ({}, ("train",), r"data is a tuple; expected \(train, validation\)"),
    ],
)
def test_unusable_data_is_refused(tiny: ModuleType, changes: dict[str, Any], data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        complete(tiny.recipe(**changes), data)


def test_no_gpu_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU here; use --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == "cuda"


def test_named_models_start_from_the_seed_and_nothing_else(data: Data, tiny: ModuleType):
    recipe = tiny.recipe(model="resnet8", classes=3)
    first = build_model(recipe, data, CPU).state_dict()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = build_model(recipe, data, CPU).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = build_model(recipe.replace(seed=1), data, CPU).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert first["layer1.0.bn2.weight"].tolist() == [0.0] * 8  # zero γ


def test_batchnorm_becomes_that_of_n(data: Data, tiny: ModuleType):
    model = build_model(tiny.recipe(), data, CPU)
    layers = [module for module in model.modules() if isinstance(module, GhostBatchNorm2d)]
    assert [layer.per_worker for layer in layers] == [4]


def test_a_model_of_ones_own_keeps_its_weights(data: Data, tiny: ModuleType):
    mine = tiny.net()
    weights = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    built = build_model(tiny.recipe(), data, CPU, mine)
    assert list(built.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(7, 3), r"the model cannot take the data's images,? \(1, 4, 4\)"),
        (nn.Identity(), r"the model returned \(1, 1, 4, 4\).* expected (float )?logits of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "has 2 outputs, the data 3 classes; training sample 2: the"),
        (nn.SyncBatchNorm(3), "SyncBatchNorm, which cannot be given groups of n"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(tiny: ModuleType, model: nn.Module, message: str):
    recipe, data = complete(tiny.recipe())
    with pytest.raises(ValueError, match=message):
        build_model(recipe, data, CPU, model)


def test_sgd_is_torchs_with_the_rate_outside_and_decay_by_group(tiny: ModuleType):
    model = tiny.net()
    optimizer = build_optimizer(tiny.recipe(weight_decay=0.3, momentum=0.8, nesterov=False), model)
    assert type(optimizer) is torch.optim.SGD
    assert momentum_form(optimizer) == "outside"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    undecayed = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert undecayed == {id(p) for p in model[1].parameters()}
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.8, False)}


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("torch.optim:SGD", torch.optim.SGD), ("radam", torch.optim.RAdam)]
)
def test_other_optimizers_go_by_name_or_by_package(tiny: ModuleType, name: str, kind: type):
    assert type(build_optimizer(tiny.recipe(optimizer=name), tiny.net())) is kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adan", "no optimizer is called 'adan'; expected adam"),
        ("torch.optim:Adan", "torch.optim has no 'Adan'; expected Adam"),
        ("tinytask:failing", "optimizer tinytask:failing cannot be built"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused(tiny: ModuleType, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_optimizer(tiny.recipe(optimizer=name), tiny.net())


def adamw_of_mine(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr)


OWN = ["torch.optim:AdamW", "torch.optim:RMSprop", f"{__name__}:adamw_of_mine"]


@pytest.mark.parametrize("name", OWN)
def test_the_linear_rule_is_refused_for_every_optimizer_that_divides_by_the_gradient(tiny: ModuleType, name: str):
    grown = {"optimizer": name, "minibatch": 16}
    with pytest.raises(ValueError, match=f"linear scaling does not hold for {name}: .* set scale_adaptive to insist"):
        build_optimizer(tiny.recipe(**grown), tiny.net())
    for allowed in ({"minibatch": 8}, {"scaling": "sqrt"}, {"scaling": "fixed"}, {"scale_adaptive": True}):
        build_optimizer(tiny.recipe(**(grown | allowed)), tiny.net())


@pytest.mark.parametrize("name", ["torch.optim:SGD", "torch.optim:ASGD", "onehour.rules.momentum:InsideSGD"])
def test_the_linear_rule_is_for_what_grows_with_the_gradient(tiny: ModuleType, name: str):
    build_optimizer(tiny.recipe(optimizer=name, minibatch=16), tiny.net())


@pytest.mark.parametrize("name", ["torch.optim:LBFGS", "torch.optim:SparseAdam"])
@pytest.mark.parametrize("minibatch", [8, 16])
def test_an_optimizer_that_cannot_step_with_gradients_alone_is_one_message(
    tiny: ModuleType, tmp_path: Path, name: str, minibatch: int
):
    with pytest.raises(ValueError, match=r"^optimizer .*") as raised:
        onehour.train(tiny.recipe(optimizer=name, minibatch=minibatch), out=tmp_path / "run")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("asked", "changes", "processes", "picked"),
    [
        *((1, {}, 1, 1), (2, {}, 1, 2), (99, {}, 1, 2), (99, {}, 2, 1), (None, {}, 1, 2)),
        (None, {"channels_last": True}, 1, 1),
    ],
)
def test_workers_per_pass_is_at_most_a_processs_share(
    tiny: ModuleType, data: Data, asked: int | None, changes: dict[str, Any], processes: int, picked: int
):
    execution = Execution(workers_per_pass=asked, processes=processes)
    assert pick_workers_per_pass(execution, tiny.recipe(**changes), data, tiny.net(), "cpu") == picked


def test_dropout_and_large_images_take_one_worker_a_pass(tiny: ModuleType, data: Data):
    """Random numbers are keyed by the pass; activations should stay in the caches."""
    functional = tiny.net()
    functional.drop_rate = 0.2  # as timm's ghostnet and torchvision's DenseNet have it
    path = type("StochasticDepth", (nn.Module,), {})()  # torchvision's drop-path
    attention = nn.MultiheadAttention(4, 2, dropout=0.1)
    for drawing in (nn.Dropout(), nn.RReLU(), nn.LSTM(2, 2, 2, dropout=0.3), attention, path):
        model = nn.Sequential(tiny.net(), drawing)
        assert pick_workers_per_pass(Execution(), tiny.recipe(), data, model, "cpu") == 1, drawing
    for model in (nn.Sequential(tiny.net(), nn.MultiheadAttention(4, 2)), tiny.net()):
        assert pick_workers_per_pass(Execution(), tiny.recipe(), data, model, "cpu") == 2
    for model in (nn.Sequential(tiny.net(), nn.Dropout()), functional):
        assert pick_workers_per_pass(Execution(), tiny.recipe(), data, model, "cpu") == 1
    side = TensorDataset(torch.zeros(64, 3, 128, 128), torch.zeros(64, dtype=torch.long))
    large = tiny.recipe(minibatch=64, base_minibatch=64)
    assert pick_workers_per_pass(Execution(), large, Data.of(side, side), tiny.net(), "cpu") == 1


def test_tensors_in_memory_need_no_loader_process(tiny: ModuleType):
    listed, tensors = Data.of(*tiny.listed()), Data.of(*tiny.data())
    assert pick_loaders(Execution(), tensors) == 0
    assert pick_loaders(Execution(loaders=0), listed) == 0


@pytest.mark.parametrize(("share", "on_cpu", "on_gpu"), [(12, 6, 12), (3, 1, 3), (1, 1, 1)])
def test_loaders_have_half_of_a_processs_cores_and_all_where_a_gpu_computes(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, share: int, on_cpu: int, on_gpu: int
):
    listed = Data.of(*tiny.listed())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_loaders(Execution(device="cpu"), listed, share) == on_cpu
    assert pick_loaders(Execution(device="cuda"), listed, share) == on_gpu


def test_cores_are_divided_once_by_processes_or_by_the_parent(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch):
    listed = Data.of(*tiny.listed())
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr("onehour.machine._quotas", lambda *_: [])
    assert pick_loaders(Execution(device="cpu", processes=2), listed) == 4
    monkeypatch.setenv("ONEHOUR_CORES", "8")
    assert pick_loaders(Execution(device="cpu", processes=2), listed) == 4


def test_what_a_recipe_asks_for_beyond_the_paper_is_said(tiny: ModuleType):
    beyond = {"clip_norm": 0.5, "ema": 0.9, "freeze": ("0.*", "1.*"), "layer_rates": {"4.weight": 0.1}}
    recipe, data = complete(tiny.recipe(minibatch=16, **beyond))
    said = effects(recipe, build_model(recipe, data, CPU)).split("; ")
    assert said == [
        "BatchNorm over n = 4 in 0 layers, γ = 0 in 0 of them",
        "weight decay 0.0001 on 2 of 2 tensors",
        "4 of 6 tensors frozen, and BatchNorm's statistics in 1 layers",
        "rate × 0.1 on 1 of 2 tensors (4.weight)",
        "gradients clipped to a norm of 0.5",
        "weights averaged with ρ = 0.81",
    ]


@pytest.mark.parametrize("changes", [{"freeze": ("conv.*",)}, {"layer_rates": ("5.weight=2",)}])
def test_a_name_that_the_model_does_not_have_is_refused_before_anything_starts(
    tiny: ModuleType, changes: dict[str, Any], tmp_path: Path
):
    with pytest.raises(ValueError, match=r"matches no parameter.*; near it are [0-9]"):
        onehour.train(tiny.recipe(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rates_of_layers_keep_their_ratios_in_every_form_of_momentum(tiny: ModuleType, tmp_path: Path):
    """A class of one's own is tried before on other parameters, which have other names."""
    changes: dict[str, Any] = {"precision": "float64", "nesterov": False, "base_minibatch": 4, "base_lr": 0.02}
    recipe = tiny.recipe(**changes, layer_rates={"4.*": 0.1})
    runs = [
        onehour.train(recipe, optimizer=optimizer, out=tmp_path / optimizer[:3])
        for optimizer in ("sgd", "onehour.rules.momentum:InsideSGD")
    ]
    first, second = (run.metrics[-1] for run in runs)
    assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-12)
    inside = decisions_of(recipe.replace(samples=48, pitfall="momentum-inside-uncorrected")).optimizer(tiny.net())
    assert [group["lr"] for group in inside.param_groups] == [0.02, 0.02, 0.002]
