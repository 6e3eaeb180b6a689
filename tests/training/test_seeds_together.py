"""Seeds trained as one network: each is what it would have been alone; one that is not finite disturbs no other."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load
from steps import step_through
from tinytask import after
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from onehour import Recipe
from onehour import recipe as named
from onehour.api import train
from onehour.config import PITFALLS
from onehour.data.digits import digits
from onehour.data.sources import Data, complete
from onehour.dist.group import Group
from onehour.entry import asked_for
from onehour.execution import Execution
from onehour.models.resnet import resnet8
from onehour.rules.keys import seed_for
from onehour.training.build import build_model
from onehour.training.decisions import decisions_of
from onehour.training.evaluate import OpenedWeights
from onehour.training.loop import train_run
from onehour.training.record import NonFiniteError, Run, StoppedError, latest_contents
from onehour.training.seeds import Seeds, SeedsFeed, refuse_joining, train_seeds
from onehour.training.state import Network, model_state, optimizer_state

SEEDS = range(3)


def folders(where: Path, seeds: Sequence[int] = SEEDS) -> list[Path]:
    return [where / str(seed) for seed in seeds]


def together(recipe: Recipe, data: Data, where: Path, seeds: Sequence[int] = SEEDS, **options: Any) -> list[Run]:
    recipes = [recipe.replace(seed=seed) for seed in seeds]
    train_seeds(recipes, data, folders(where, seeds), Group(), **options)
    return [Run(folder) for folder in folders(where, seeds)]


def apart(recipe: Recipe, data: Data, where: Path, seeds: Sequence[int] = SEEDS) -> list[Run]:
    for seed, folder in zip(seeds, folders(where, seeds), strict=True):
        train_run(recipe.replace(seed=seed), data, Execution(out=folder), Group())
    return [Run(folder) for folder in folders(where, seeds)]


def state(run: Run) -> dict[str, Tensor]:
    """Weights, statistics and velocity of the newest checkpoint."""
    contents = latest_contents(run.folder)
    assert contents is not None
    return load(contents[0]) | load(contents[1])


def assert_alike(found: list[Run], expected: list[Run], atol: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(state(one), state(other), rtol=0, atol=atol)
        for mine, alone in zip(one.metrics, other.metrics, strict=True):
            assert mine == pytest.approx(alone, abs=100 * atol)
        assert one.summary["final_error"] == other.summary["final_error"]


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_seeds_of_a_residual_network_on_digits_in_float64_for_20_steps(tmp_path: Path):
    """Two fused passes of two workers; epochs of 5 iterations; γ of zero and a changing rate."""
    recipe = named("digits", minibatch=32, per_worker=8, base_minibatch=16, base_lr=0.1, precision="float64")
    recipe = recipe.replace(samples=160, classes=10, epochs=4, warmup_epochs=2, milestones=("3",))
    train_side, validation = digits()
    data = Data.of(TensorDataset(*train_side[:160]), TensorDataset(*validation[:300]))
    refuse_joining(recipe, data, Group())
    seeds = range(2)
    assert_alike(together(recipe, data, tmp_path / "a", seeds), apart(recipe, data, tmp_path / "b", seeds))


EXACT: dict[str, Any] = {"precision": "float64", "base_minibatch": 4, "epochs": 2, "weight_decay": 0.01}
"""12 iterations of 2 workers; the rate grows for the first 6."""

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no momentum": {"nesterov": False, "momentum": 0.0},
    "smoothed labels": {"label_smoothing": 0.1},
    "adam": {"optimizer": "adam", "scaling": "sqrt", "base_lr": 0.01},
    "rmsprop": {"optimizer": "rmsprop", "scaling": "sqrt", "base_lr": 0.001},
    "frozen, and rates": {"freeze": ("0.*", "1.*"), "layer_rates": ("4.weight=0.1",)},
    "a ramp": {"minibatch": 16, "ramp": ("8:1",)},
    "straddling": {"minibatch": 20, "base_minibatch": 12, "epochs": 5},
    **{pitfall: {"pitfall": pitfall} for pitfall in PITFALLS},
}


@pytest.mark.parametrize(
    ("variant", "model"),
    [
        *((variant, "net") for variant in VARIANTS),
        *((variant, "plain") for variant in ("the recipe", "adam")),
        ("the recipe", "linear"),
    ],
)
def test_seeds_are_what_they_are_alone(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, model: str
):
    """Convolution and BatchNorm2d, or linear layers and BatchNorm1d, or no BatchNorm at all."""
    if model != "net":
        monkeypatch.setattr(tiny, "net", plain if model == "plain" else linear)
    recipe, data = complete(tiny.recipe(**(EXACT | VARIANTS[variant])))
    refuse_joining(recipe, data, Group())
    seeds = range(2)
    assert_alike(together(recipe, data, tmp_path / "a", seeds), apart(recipe, data, tmp_path / "b", seeds))


def test_mixed_precision_trains_together_as_apart(tiny: ModuleType, tmp_path: Path):
    """bfloat16 keeps 8 bits."""
    recipe, data = complete(tiny.recipe(precision="bf16"))
    found, expected = together(recipe, data, tmp_path / "a"), apart(recipe, data, tmp_path / "b")
    for one, other in zip(found, expected, strict=True):
        assert {tensor["dtype"] for tensor in one.summary["parameter_tensors"].values()} == {"float32"}
        assert one.metrics[-1]["train_loss"] == pytest.approx(other.metrics[-1]["train_loss"], rel=0.1)


def test_workers_that_do_not_fit_a_pass_take_several(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, data = complete(tiny.recipe(**EXACT, minibatch=24, pitfall="batchnorm-stats-k-times"))
    fused = together(recipe, data, tmp_path / "fused")
    monkeypatch.setattr("onehour.training.feeds.PASS_BYTES", {"cpu": 1})
    single = together(recipe, data, tmp_path / "single")
    assert [run.environment["workers_per_pass"] for run in (fused[0], single[0])] == [6, 1]
    assert_alike(single, fused)


@pytest.fixture(scope="module")
def whole(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three undisturbed seeds in float32: 12 iterations, evaluations at 6 and 12."""
    return together(*complete(tiny.recipe()), tmp_path_factory.mktemp("whole"))


