"""What only a GPU can show: the same trainer on CUDA, in bfloat16, channels_last and compiled; NCCL."""

from pathlib import Path

import pytest
import torch

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.recipes import digits
from onehour.rules.momentum import momentum_form
from onehour.training.verify import trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="is about CUDA itself, and torch sees no GPU here"),
    pytest.mark.filterwarnings("default"),  # CUDA builds of torch warn of what this project does not choose
]

SHORT = {"minibatch": 256, "epochs": 2, "warmup_epochs": 1, "milestones": ("1",)}


def test_a_run_on_cuda_learns_as_on_the_cpu(tmp_path: Path):
    errors = {
        device: onehour.train("digits", **SHORT, device=device, out=tmp_path / device).metrics[-1]["train_error"]
        for device in ("cpu", "cuda")
    }
    assert errors["cuda"] == pytest.approx(errors["cpu"], abs=3)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}, {"compile": True}])
def test_every_option_trains(options: dict, tmp_path: Path):
    run = onehour.train("digits", **SHORT, **options, device="cuda", out=tmp_path / "run")
    assert run.metrics[-1]["train_error"] < 40


def test_float64_steps_equal_the_cpus(tmp_path: Path):
    recipe: Recipe = digits(minibatch=64, base_lr=0.05)
    states = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        trace(recipe, steps=5, group=Group(device=torch.device(device)), folder=folder)
        from safetensors.torch import load_file

        states[device] = load_file(folder / "p1-fast-float64.safetensors")
    for name, tensor in states["cpu"].items():
        assert torch.allclose(tensor.double(), states["cuda"][name].double(), atol=1e-9), name


def test_canonical_runs_repeat_their_bits(tmp_path: Path):
    digests = {
        onehour.train("digits", **SHORT, reduce="canonical", device="cuda", out=tmp_path / name).summary["state_sha256"]
        for name in "ab"
    }
    assert len(digests) == 1


def test_not_finite_is_masked_on_the_device(tmp_path: Path):
    with pytest.raises(ArithmeticError, match="not finite"):
        onehour.train("digits", **SHORT, base_lr=1e30, device="cuda", out=tmp_path / "run")


def test_the_momentum_form_is_probed_on_the_device():
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    assert momentum_form(torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)) == "outside"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two processes on one GPU")
def test_verify_over_nccl(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "digits", "--processes", "1,2", "--steps", "5"]) == 0
