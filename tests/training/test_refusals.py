"""What a run refuses: models and optimizers that it could not save, samples that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

import onehour
from onehour import Recipe
from onehour.api import train
from onehour.cli import main
from onehour.data.sources import complete
from onehour.dist.group import Group
from onehour.rules.batchnorm import convert_batchnorm
from onehour.sweeps.verify import trace
from onehour.training.build import OPTIMIZERS
from onehour.training.feeds import InputError
from onehour.training.record import NonFiniteError, Run, latest_contents
from onehour.training.seeds import train_seeds
from onehour.training.state import refuse_model, refuse_optimizer
from onehour.training.task import refuse_training_output

CPU = torch.device("cpu")
IMAGE = torch.zeros(1, 8, 8)
SMALL = Recipe(per_worker=16, minibatch=64)
DATA = (TensorDataset(torch.zeros(64, 1, 8, 8), torch.arange(64) % 4),) * 2
SIZES: dict[str, Any] = {"minibatch": 32, "per_worker": 16, "base_minibatch": 32, "warmup": "none", "epochs": 1}


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


class Keeping(Optimizer):
    """SGD that keeps something; `keep` is what a subclass changes, and by what it multiplies the rate, if it does."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                factor = self.keep(group, self.state[parameter], parameter)
                parameter.sub_(parameter.grad, alpha=group["lr"] * (1.0 if factor is None else float(factor)))

    def keep(self, group: Any, state: Any, parameter: Tensor) -> Any:
        return None


KEPT: dict[str, tuple[Any, str]] = {
    "AList": (lambda own, group, state, p: state.setdefault("seen", []).append(1), "keeps a list as 'seen'"),
    "AText": (lambda own, group, state, p: state.update(phase="warm"), "keeps a str as 'phase'"),
    "ADict": (lambda own, group, state, p: state.update(inner={"velocity": p.clone()}), "keeps a dict as 'inner'"),
    "AComplex": (
        lambda own, group, state, p: state.update(spectrum=torch.fft.fft(p)),
        r"keeps a torch\.complex64 tensor as 'spectrum'",
    ),
    "ATensorInAGroup": (
        lambda own, group, state, p: group.setdefault("trust", torch.ones(())).mul_(0.9),
        "changes its group's 'trust' in a step",
    ),
    "AListInAGroup": (
        lambda own, group, state, p: group.setdefault("history", []).append(1),
        "changes its group's 'history' in a step",
    ),
    "ATensorOfItsOwn": (
        lambda own, group, state, p: vars(own).setdefault("mean", torch.zeros(())).add_(0.1),
        "changes its attribute 'mean' in a step",
    ),
    "ACount": (
        lambda own, group, state, p: vars(own).update(count=vars(own).get("count", 0) + 1),
        "changes its attribute 'count' in a step",
    ),
    "AnArray": (
        lambda own, group, state, p: vars(own).update(rates=np.append(vars(own).get("rates", np.zeros(1)), 1.0)),
        "changes its attribute 'rates' in a step",
    ),
    "ItsOwnDraws": (
        lambda own, group, state, p: torch.rand((), generator=vars(own).setdefault("draws", torch.Generator())),
        "changes its attribute 'draws' in a step",
    ),
    "OfNoParameter": (lambda own, group, state, p: own.state.update(all=torch.zeros(())), "belongs to no parameter"),
}
OWN = {name: type(name, (Keeping,), {"keep": keep}) for name, (keep, _) in KEPT.items()}
AList = OWN["AList"]


class Elsewhere(Keeping):
    """In an object of its own, which only the steps show."""

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        class Box:
            value = 1.0

        self.box = getattr(self, "box", None) or Box()
        self.box.value *= 0.9
        return self.box.value


class WantsAClosure(Keeping):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class ANumberAndATensor(Keeping):
    """As is right: in the parameter's state and in the group."""

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        state["velocity"] = state.get("velocity", torch.zeros_like(parameter)) + 1
        state["none"] = None
        state["count"] = state.get("count", 0) + 1
        group["steps"] = group.get("steps", 0) + 1
        return 1 / (1 + group["steps"] + state["count"] + float(state["velocity"].mean()))


class NotOne:
    def __init__(self, groups: Any, lr: float) -> None:
        pass


def made(kind: Any) -> Any:
    return lambda model: kind([{"params": list(model.parameters())}], lr=0.1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *[(OWN[name], f"optimizer {name} .*{words}") for name, (_, words) in KEPT.items()],
        (Elsewhere, "does not go on from its saved state"),
        (WantsAClosure, r"WantsAClosure cannot make a step: TypeError: .*closure"),
    ],
)
def test_an_optimizer_that_no_checkpoint_holds_is_refused(kind: Any, words: str):
    with pytest.raises(ValueError, match=words):
        refuse_optimizer(made(kind), CPU)