def test_every_folder_is_a_whole_runs_folder(tiny: ModuleType, whole: list[Run], tmp_path: Path):
    alone = train(tiny.recipe(), out=tmp_path / "alone", hang_timeout=None)  # whose watchdog leaves a file, if slow
    for seed, run in zip(SEEDS, whole, strict=True):
        names = {path.name for path in run.folder.iterdir()}
        assert names == {path.name for path in alone.folder.iterdir()}
        assert run.recipe == alone.recipe.replace(seed=seed)
        assert run.finished
        assert [list(line) for line in run.metrics] == [list(line) for line in alone.metrics]
        assert [list(line) for line in run.timing] == [list(line) for line in alone.timing]
        assert [(line["images"], len(line["steps_ms"])) for line in run.timing] == [(48, 6), (48, 6)]
        assert set(run.summary) == {*alone.summary, "seeds_together"}
        assert run.summary["seeds_together"] == run.environment["seeds_together"] == 3
        assert run.summary["seed"] == seed
        assert run.final_error == run.summary["final_error"]
        assert latest_contents(run.folder) is not None
    # Each is given its share of the time, and so all of them the same.
    assert len({run.summary["seconds_training"] for run in whole}) == 1
    assert len({run.summary["weights_sha256"] for run in whole}) == 3


