"""Models and optimizers as people have them: what a run could not save is refused before its first iteration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

import onehour
from onehour.config import Recipe
from onehour.training.build import OPTIMIZERS
from onehour.training.refusals import refuse_model, refuse_optimizer

CPU = torch.device("cpu")
IMAGE = torch.zeros(1, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


class Keeping(Optimizer):
    """SGD that keeps something; `keep` is what a subclass changes."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(
                        parameter.grad, alpha=group["lr"] * self.keep(group, self.state[parameter], parameter)
                    )

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        return 1.0


class AList(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        state.setdefault("seen", []).append(1)
        return 1.0


class AText(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        state["phase"] = "warm"
        return 1.0


class ADict(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        state["inner"] = {"velocity": parameter.clone()}
        return 1.0


class AComplex(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        state["spectrum"] = torch.fft.fft(parameter)
        return 1.0


class ATensorInAGroup(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        group["trust"] = group.get("trust", torch.ones(())) * 0.9
        return float(group["trust"])


class AListInAGroup(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        group.setdefault("history", []).append(1)
        return 1 / len(group["history"])


class ATensorOfItsOwn(Keeping):
    mean: Any = None

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        self.mean = torch.zeros(()) if self.mean is None else self.mean
        self.mean += 0.1
        return float(self.mean)


class ACount(Keeping):
    count = 0

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        self.count += 1
        return 1.0 if self.count % 1000 else 0.0


class AnArray(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        self.rates = np.append(getattr(self, "rates", np.zeros(1)), 1.0)
        return 1.0


class ItsOwnDraws(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        self.draws = getattr(self, "draws", None) or torch.Generator().manual_seed(1)
        return float(torch.rand((), generator=self.draws))


class Elsewhere(Keeping):
    """In an object of its own, which only the steps show."""

    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        class Box:
            value = 1.0

        self.box = getattr(self, "box", None) or Box()
        self.box.value *= 0.9
        return self.box.value


class OfNoParameter(Keeping):
    def keep(self, group: Any, state: Any, parameter: Tensor) -> float:
        self.state["all"] = torch.zeros(())  # type: ignore[index]
        return 1.0


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
        (AList, "AList keeps a list as 'seen'"),
        (AText, "AText keeps a str as 'phase'"),
        (ADict, "ADict keeps a dict as 'inner'"),
        (AComplex, r"AComplex keeps a torch\.complex64 tensor as 'spectrum'"),
        (ATensorInAGroup, "changes its group's 'trust' in a step"),
        (AListInAGroup, "changes its group's 'history' in a step"),
        (ATensorOfItsOwn, "changes its attribute 'mean' in a step"),
        (ACount, "changes its attribute 'count' in a step"),
        (AnArray, "changes its attribute 'rates' in a step"),
        (ItsOwnDraws, "changes its attribute 'draws' in a step"),
        (Elsewhere, "does not go on from its saved state"),
        (OfNoParameter, "keeps a state that is no parameter's"),
        (WantsAClosure, r"WantsAClosure cannot make a step: TypeError: .*closure"),
    ],
)
def test_an_optimizer_that_no_checkpoint_holds_is_refused(kind: Any, words: str):
    with pytest.raises(ValueError, match=words):
        refuse_optimizer(made(kind), CPU)


@pytest.mark.parametrize(
    "kind",
    [
        Keeping,
        ANumberAndATensor,
        *OPTIMIZERS.values(),
        torch.optim.SGD,
        torch.optim.Adamax,
        torch.optim.Rprop,
        torch.optim.ASGD,
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
    data = TensorDataset(torch.zeros(64, 1, 8, 8), torch.arange(64) % 4)
    sizes: dict[str, Any] = {"minibatch": 32, "per_worker": 16, "base_minibatch": 32, "warmup": "none", "epochs": 1}
    named: dict[str, Any] = {"model": net, "optimizer": f"test_suitable:{name}", "scaling": "fixed"}
    with pytest.raises(ValueError, match=words):
        onehour.train("resnet50", data=(data, data), out=tmp_path / "run", **named, **sizes)
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
        (with_buffer(torch.eye(2).to_sparse()), r"keeps kept as torch\.sparse_coo"),
        (with_buffer(torch.zeros(2, device="meta")), "keeps kept without memory"),
        (Extra(), "keeps _extra_state, a dict"),
        (net().requires_grad_(False), "has no parameter that is trained"),
    ],
)
def test_a_model_that_cannot_be_trained_or_saved_is_refused(model: nn.Module, words: str):
    with pytest.raises(ValueError, match=words):
        refuse_model(model, Recipe(per_worker=16, minibatch=64), IMAGE)


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
    refuse_model(model, Recipe(per_worker=16, minibatch=64), IMAGE)
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
        (lambda logits: logits.detach(), "depend on no trained parameter"),
        (fails, r"cannot take the data's images \(1, 8, 8\), torch\.float32: KeyError: 'head' \(.*test_suitable"),
    ],
)
def test_what_only_the_first_pass_shows_is_one_message_too(wrong: Any, words: str, tmp_path: Path):
    data = TensorDataset(torch.zeros(64, 1, 8, 8), torch.arange(64) % 4)
    sizes: dict[str, Any] = {"minibatch": 32, "per_worker": 16, "base_minibatch": 32, "warmup": "none", "epochs": 1}
    with pytest.raises(ValueError, match=words):
        onehour.train("resnet50", data=(data, data), model=lambda: ByValue(wrong), out=tmp_path / "run", **sizes)