@pytest.mark.parametrize(
    "kind",
    [
        *(Keeping, ANumberAndATensor, *OPTIMIZERS.values()),
        *(torch.optim.SGD, torch.optim.Adamax, torch.optim.Rprop, torch.optim.ASGD),
    ],
)
def test_one_that_a_checkpoint_holds_is_not(kind: Any):
    state = torch.get_rng_state()
    refuse_optimizer(made(kind), CPU)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("name", "words"), [("AList", "keeps a list"), ("NotOne", "returned NotOne; expected")])
def test_a_run_refuses_it_before_it_writes_a_checkpoint(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    named: dict[str, Any] = {"model": net, "optimizer": f"test_refusals:{name}", "scaling": "fixed"}
    with pytest.raises(ValueError, match=words):
        onehour.train("resnet50", data=DATA, out=tmp_path / "run", **named, **SIZES)
    assert not list(tmp_path.glob("run/checkpoints/*"))


class Aux(nn.Module):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.net, self.returned = net(), returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(self.net(x)) if self.training else self.net(x)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def with_buffer(tensor: Tensor) -> nn.Module:
    model = net()
    model.register_buffer("kept", tensor)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Aux(lambda logits: (logits, logits)), "returned tuple in training; expected logits"),
        (Aux(lambda logits: {"logits": logits}), "returned dict in training; expected logits"),
        (Aux(lambda logits: logits[:, :, None]), r"returned \(16, 4, 1\) in training; expected logits"),
        (with_buffer(torch.ones(2, dtype=torch.complex64)), r"keeps kept as torch\.complex64"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), "0 gives sparse gradients"),
        (with_buffer(torch.eye(2).to_sparse()), r"keeps kept as torch\.sparse_coo"),
        (with_buffer(torch.zeros(2, device="meta")), "keeps kept without memory"),
        (Extra(), "keeps _extra_state, a dict"),
        (net().requires_grad_(False), "has no parameter that is trained"),
    ],
)
def test_a_model_that_cannot_be_trained_or_saved_is_refused(model: nn.Module, words: str):
    with pytest.raises(ValueError, match=words):
        refuse(model)


def refuse(model: nn.Module, recipe: Recipe = SMALL) -> None:
    """As a run does."""
    refuse_model(model)
    refuse_training_output(model, recipe, IMAGE)


