"""A model by name or by package.module:function."""

import sys
from types import ModuleType

import pytest
import torch

from onehour.models.load import MODELS, load_model


@pytest.mark.parametrize("name", list(MODELS))
def test_every_named_model_takes_the_datas_channels_and_classes(name: str):
    with torch.device("meta"):
        model = load_model(name, channels=1, classes=7)
        logits = model.eval()(torch.zeros(2, 1, 64, 64))
    assert tuple(logits.shape) == (2, 7)


def test_a_function_of_ones_own_is_called_without_arguments(tiny: ModuleType):
    model = load_model("tinytask:net", channels=9, classes=None)
    assert tuple(model(torch.randn(2, 1, 4, 4)).shape) == (2, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet5", "no model is called 'resnet5'; expected resnet50"),
        ("", "no model is called ''; expected one of resnet8"),
        ("nowhere.models:net", r"model nowhere\.models:net: nowhere\.models cannot be imported: ModuleNotFoundError"),
        ("tinytask:nett", "tinytask has no 'nett'; expected net"),
        ("tinytask:failing", "model tinytask:failing failed when called: RuntimeError: no disk"),
        ("tinytask:number", r"model tinytask:number returned int; expected a torch\.nn\.Module"),
    ],
)
def test_a_model_that_cannot_be_found_or_made_is_one_message(tiny: ModuleType, spec: str, message: str):
    with pytest.raises(ValueError, match=message) as raised:
        load_model(spec, channels=1, classes=3)
    assert len(str(raised.value).splitlines()) == 1


def test_a_named_model_must_know_the_classes():
    with pytest.raises(ValueError, match="must know how many classes the data has; give --classes"):
        load_model("resnet50", channels=3, classes=None)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed_is_named_with_the_command(library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"needs a package: pip install 'onehour\[vision\]'"):
        load_model(f"{library}:resnet50", channels=3, classes=10)
