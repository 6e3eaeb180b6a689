"""What only a GPU can show: the same trainer on CUDA, in bfloat16, channels_last and compiled; NCCL."""

from pathlib import Path

import pytest
import torch

import onehour
from onehour.cli import main
from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.models.resnet import resnet8
from onehour.recipes import digits
from onehour.rules.batchnorm import GhostBatchNorm2d, batchnorm_relu
from onehour.rules.momentum import momentum_form
from onehour.sweeps.verify import trace
from onehour.training.record import StoppedError
from onehour.training.step import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # CUDA builds of torch warn of what this project does not choose
]

SHORT = {"minibatch": 256, "epochs": 2, "warmup_epochs": 1, "milestones": ("1",)}


def test_a_run_on_cuda_learns_as_on_the_cpu(tmp_path: Path):
    errors = {
        device: onehour.train("digits", **SHORT, device=device, out=tmp_path / device).metrics[-1]["train_error"]
        for device in ("cpu", "cuda")
    }
    assert errors["cuda"] == pytest.approx(errors["cpu"], abs=3)


OPTIONS = [
    {"precision": "bf16"},
    {"channels_last": True},
    {"channels_last": True, "precision": "bf16"},
    {"channels_last": True, "reduce": "canonical"},
    {"compile": True},
    {"compile": True, "channels_last": True, "precision": "bf16"},
    {"optimizer": "adamw", "scaling": "sqrt", "base_lr": 0.01, "scale_betas": False},
    {"optimizer": "rmsprop", "scaling": "sqrt", "base_lr": 0.01},
    {"clip_norm": 1.0, "ema": 0.9, "freeze": ("conv1.*", "bn1.*"), "layer_rates": ("fc.*=0.5",)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
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


@pytest.mark.parametrize("channels_last", [False, True])
def test_canonical_runs_repeat_their_bits_captured_or_not(
    channels_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also after a stop and a resume, with another number of passes, and after a run that was not canonical."""
    options = SHORT | {"reduce": "canonical", "channels_last": channels_last, "device": "cuda"}
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    runs = [onehour.train("digits", **options, out=tmp_path / "captured")]
    assert len(replays) > 40, "all but the first iterations are replayed"
    stops = iter([False] * 17 + [True] * 100)
    with pytest.raises(StoppedError):
        onehour.train("digits", **options, out=tmp_path / "stopped", stop_asked=lambda: next(stops))
    runs.append(onehour.train("digits", **options, out=tmp_path / "stopped"))
    monkeypatch.setattr(Step, "_can_be_captured", lambda step: False)
    runs.append(onehour.train("digits", **options, out=tmp_path / "launched"))
    assert len({run.summary["state_sha256"] for run in runs}) == 1
    assert len({str([line["train_loss"] for line in run.metrics]) for run in runs}) == 1


def test_a_model_that_looks_at_a_number_is_launched_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = onehour.train("digits", **SHORT, model=Looks, device="cuda", out=tmp_path / "run")
    assert run.metrics[-1]["train_error"] < 60
    said = capsys.readouterr()
    assert "cannot be captured" in said.out + said.err
    assert "test_gpu.py" in said.out + said.err


class Looks(torch.nn.Module):
    """Waits for the device in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet8()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.net(images)
        return logits * 1.0 if logits.sum().item() > 0 else logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_equations(dtype: torch.dtype):
    """As tests/rules/test_kernels.py by the interpreter; here beside torch's own in float64."""
    torch.manual_seed(0)
    x = torch.randn(24, 70, 9, 9, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    shortcut, upstream = torch.randn_like(x), torch.randn_like(x)
    results = []
    for kind in (dtype, torch.float64):
        layer = GhostBatchNorm2d(70, per_worker=8, device="cuda", dtype=torch.promote_types(kind, torch.float32))
        given = x.to(kind, copy=True, memory_format=torch.preserve_format).requires_grad_()
        out = batchnorm_relu(layer, given, shortcut.to(kind))
        out.backward(upstream.to(kind))
        found = (out, given.grad, layer.weight.grad, layer.bias.grad, layer.running_var)
        results.append([tensor.detach().double() for tensor in found if tensor is not None])
    for mine, exact in zip(*results, strict=True):
        assert (mine - exact).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


def test_not_finite_is_masked_on_the_device(tmp_path: Path):
    with pytest.raises(ArithmeticError, match="not finite"):
        onehour.train("digits", **SHORT, base_lr=1e30, device="cuda", out=tmp_path / "run")


def test_the_momentum_form_is_probed_on_the_device():
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    assert momentum_form(torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)) == "outside"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two processes on one GPU")
def test_verify_over_nccl(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "digits", "--processes", "1,2", "--steps", "5"]) == 0