class Tokens(nn.Module):
    """Normalises each row of an image as if it were a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(IMAGE.shape[-1]), nn.Linear(IMAGE.numel(), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x.flatten(0, 2)).view(len(x), -1))


def test_a_batchnorm_over_more_rows_than_samples_is_refused():
    with pytest.raises(ValueError, match=r"a BatchNorm of 8 channels is given 128 rows for 16 samples, .*"):
        refuse(convert_batchnorm(Tokens(), 16))
    refuse(Tokens(), SMALL.replace(batchnorm="keep"))


def test_looking_at_a_model_moves_nothing_of_it():
    class Counts(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net, self.drop = nn.BatchNorm2d(1), net(), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(self.drop(self.norm(x)))

    model = Counts().eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    refuse(model)
    assert (model.calls, model.training) == (0, False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class ByValue(nn.Module):
    """Its training output depends on numbers, so that shapes alone do not tell."""

    def __init__(self, wrong: Any) -> None:
        super().__init__()
        self.net, self.wrong = net(), wrong

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return self.wrong(logits) if self.training and x.mean().item() > -9 else logits


def fails(logits: Tensor) -> Tensor:
    raise KeyError("head")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda logits: (logits, logits), "the model returned tuple; expected logits"),
        (lambda logits: logits.argmax(1), r"the model returned \(32,\) of torch\.int64; expected logits"),
        (lambda logits: logits.detach(), "depends on no trained parameter"),
        (fails, r"cannot take the data's images \(1, 8, 8\), torch\.float32: KeyError: 'head' \(.*test_refusals"),
    ],
)
def test_what_only_the_first_pass_shows_is_one_message_too(wrong: Any, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=words):
        onehour.train("resnet50", data=DATA, model=lambda: ByValue(wrong), out=tmp_path / "run", **SIZES)


TRAINING = r"^training sample 5 \(images/5.npy\) is not finite: 1 of its 16 values is NaN; fix it, or leave it out$"
VALIDATION = (
    r"^validation sample 17 \(images/17.npy\) is not finite: 1 of its 16 values is NaN; fix it, or leave it out$"
)


def strictly(folder: Path) -> None:
    """Every JSON file of a folder, read by who knows nothing but JSON."""

    def refuse(token: str) -> NoReturn:
        raise AssertionError(f"{token} is no JSON")

    for path in (*folder.rglob("*.json"), *folder.rglob("*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


@pytest.mark.parametrize(("loaders", "reduce"), [(0, "canonical"), (2, "fast")])
def test_training_names_the_sample_and_writes_no_end(tiny: ModuleType, tmp_path: Path, loaders: int, reduce: str):
    recipe = tiny.recipe(data="tinytask:broken", reduce=reduce)
    for _ in range(2):  # the same command finds the same
        with pytest.raises(InputError, match=TRAINING):
            train(recipe, out=tmp_path / "run", loaders=loaders)
        assert not (tmp_path / "run" / "summary.json").exists()
        assert not (tmp_path / "run" / "outcome.json").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([torch.inf], "1 of its 16 values is infinite"),
        ([-torch.inf, torch.inf], "2 of its 16 values are infinite"),
        ([torch.nan, torch.inf], "2 of its 16 values are NaN or infinite"),
    ],
)
def test_tensors_in_memory_are_named_by_index(tiny: ModuleType, tmp_path: Path, values: list[float], said: str):
    sides = tiny.data()
    sides[0].tensors[0][AT_LAST].view(-1)[: len(values)] = torch.tensor(values)
    with pytest.raises(InputError, match=f"^training sample {AT_LAST} is not finite: {said}"):
        train(tiny.recipe(), data=sides, out=tmp_path / "run")


AT_LAST = 47


def test_a_sample_of_finite_numbers_is_not_blamed(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"not finite at iteration .* Use a lower base_lr"):
        train(tiny.recipe(data="tinytask:poisoned"), out=tmp_path / "run")
    assert Run(tmp_path / "run").summary["outcome"] == "non-finite"
    strictly(tmp_path / "run")


@pytest.mark.parametrize("seed", range(8, 11))
def test_a_gpu_whose_flags_come_late_names_the_sample_too(tiny: ModuleType, tmp_path: Path, seed: int):
    with SimulatedGpu(), pytest.raises(InputError, match=TRAINING):
        train(tiny.recipe(data="tinytask:broken", seed=seed), out=tmp_path / "run", loaders=0, device="cuda")


def test_a_run_goes_on_once_the_sample_is_mended(tiny: ModuleType, tmp_path: Path):
    sides = tiny.data()
    train_side = tiny.Broken(sides[0], 5)
    recipe = tiny.recipe(seed=8)  # sample 5 is in the third iteration
    with pytest.raises(InputError):
        train(recipe, data=(train_side, tiny.Listed(sides[1])), loaders=0, save_every=1, out=tmp_path / "run")
    train_side.index = -1
    mended = train(recipe, data=(train_side, tiny.Listed(sides[1])), loaders=0, out=tmp_path / "run")
    whole = train(recipe, data=(train_side, tiny.Listed(sides[1])), loaders=0, out=tmp_path / "whole")
    assert mended.environment["from_iteration"] == 2
    assert mended.summary["state_sha256"] == whole.summary["state_sha256"]


@pytest.mark.parametrize("loaders", [0, 2])
def test_validation_names_the_sample_and_keeps_what_was_trained(tiny: ModuleType, tmp_path: Path, loaders: int):
    sides = tiny.Listed(tiny.data()[0]), tiny.Broken(tiny.data()[1], 17)
    for _ in range(2):
        with pytest.raises(InputError, match=VALIDATION):
            train(tiny.recipe(), data=sides, loaders=loaders, out=tmp_path / "run")
        contents = latest_contents(tmp_path / "run")
        assert contents is not None
        assert json.loads(contents[-1])["iteration"] == 6
        assert Run(tmp_path / "run").metrics == []
        strictly(tmp_path / "run")
    sides[1].index = -1
    mended = train(tiny.recipe(), data=sides, loaders=loaders, out=tmp_path / "run")
    whole = train(tiny.recipe(), data=sides, loaders=loaders, out=tmp_path / "whole")
    assert mended.metrics == whole.metrics
    assert mended.environment["from_iteration"] == 6


def test_in_a_later_chunk_of_validation_the_index_is_that_of_the_data(tiny: ModuleType, tmp_path: Path):
    images = torch.randn(700, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[600, 0, 2, 1] = torch.nan
    data = tiny.data()[0], TensorDataset(images, torch.arange(700) % 3)
    with pytest.raises(InputError, match=r"^validation sample 600 is not finite: 1 of its 16 values is NaN"):
        train(tiny.recipe(), data=data, out=tmp_path / "run")


class Unsure(nn.Module):
    """Gives no number for some samples, once it is evaluated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        if self.training or len(images) < 20:
            return logits
        return torch.where(torch.arange(len(images))[:, None] < 5, torch.nan, logits)