def assert_same(found: list[Run], expected: list[Run]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.summary["state_sha256"] == other.summary["state_sha256"]
        assert (one.folder / "metrics.jsonl").read_bytes() == (other.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_stopped_and_gone_on_leaves_the_bits_of_an_undisturbed_one(
    tiny: ModuleType, whole: list[Run], tmp_path: Path, stop: int
):
    recipe, data = complete(tiny.recipe())
    with pytest.raises(StoppedError, match=f"stopped after iteration {stop} and saved"):
        together(recipe, data, tmp_path, stop_asked=after(stop))
    assert not any(Run(folder).summary for folder in folders(tmp_path))
    assert_same(together(recipe, data, tmp_path), whole)
    sessions = json.loads((tmp_path / "0" / "environment.json").read_text())["sessions"]
    assert [session["from_iteration"] for session in sessions] == [0, stop]


def test_stopped_in_the_last_iteration_is_finished(tiny: ModuleType, whole: list[Run], tmp_path: Path):
    assert_same(together(*complete(tiny.recipe()), tmp_path, stop_asked=after(12)), whole)


def test_one_that_was_killed_before_its_summary_is_finished_from_its_checkpoint(
    tiny: ModuleType, whole: list[Run], tmp_path: Path
):
    recipe, data = complete(tiny.recipe())
    runs = together(recipe, data, tmp_path)
    (tmp_path / "1" / "summary.json").unlink()
    together(recipe, data, tmp_path, seeds=[1])
    assert_same(runs, whole)


def test_folders_at_different_iterations_go_on_in_groups(tiny: ModuleType, tmp_path: Path):
    recipe, data = complete(tiny.recipe(**EXACT))
    for seeds, stop in (([0, 2], 8), ([1], 3)):
        with pytest.raises(StoppedError):
            together(recipe, data, tmp_path / "a", seeds, stop_asked=after(stop))
    found = together(recipe, data, tmp_path / "a", range(4))
    assert_alike(found, apart(recipe, data, tmp_path / "b", range(4)))
    assert [run.environment["from_iteration"] for run in found] == [8, 3, 8, 0]
    assert [run.summary["seeds_together"] for run in found] == [2, 1, 2, 1]


def test_what_was_begun_together_can_be_finished_alone_and_the_other_way_round(tiny: ModuleType, tmp_path: Path):
    recipe, data = complete(tiny.recipe(**EXACT))
    with pytest.raises(StoppedError):
        together(recipe, data, tmp_path / "a", stop_asked=after(8))
    found = [train(recipe.replace(seed=seed), out=tmp_path / "a" / str(seed)) for seed in SEEDS]
    for seed in SEEDS:
        with pytest.raises(StoppedError):
            train(recipe.replace(seed=seed), out=tmp_path / "b" / str(seed), stop_asked=after(8))
    assert_alike(together(recipe, data, tmp_path / "b"), found)
    for run in (found[1], Run(tmp_path / "b" / "1")):
        result = OpenedWeights(run.folder, recipe=asked_for(run.recipe, trust=True), device="cpu").evaluate()
        assert result.error == run.metrics[-1]["top1_error"]
        assert result.loss == pytest.approx(run.metrics[-1]["val_loss"], abs=1e-10)


def test_a_folder_of_another_recipe_is_refused_before_anything_is_trained(tiny: ModuleType, tmp_path: Path):
    recipe, data = complete(tiny.recipe(epochs=1))
    together(recipe.replace(base_lr=0.3), data, tmp_path, seeds=[1])
    with pytest.raises(ValueError, match=r"base_lr: 0\.3 → 0\.1"):
        together(recipe, data, tmp_path)
    assert not (tmp_path / "0" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "tinytask:listed", "classes": 3}, "does not lie in memory"),
        ({"cutmix": 1.0}, "random_erasing, mixup and cutmix draw other numbers for each seed"),
        ({"reduce": "canonical"}, "canonical, compile and channels_last are for single runs"),
        ({"compile": True}, "are for single runs"),
        ({"clip_norm": 1.0}, "clip_norm and ema are for single runs"),
        ({"ema": 0.9}, "clip_norm and ema are for single runs"),
        ({"channels_last": True}, "are for single runs"),
        ({"init": "a.pt"}, "init and validation are for single runs"),
        ({"data": "tinytask:one", "validation": 0.25}, "each seed divides the data for itself"),
        ({"optimizer": "torch.optim:SGD"}, "optimizer torch.optim:SGD may look at whole tensors"),
        ({"model": "tinytask:failing"}, "failed when called: RuntimeError: no disk"),
    ],
)
def test_what_cannot_be_joined_is_refused_with_the_reason(tiny: ModuleType, changes: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        refuse_joining(*complete(tiny.recipe(**changes)), Group())


@pytest.mark.parametrize("samples", [4, 9, 13])
def test_few_training_samples_are_enough_to_try_a_model(tiny: ModuleType, samples: int):
    images, labels = tiny.data()[0].tensors
    data = (TensorDataset(images[:samples], labels[:samples]), tiny.data()[1])
    recipe, loaded = complete(tiny.recipe(minibatch=4, base_minibatch=4), data)
    refuse_joining(recipe, loaded, Group())


@pytest.mark.slow
def test_whole_runs_together_and_apart_agree_statistically_and_do_not_repeat_each_other(tmp_path: Path):
    """Six seeds each, since with four no ordering of the errors has a p below .01; other seeds, so independent."""
    stats = pytest.importorskip("scipy.stats")
    recipe, data = complete(named("digits", minibatch=256, epochs=8, warmup_epochs=2, milestones=("4", "6")))
    refuse_joining(recipe, data, Group())
    found = together(recipe, data, tmp_path / "together", range(6))
    expected = apart(recipe, data, tmp_path / "apart", range(6, 12))
    errors = [[run.final_error for run in runs] for runs in (found, expected)]
    assert stats.mannwhitneyu(*errors, alternative="two-sided", method="exact").pvalue > 0.01
    assert all(1 < error < 15 for side in errors for error in side)
    assert len({tuple(record["val_loss"] for record in run.metrics) for run in found}) == 6


BAD = 1


def spoiled(make: Callable[[], nn.Module], spoil: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    """A model function whose model is spoiled for seed 1 alone."""

    def built() -> nn.Module:
        model = make()
        if torch.initial_seed() == seed_for(BAD, "weights"):
            with torch.no_grad():
                spoil(model)
        return model

    return built


def first_weight(value: float) -> Callable[[nn.Module], None]:
    def spoil(model: nn.Module) -> None:
        next(model.parameters()).view(-1)[0] = value

    return spoil


def last_layer_large(model: nn.Module) -> None:
    """The first loss is finite, one after it is not."""
    list(model.parameters())[-2].mul_(1e25)


def huge(model: nn.Module) -> None:
    """Activations whose squares overflow: their variance is infinite, and BatchNorm makes zeros of them."""
    next(model.parameters()).mul_(1e25)


def small_resnet() -> nn.Module:
    return resnet8(classes=3)


@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        *(("net", spoil) for spoil in (first_weight(torch.nan), first_weight(torch.inf), last_layer_large)),
        ("resnet8", last_layer_large),
    ],
    ids=["nan", "inf", "grows", "grows in a residual network"],
)
def test_no_bit_of_the_others_knows_of_a_seed_that_is_not_finite(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str, spoil: Callable[[nn.Module], None]
):
    build = tiny.net if make == "net" else small_resnet
    recipe, data = complete(tiny.recipe(epochs=3))
    monkeypatch.setattr(tiny, "net", build)
    expected = together(recipe, data, tmp_path / "right")
    monkeypatch.setattr(tiny, "net", spoiled(build, spoil))
    found = together(recipe, data, tmp_path / "spoiled")
    for seed in (0, 2):
        assert found[seed].finished
        assert found[seed].summary["state_sha256"] == expected[seed].summary["state_sha256"]
        assert found[seed].metrics == expected[seed].metrics
    bad = found[BAD]
    assert not bad.finished
    assert bad.summary["outcome"] == "non-finite"
    assert bad.summary["final_error"] is None
    assert bad.metrics == []
    with pytest.raises(NonFiniteError):  # alone it does the same
        train(recipe.replace(seed=BAD), out=tmp_path / "alone")


