"""Watching from inside: the loop learns what it would have learned, and is left alone once all was seen."""

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import onehour.check as check
from onehour.check.watching import Watch


def data(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(samples, 1, 6, 6, generator=generator), torch.arange(samples) % 5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} | options
    return torch.optim.SGD(model.parameters(), **settings)


def made(**options: Any) -> tuple[nn.Module, torch.optim.SGD]:
    model = net()
    return model, sgd(model, **options)


def train(model: nn.Module, *steppers: Any, epochs: int = 3, loader: Any = None, **changes: Any) -> None:
    """Each batch a step of an optimizer, and of what else steps; `changes` are of the loader."""
    torch.manual_seed(1)
    loader = loader or DataLoader(data(), **({"batch_size": 16, "shuffle": True} | changes))
    for _ in range(epochs):
        for images, labels in loader:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            for stepper in steppers:
                stepper.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])


@pytest.mark.parametrize(("loaders", "persistent"), [(0, False), (1, False), (1, True)])
def test_what_is_learned_stays_the_same_to_the_bit(loaders: int, persistent: bool):
    learned = []
    for watched in (False, True):
        model, optimizer = made()
        with check.watch(model, optimizer) if watched else contextlib.nullcontext():
            train(model, optimizer, num_workers=loaders, persistent_workers=persistent)
        learned.append(weights(model))
    assert torch.equal(*learned)


def test_a_right_loop_is_clean():
    model, optimizer = made()
    with check.watch(model, optimizer) as report:
        train(model, optimizer)
    assert report.findings == []
    assert str(report) == "nothing found"
    report.assert_clean()


def test_findings_name_the_line_and_fail_a_test():
    model, optimizer = made(weight_decay=1e-4)
    with check.watch(model, optimizer, base_lr=0.1, base_minibatch=4) as report:
        train(model, optimizer, shuffle=False)
    found = {finding.pitfall: finding for finding in report.findings}
    assert set(found) == {"lr-not-scaled", "decay-on-batchnorm", "same-order-every-epoch"}
    assert found["lr-not-scaled"].measured == "target rate 0.1 at minibatch 16"
    assert found["lr-not-scaled"].expected == "0.4 = 0.1 · 16 / 4"
    assert all(finding.where and finding.where.rpartition(":")[0] == __file__ for finding in report.findings)
    with pytest.raises(AssertionError, match=r"3 finding\(s\) in the training loop"):
        report.assert_clean()


def test_only_skip_and_comments():
    def findings(**options: Any) -> list[str]:
        model, optimizer = made()
        with check.watch(model, optimizer, **options) as report:
            train(model, optimizer, shuffle=False)
        return [finding.pitfall for finding in report.findings]

    assert findings() == ["same-order-every-epoch"]
    assert findings(skip=["same-order-every-epoch"]) == []
    assert findings(only=["double-step"]) == []
    model, optimizer = made()
    with check.watch(model, optimizer) as report:
        loader = DataLoader(data(), batch_size=16)  # onehour: ignore[same-order-every-epoch]
        train(model, optimizer, loader=loader)
    assert report.findings == []


def test_a_scheduler_that_was_made_before_is_run_to_its_end():
    model, optimizer = made()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    with check.watch(model, optimizer, scheduler=scheduler) as report:
        train(model, optimizer, scheduler, epochs=10)
    assert [finding.pitfall for finding in report.findings] == ["lr-collapses"]


def test_nothing_is_left_in_the_way_afterwards():
    model, optimizer = made()
    before = (F.cross_entropy, torch.autograd.backward, DataLoader.__iter__, DataLoader.__init__, torch.save)
    watching = Watch(model, optimizer)
    watching.start()
    assert F.cross_entropy is not before[0]
    train(model, optimizer, epochs=3)
    assert watching.recorder.finished
    after = (F.cross_entropy, torch.autograd.backward, DataLoader.__iter__, DataLoader.__init__, torch.save)
    assert after == before
    assert not model._forward_pre_hooks
    assert not model[1]._forward_pre_hooks  # type: ignore[index]
    assert not any(p._backward_hooks for p in model.parameters())
    assert watching.stop().findings == []


def test_an_error_in_the_loop_comes_through_and_leaves_nothing():
    model, optimizer = made()
    before = F.cross_entropy
    with pytest.raises(RuntimeError, match="mine"), check.watch(model, optimizer) as report:
        raise RuntimeError("mine")
    assert F.cross_entropy is before
    assert report.findings == []


def test_another_optimizer_s_parameters_are_not_unused():
    body, head = nn.Linear(36, 8), nn.Linear(8, 5)
    model = nn.Sequential(nn.Flatten(), body, head)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (body, head))
    with check.watch(model, first) as report:
        train(model, first, second, epochs=1)
    assert report.findings == []


def test_copies_of_the_model_are_not_watched(tmp_path: Path):
    model, optimizer = made()
    with check.watch(model, optimizer) as report:
        average = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        train(model, optimizer)
        average(data().tensors[0])
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for copied in (average, loaded):
        assert torch.isfinite(copied(data().tensors[0])).all()
    assert report.findings == []


def test_what_could_not_be_judged_is_said():
    model, optimizer = made()
    with check.watch(model, optimizer, base_lr=0.1, base_minibatch=16) as report:
        for update in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 + 0.01 * update
            optimizer.zero_grad()
            F.cross_entropy(model(data().tensors[0]), data().tensors[1]).backward()
            optimizer.step()
    assert "it still rises after 8 updates" in report.notes[0]
    assert report.notes[1:] == ["no DataLoader gives the training data: which samples an epoch takes was not judged"]


def test_wrong_arguments_are_refused():
    model = net()
    with pytest.raises(ValueError, match="the model first"):
        check.Watch(sgd(model), model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the optimizer second"):
        check.Watch(model, "sgd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no pitfall is called 'double-stp'; expected 'double-step'"):
        check.Watch(model, sgd(model), skip=["double-stp"])


def test_accumulation_amp_and_a_compiled_model():
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu")
    with check.watch(model, optimizer) as report:
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        for _ in range(3):
            for i, (images, labels) in enumerate(loader):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.cross_entropy(model(images), labels) / 4
                scaler.scale(loss).backward()
                if (i + 1) % 4 == 0:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
    assert report.findings == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, when its compiler is imported
def test_a_compiled_model():
    model, optimizer = made()
    compiled = torch.compile(model)
    with check.watch(model, optimizer) as report:
        train(compiled, optimizer)  # pyright: ignore[reportArgumentType]
    assert report.findings == []


def test_public_names():
    assert set(check.__all__) >= {"watch", "check_script", "Finding", "lightning_callback", "hf_callback"}
    for name in check.__all__:
        assert callable(getattr(check, name))
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = check.wach  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["lightning_callback", "hf_callback"])
def test_a_callback_without_its_trainer_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    for module in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="this callback needs"):
        getattr(check, name)()
