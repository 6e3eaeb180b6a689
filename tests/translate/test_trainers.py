"""The translations for Accelerate, Lightning and Transformers, executed by them where they are installed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from onehour.planner import plan
from onehour.translate import translate

# Their own imports warn, and starting processes that import them takes long.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(240)]

PACKAGES = {"accelerate": "accelerate", "lightning": "lightning.pytorch", "hf": "transformers"}
ALL = ["torch", *PACKAGES]


@pytest.fixture(params=ALL)
def tool(request: pytest.FixtureRequest, acting: ModuleType) -> str:
    """The name of a tool that is installed."""
    acting.define_operators()
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
        if request.param == "hf":
            pytest.importorskip("accelerate")
    return request.param


@pytest.fixture
def alone(acting: ModuleType, small: Callable, tmp_path: Path) -> Callable[..., tuple[Any, list[float]]]:
    """A whole run in this process: the net and its rates."""
    return lambda tool, **changes: acting.act(
        tool, acting.execute(translate(plan(small(**changes), processes=1), tool)), tmp_path
    )


def distance(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of weights; running statistics move once a pass, so they depend on the passes."""
    assert state.keys() == other.keys()
    return max(
        float((state[key] - other[key]).abs().max()) for key in state if "running" not in key and "num" not in key
    )


@pytest.mark.parametrize("changes", [{}, {"decay": "cosine"}, {"warmup": "constant"}], ids=str)
def test_every_rate_of_a_run_is_ours(tool: str, alone, farthest, small, changes: dict[str, Any]):
    _, rates = alone(tool, **changes)
    assert len(rates) == 500
    assert farthest(small(**changes), rates) <= 1e-9


def test_weights_are_those_of_plain_torch(tool: str, alone):
    """Which they would not be with another mean, a clipped gradient, or other samples."""
    found, expected = (alone(name)[0].state_dict() for name in (tool, "torch"))
    assert distance(found, expected) <= 1e-9


def test_two_processes_do_what_one_does(tool: str, alone, farthest, small, tmp_path: Path):
    (tmp_path / "large.py").write_text(translate(plan(small()), tool), encoding="utf-8")
    act = [str(Path(__file__).parent / "act.py"), tool, str(tmp_path / "large.py"), str(tmp_path / "result.pt")]
    world = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *act]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(world, env=os.environ | own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt")
    assert len(result["rates"]) == 500
    assert farthest(small(), result["rates"]) <= 1e-9
    assert distance(result["state"], alone(tool)[0].state_dict()) <= 1e-9
    for key in ("running_mean", "running_var"):
        assert torch.isfinite(result["state"][f"0.bn.{key}"]).all()


def test_lightning_goes_on_where_it_stopped(acting: ModuleType, alone, farthest, small, tmp_path: Path):
    acting.define_operators()
    pytest.importorskip("lightning.pytorch")
    text = translate(plan(small(), processes=1), "lightning")
    stopped, checkpoint = acting.execute(text), tmp_path / "stopped.ckpt"
    make = stopped["make_trainer"]

    def stopping(**options: Any) -> Any:
        trainer = make(**(options | {"max_steps": 123}))
        fit = trainer.fit

        def fit_and_save(module: Any) -> None:
            fit(module)
            trainer.save_checkpoint(checkpoint)

        trainer.fit = fit_and_save
        return trainer

    stopped["make_trainer"] = stopping
    _, first = acting.act("lightning", stopped, tmp_path)

    resumed = acting.execute(text)

    def resuming(**options: Any) -> Any:
        trainer = make(**options)
        fit = trainer.fit
        trainer.fit = lambda module: fit(module, ckpt_path=checkpoint, weights_only=False)
        return trainer

    resumed["make_trainer"] = resuming
    model, second = acting.act("lightning", resumed, tmp_path)
    assert (len(first), len(second)) == (123, 377)
    assert farthest(small(), first + second) <= 1e-9
    assert distance(model.state_dict(), alone("lightning")[0].state_dict()) <= 1e-9


def test_a_scheduler_given_to_accelerate_is_stepped_once_for_each_process(tmp_path: Path):
    """What the translation says of accelerator.prepare, and why it leaves the scheduler out."""
    pytest.importorskip("accelerate")
    script = tmp_path / "prepared.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "accelerator, model = Accelerator(), torch.nn.Linear(1, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=1.0)\n"
        "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))\n"
        "model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)\n"
        "accelerator.backward(model(torch.ones(1, 1, device=accelerator.device)).sum())\n"
        "optimizer.step(); scheduler.step()\n"
        "assert scheduler.scheduler.last_epoch == accelerator.num_processes == 2\n"
        "import os; os._exit(0)\n",  # as in act.py
        encoding="utf-8",
    )
    world = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(world, env=os.environ | own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