def test_a_model_that_gives_no_number_is_said_and_its_record_is_json(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = train(tiny.recipe(), model=Unsure(tiny.net()), out=tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("warning: the model's outputs are NaN or infinite for validation samples that are finite") == 2
    strictly(run.folder)
    assert [record["val_loss"] for record in run.metrics] == [None, None]
    assert all(record["top1_error"] >= 25 for record in run.metrics)  # 5 of 20 at least
    again = train(tiny.recipe(), model=Unsure(tiny.net()), out=tmp_path / "run")
    assert again.metrics == run.metrics


@pytest.mark.parametrize("json_too", [False, True])
def test_evaluating_weights_names_the_sample_or_the_model(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], json_too: bool
):
    run = train(tiny.recipe(), out=tmp_path / "run")
    flags = ["--json"] if json_too else []
    assert main(["evaluate", str(run.folder), "--data", "tinytask:broken_validation", "--trust", *flags]) == 2
    assert "onehour: validation sample 17 (images/17.npy) is not finite" in capsys.readouterr().err
    from safetensors.torch import load_file, save_file

    (weights,) = (run.folder / "checkpoints").glob("*12/model.safetensors")
    state = load_file(weights)
    state["4.bias"][0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    names = ["--model", "tinytask:net", "--data", "tinytask:data", "--recipe", str(run.folder / "recipe.toml")]
    assert main(["evaluate", str(tmp_path / "nan.safetensors"), *names, *flags]) == 0
    said = capsys.readouterr().out
    if json_too:
        assert json.loads(said, parse_constant=pytest.fail)["loss"] is None
    else:
        assert "loss         NaN or infinite, as the model's outputs are, though the data is finite" in said
    assert "100.0" in said


def test_seeds_that_train_as_one_network_name_the_sample_too(tiny: ModuleType, tmp_path: Path):
    for number, side in enumerate(("training", "validation")):
        sides = tiny.data()
        sides[number].tensors[0][17, 0, 0, 0] = torch.nan
        recipe, data = complete(tiny.recipe(), sides)
        folders = [tmp_path / f"{side}-{seed}" for seed in range(2)]
        with pytest.raises(InputError, match=f"^{side} sample 17 is not finite: 1 of its 16 values is NaN"):
            train_seeds([recipe.replace(seed=seed) for seed in range(2)], data, folders, Group())
        for folder in folders:
            assert not (folder / "summary.json").exists()
            strictly(folder)


def test_a_joint_model_that_gives_no_number_is_said(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "onehour.training.task.Classification.logits",
        lambda self, model, images, recipe: model(images) * (1 if model.training else torch.nan),
    )
    recipe, data = complete(tiny.recipe())
    folders = [tmp_path / str(seed) for seed in range(2)]
    train_seeds([recipe.replace(seed=seed) for seed in range(2)], data, folders, Group())
    for folder in folders:
        assert {(record["val_loss"], record["top1_error"]) for record in Run(folder).metrics} == {(None, 100.0)}
        strictly(folder)
    assert "0: warning: the model's outputs are NaN or infinite" in capsys.readouterr().out


def test_verify_names_the_sample_and_holds_nothing_against_nothing(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(InputError, match=TRAINING):
        trace(tiny.recipe(data="tinytask:broken"), steps=6, group=Group(), folder=tmp_path)
    with pytest.raises(ValueError, match="not finite within 6 iterations, so there is nothing to compare"):
        trace(tiny.recipe(data="tinytask:poisoned"), steps=6, group=Group(), folder=tmp_path)


def test_what_was_taken_in_the_place_of_an_image_is_called_that(tiny: ModuleType, tmp_path: Path):
    sides = tiny.Replacing(tiny.data()[0]), tiny.Listed(tiny.data()[1])
    recipe: Recipe = tiny.recipe(bad_images="skip", seed=8)
    with pytest.raises(InputError, match=r"^what was taken in the place of training sample 5 is not finite: 16 of its"):
        train(recipe, data=sides, loaders=0, out=tmp_path / "run")


@pytest.mark.usefixtures("forked")
def test_two_processes_say_it_once(
    tiny: ModuleType, alone: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    for name in ("OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "1")
    command = ["train", "digits", *tiny.FLAGS, "--out", str(alone / "run"), "--processes", "2", "--loaders", "1"]
    assert main([*command, "--data", "tinytask:broken"]) == 2
    said = capfd.readouterr().err
    assert said == (
        "onehour: training sample 5 (images/5.npy) is not finite: 1 of its 16 values is NaN; fix it, or leave it out\n"
    )
    assert main([*command, "--fresh", "--data", "tinytask:broken_validation"]) == 2
    said = capfd.readouterr().err
    assert "onehour: validation sample 17 (images/17.npy) is not finite" in said
    assert len(said.splitlines()) == 1
    contents = latest_contents(alone / "run")
    assert contents is not None
    assert json.loads(contents[-1])["iteration"] == 6