def test_metrics_stop_where_the_numbers_do_and_the_last_finite_checkpoint_stays(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All seeds meet bad images from iteration 9 on; epochs are 6 iterations."""
    monkeypatch.setattr("onehour.training.seeds.SAVE_SECONDS", 0.0)
    images, labels = tiny.data()[0].tensors
    recipe, data = complete(tiny.recipe(epochs=4), (TensorDataset(images, labels), tiny.data()[1]))
    calls: list[int] = []

    def spoil() -> bool:
        calls.append(1)
        if len(calls) == 8:
            images[:, 0, 0, 0] = tiny.HUGE
        return False

    runs = together(recipe, data, tmp_path, stop_asked=spoil)
    assert len(calls) < 24  # none is left, so it does not go on to the end
    for run in runs:
        assert run.summary["outcome"] == "non-finite"
        assert [record["iteration"] for record in run.metrics] == [6]
        contents = latest_contents(run.folder)
        assert contents is not None
        assert json.loads(contents[-1])["iteration"] == 6


def test_stopped_before_an_evaluation_a_bad_seed_is_not_saved_and_ends_when_the_run_goes_on(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny, "net", spoiled(tiny.net, first_weight(torch.nan)))
    recipe, data = complete(tiny.recipe())
    with pytest.raises(StoppedError):
        together(recipe, data, tmp_path, stop_asked=lambda: True)
    assert [latest_contents(tmp_path / str(seed)) is None for seed in range(3)] == [False, True, False]
    runs = together(recipe, data, tmp_path)
    assert [run.summary["outcome"] for run in runs] == ["finished", "non-finite", "finished"]
    assert [len(run.metrics) for run in runs] == [2, 0, 2]


def test_what_is_cleared_is_all_of_that_seed_and_nothing_of_another(tiny: ModuleType):
    recipe, data = complete(tiny.recipe(precision="float64", optimizer="adam"))
    models = [build_model(recipe.replace(seed=seed), data, torch.device("cpu")) for seed in range(3)]
    decisions = [decisions_of(recipe.replace(seed=seed)) for seed in range(3)]
    seeds = Seeds(decisions[0], [Network(model, decisions[0].optimizer(model)) for model in models])
    streams = [decision.stream() for decision in decisions]
    feed = SeedsFeed(data.train, seeds=3, device=torch.device("cpu"), streams=streams)
    batches = feed.passes([range(2)], start=0, stop=2)
    step = step_through(recipe, seeds, [range(2)])
    step(0, batches)
    before = {name: tensor.clone() for name, tensor in shared(seeds.model, seeds.optimizer).items()}
    seeds.clear(BAD)
    for name, tensor in shared(seeds.model, seeds.optimizer).items():
        for seed, (now, then) in enumerate(zip(tensor.chunk(3), before[name].chunk(3), strict=True)):
            assert torch.equal(now, torch.zeros_like(then) if seed == BAD else then)
    assert step(1, batches).sums.isfinite().all()


def shared(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is divided among the seeds: all but counts."""
    state = model_state(model) | optimizer_state(optimizer, model)
    return {name: tensor for name, tensor in state.items() if tensor.ndim}


class Root(nn.Module):
    """Nothing is added to its input, by way of √0, whose gradient is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).sqrt()


def test_what_no_loss_tells_is_found_at_the_evaluation(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A single iteration with a finite loss, and a gradient or a variance that is not."""

    def rooted() -> nn.Module:
        conv, *rest = tiny_net().children()
        return nn.Sequential(conv, Root(), *rest)

    tiny_net = tiny.net
    recipe, data = complete(tiny.recipe(minibatch=48, base_minibatch=48, epochs=1))
    for name, net, bad in (("gradient", rooted, {0, 1, 2}), ("variance", spoiled(tiny_net, huge), {BAD})):
        monkeypatch.setattr(tiny, "net", net)
        with pytest.raises(NonFiniteError):
            train(recipe.replace(seed=BAD), out=tmp_path / name / "alone")
        runs = together(recipe, data, tmp_path / name)
        assert {seed for seed, run in enumerate(runs) if run.summary["outcome"] == "non-finite"} == bad
        assert {seed for seed, run in enumerate(runs) if run.metrics == []} == bad
