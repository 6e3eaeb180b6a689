"""The callbacks, called as their trainers call them; and with the trainers themselves where they are installed."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import onehour.check as check


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 3), batch_size=8)  # never shuffled
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_lightning_s_callback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    installed(monkeypatch, "lightning", __path__=[])
    installed(monkeypatch, "lightning.pytorch", Callback=object)
    callback = check.lightning_callback(skip=["no-warmup"])
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleNamespace(lr_scheduler_configs=[], optimizers=[optimizer], is_global_zero=True)
    assert callback.report.findings == []
    callback.on_train_start(trainer, model)
    loop(model, optimizer)
    callback.on_train_end(trainer, model)
    assert [finding.pitfall for finding in callback.report.findings] == ["same-order-every-epoch"]
    assert "same-order-every-epoch" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_hugging_face_s_callback(first: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    installed(monkeypatch, "transformers", TrainerCallback=object)
    callback = check.hf_callback()
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = SimpleNamespace(optimizer=optimizer)  # as Accelerate's is
    state = SimpleNamespace(is_world_process_zero=first)
    callback.on_train_begin(None, state, None, model=model, optimizer=wrapped, lr_scheduler=None)
    loop(model, optimizer)
    callback.on_train_end(None, state, None)
    assert [finding.pitfall for finding in callback.report.findings] == ["same-order-every-epoch"]
    assert ("same-order-every-epoch" in capsys.readouterr().out) == first


def test_an_end_without_a_beginning_says_nothing(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, "transformers", TrainerCallback=object)
    callback = check.hf_callback()
    callback.on_train_end(None, SimpleNamespace(is_world_process_zero=True), None)
    assert callback.report.findings == []


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_in_lightning_itself():
    lightning = importlib.import_module("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for shuffle in (True, False):
        callback = check.lightning_callback()
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet
        )
        data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
        trainer.fit(Classifier(), DataLoader(data, batch_size=8, shuffle=shuffle))
        found = [finding.pitfall for finding in callback.report.findings]
        assert found == ([] if shuffle else ["same-order-every-epoch"])


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_in_the_hugging_face_trainer_itself(tmp_path: Any):
    transformers = importlib.import_module("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Any, labels: Any = None, **more: Any) -> dict[str, Any]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}  # divides by no num_items_in_batch

    data = [{"x": torch.randn(4), "labels": i % 3} for i in range(64)]
    callback = check.hf_callback()
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **sizes, **quiet)
    transformers.Trainer(model=Model(), args=args, train_dataset=data, callbacks=[callback]).train()
    assert [finding.pitfall for finding in callback.report.findings] == ["accumulation-not-divided"]
