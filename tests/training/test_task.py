"""A task of one's own: what it may return, what becomes of it, and one message for each thing that it may not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from onehour import Sums, train
from onehour.config import Recipe
from onehour.data.samples import Form, Keyed
from onehour.training.record import Metric, NonFiniteError, Run, StoppedError
from onehour.training.task import CLASSIFICATION, OwnTask

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"minibatch": 8, "per_worker": 4, "base_minibatch": 8, "epochs": 1, "warmup": "none"}


def data() -> tuple[TensorDataset, TensorDataset]:
    """Three tensors a sample: numbers, targets, and whether they count."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, generator=draw)
    counts = torch.rand(48, generator=draw) < 0.6
    return TensorDataset(x[:32], x[:32].sum(1), counts[:32]), TensorDataset(x[32:], x[32:].sum(1), counts[32:])


def squares(model: Any, batch: Any) -> Sums:
    x, y, counts = batch
    off = (model(x)[:, 0] - y)[counts]
    return Sums(off.square().sum(), counts.sum(), {"distance [m]": (off.abs().sum(), counts.sum())})


def run(tmp_path: Path, task: Callable[..., Any] = squares, **options: Any) -> Run:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"model": nn.Linear(3, 1), "data": data(), "out": tmp_path / "run", **SHORT}
    return train(Recipe(name="own"), task=task, **(chosen | options))


def test_the_record_has_the_tasks_metrics_and_the_untrained_networks(tmp_path: Path):
    found = run(tmp_path, epochs=2)
    untrained, lines = found.untrained, found.metrics
    assert untrained is not None
    assert (untrained["iteration"], untrained["train_loss"], len(lines)) == (0, None, 2)
    assert lines[-1]["metrics"].keys() == {"distance [m]"}
    assert lines[-1]["metrics"]["distance [m]"] < untrained["metrics"]["distance [m]"]
    assert found.metric == Metric("distance", "m")
    assert found.final_error == pytest.approx(sum(line["top1_error"] for line in lines) / 2)
    assert "final distance" in repr(found)


def test_a_metric_is_the_quotient_of_sums_over_all_samples(tmp_path: Path):
    found = run(tmp_path)
    model = nn.Linear(3, 1)
    model.load_state_dict(load_file(max((found.folder / "checkpoints").glob("*/model.safetensors"))))
    x, y, counts = data()[1].tensors
    off = (model(x)[:, 0] - y)[counts].detach()
    assert found.metrics[-1]["top1_error"] == pytest.approx(float(off.abs().mean()), rel=1e-6)
    assert found.metrics[-1]["val_loss"] == pytest.approx(float(off.square().mean()), rel=1e-6)


def test_without_metrics_the_loss_is_the_runs(tmp_path: Path):
    found = run(tmp_path, lambda model, batch: Sums(squares(model, batch).loss, squares(model, batch).count))
    assert found.metric == Metric("loss")
    assert found.metrics[-1]["top1_error"] == found.metrics[-1]["val_loss"]
    assert found.metrics[-1]["train_metrics"]["loss"] == found.metrics[-1]["train_loss"]


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path):
    whole = run(tmp_path, epochs=3)
    calls: list[int] = []
    stopped: dict[str, Any] = {"epochs": 3, "out": tmp_path / "stopped"}
    with pytest.raises(Exception, match="stopped after iteration 6"):
        run(tmp_path, stop_asked=lambda: calls.append(1) or len(calls) == 6, **stopped)
    again = run(tmp_path, **stopped)
    assert again.summary["state_sha256"] == whole.summary["state_sha256"]
    assert again.metrics == whole.metrics
    assert again.untrained == whole.untrained


def test_a_tasks_random_numbers_are_keyed_in_training_and_evaluation(tmp_path: Path, tiny: Any):
    """With a network of ours, which draws none."""

    def noisy(model: nn.Module, batch: Any) -> Sums:
        images, labels = batch
        return Sums(F.cross_entropy(model(images + torch.randn_like(images)), labels, reduction="sum"), len(labels))

    options: dict[str, Any] = {"model": "resnet8", "data": tiny.data(), "classes": 3}
    whole, asked = run(tmp_path, noisy, **options), iter(range(9))
    with pytest.raises(StoppedError):
        run(tmp_path, noisy, out=tmp_path / "stopped", stop_asked=lambda: next(asked) == 3, **options)
    again = run(tmp_path, noisy, out=tmp_path / "stopped", **options)
    assert again.summary["state_sha256"] == whole.summary["state_sha256"]
    assert again.metrics == whole.metrics


def test_a_run_whose_metrics_have_changed_since_is_refused(tmp_path: Path):
    more: dict[str, Any] = {}

    def counting(model: nn.Module, batch: Any) -> Sums:
        found = squares(model, batch)
        return Sums(found.loss, found.count, {**found.metrics, **more})

    calls: list[int] = []
    with pytest.raises(Exception, match="stopped after iteration 3"):
        run(tmp_path, counting, stop_asked=lambda: calls.append(1) or len(calls) == 3)
    more["another"] = (1, 1)
    with pytest.raises(ValueError, match="counts 6 sums, and 4 when the run was saved: its metrics have changed"):
        run(tmp_path, counting)


def test_a_metric_that_is_undefined_counts_as_the_worst_that_there_is(tmp_path: Path):
    def precise(model: nn.Module, batch: Any) -> Sums:
        found = squares(model, batch)
        passes.extend([1] * model.training)
        right = int(model.training or len(passes) > 8)
        return Sums(found.loss, found.count, {"precision": (right, right)}, higher_is_better=["precision"])

    passes: list[int] = []  # of training; an epoch has 8
    found = run(tmp_path, precise, epochs=2, ema=0.9)
    assert [line["top1_error"] for line in found.metrics] == [-math.inf, 1]
    assert [line["ema_top1_error"] for line in found.metrics] == [-math.inf, 1]
    assert found.summary["outcome"] == "finished"
    assert (found.summary["final_error"], found.summary["ema_final_error"]) == (None, None)


def test_cross_entropy_as_a_task_learns_what_classification_does(tmp_path: Path, tiny: Any):
    def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Sums:
        images, labels = batch
        logits = model(images)
        wrong = (logits.argmax(1) != labels).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return Sums(loss, len(labels), {"top-1 error %": (100 * wrong, len(labels))})

    common: dict[str, Any] = {"data": tiny.data(), "workers_per_pass": 1}
    own = train(tiny.recipe(), task=classify, model=tiny.net, out=tmp_path / "own", **common)
    usual = train(tiny.recipe(), model=tiny.net, out=tmp_path / "usual", **common)
    assert own.metric == Metric("top-1 error", "%")
    assert [line["top1_error"] for line in own.metrics] == [line["top1_error"] for line in usual.metrics]


def test_only_samples_of_a_task_may_be_anything():
    samples = [({"x": torch.ones(2), "name": "a"}, 3), ({"x": torch.zeros(2), "name": "b"}, 4)]
    batch, skipped = Keyed(samples, 0, form=Form(own=True)).batch([(0, 0, 0), (0, 1, 1)])
    assert batch[0]["name"] == ["a", "b"]
    assert batch[1].tolist() == [3, 4]
    assert skipped == []
    listed, _ = Keyed(samples, 0, form=Form(own=True, collate=lambda several: several)).batch([(0, 1, 0)])
    assert listed[0] is samples[1]


class Arrays:
    """Of numbers, of texts and of objects."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        parts = np.array([np.zeros(1), np.zeros(2)], object)
        return {"x": np.full(3, index, np.float32)[::-1], "name": np.array(["a", "b"])[index % 2], "parts": parts}


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_collate_is_given_arrays_as_the_data_set_gives_them(loaders: int, tmp_path: Path):
    def batch(samples: list[Any]) -> Any:
        x = torch.stack([torch.from_numpy(sample["x"].copy()) for sample in samples])
        return x, x.sum(1), x[:, 0] >= 0, [sample["name"].upper() for sample in samples]

    def named(model: nn.Module, batch: Any) -> Sums:
        assert set(batch[3]) <= {"A", "B"}
        return squares(model, batch[:3])

    assert run(tmp_path, named, data=(Arrays(), Arrays()), collate=batch, loaders=loaders, base_lr=0.001).finished


def _means(model: nn.Module, batch: Any) -> Sums:
    return Sums(squares(model, batch).loss / batch[2].sum(), 1)


def _means_of_many(model: nn.Module, batch: Any) -> Sums:
    return Sums(squares(model, batch).loss / batch[2].sum(), batch[2].sum())


def _renaming(model: nn.Module, batch: Any) -> Sums:
    return Sums(squares(model, batch).loss, 4, {f"error of {len(batch[0])}": (1, 1)})


def _elsewhere(model: nn.Module, batch: Any) -> Sums:
    return Sums(squares(model, batch).loss, torch.tensor(4, device="meta"))


NONE = {"distance [m]": (0, 0)}
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a mean": (_means, r"returns a mean: for all samples twice its loss is .* Return sums"),
    "a mean of many": (_means_of_many, "returns a mean"),
    "another name": (_renaming, "named its metrics error of 2 at first, and error of 4 now: keep their names"),
    "sums elsewhere": (_elsewhere, "its count lies on meta, the model on cpu; add it up there"),
    "no sums": (lambda model, batch: squares(model, batch).loss, "returned a Tensor; expected onehour.Sums"),
    "a number for a loss": (
        lambda model, batch: Sums(cast(Any, 1.0), 1),
        "its loss is a float; expected a floating-point tensor",
    ),
    "losses": (lambda model, batch: Sums(model(batch[0]), 1), r"its loss has shape \(2, 1\); expected one number"),
    "a metric's value": (
        lambda model, batch: Sums(squares(model, batch).loss, 2, {"error": cast(Any, torch.ones(()))}),
        r"metric 'error' is a Tensor; expected \(Σ a, Σ b\)",
    ),
    "an unknown direction": (
        lambda model, batch: Sums(squares(model, batch).loss, 2, higher_is_better=["accuracy"]),
        "higher_is_better names 'accuracy', which is none of its metrics",
    ),
    "a fault": (lambda model, batch: batch["x"], "task .* failed: .*TypeError"),
    "a detached loss": (
        lambda model, batch: Sums(squares(model, batch).loss.detach(), 2),
        "the loss depends on no trained parameter",
    ),
    "nothing counted in training": (
        lambda model, batch: Sums(squares(model, batch).loss, 0 if model.training else 2),
        "counted nothing over all workers of iteration 1: a mean over none has no value",
    ),
    "nothing computed in training": (
        lambda model, batch: squares(model, batch) if not model.training else Sums(torch.zeros(()), 0, NONE),
        "counted nothing over all workers of iteration 1: a mean over none has no value",
    ),
    "nothing counted in validation": (
        lambda model, batch: Sums(squares(model, batch).loss, 2 if model.training else 0),
        "counted nothing in all 16 validation samples",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_message_says_what_a_task_may_not_do(what: str, tmp_path: Path):
    task, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, task, clip_norm=1.0)


def test_a_worker_that_counts_nothing_is_none_of_them(tmp_path: Path):
    def of_one_worker(model: nn.Module, batch: Any) -> Sums:
        if model.training and not batch[2].any():
            return Sums(torch.zeros(()), 0, NONE)
        return squares(model, batch)

    sides = tuple(TensorDataset(*side.tensors[:2], torch.arange(len(side)) % 3 == 0) for side in data())
    found = run(tmp_path, of_one_worker, data=sides)
    usual = run(tmp_path, squares, data=sides, out=tmp_path / "usual")
    assert found.summary["state_sha256"] == usual.summary["state_sha256"]


def test_a_target_that_is_not_finite_is_named(tmp_path: Path):
    train_side, validation = data()
    train_side.tensors[1][5], train_side.tensors[2][5] = math.nan, True
    with pytest.raises(ValueError, match="training sample 5 is not finite: 1 of its 1 values is NaN"):
        run(tmp_path, data=(train_side, validation))


@pytest.mark.parametrize("kind", ["packed rows", "an infinite mask"])
def test_what_is_no_sample_is_not_taken_for_one(kind: str, tmp_path: Path):
    """A run that diverges names no sample where none holds a NaN."""
    bad = torch.full((4 * 8, 1), math.nan) if kind == "packed rows" else torch.full((4, 2), -math.inf)

    def batch(samples: list[Any]) -> Any:
        x, y, counts = (torch.stack([sample[part] for sample in samples]) for part in range(3))
        return x, y, counts, bad

    def diverging(model: nn.Module, batch: Any) -> Sums:
        found = squares(model, batch[:3])
        return Sums(found.loss * (math.nan if model.training else 1), found.count, found.metrics)

    with pytest.raises(NonFiniteError):
        run(tmp_path, diverging, collate=batch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "missing:task"], "task missing:task: missing cannot be imported"),
        (["--collate", "math:sqrt"], "collate makes batches for a task of your own; give a task too"),
        (["--task", "tinytask:nett"], "tinytask has no 'nett'; expected net"),
        (["--task", "tinytask:net", "--classes", "10"], "task tinytask:net failed"),
    ],
)
def test_bad_names_are_one_message(flags: list[str], message: str, alone: Path, refused: Any):
    assert message in refused(["train", "digits", *flags])


def test_a_task_that_only_a_file_names_is_not_imported(alone: Path, refused: Any):
    Path("mine.toml").write_text('model = "resnet8"\ndata = "digits"\ntask = "nowhere:task"\n')
    assert "mine.toml names code, which would run: task nowhere:task" in refused(["train", "mine.toml"])


def test_several_workers_share_a_pass_only_where_it_is_asked_for(tmp_path: Path):
    rows: list[int] = []

    def counting(model: nn.Module, batch: Any) -> Sums:
        rows.append(len(batch[0]) if model.training else 0)
        return squares(model, batch)

    run(tmp_path, counting)
    assert {*rows} == {0, 4}
    run(tmp_path, counting, workers_per_pass=2, out=tmp_path / "together")
    assert 8 in rows


def test_metrics_are_shown_with_their_unit():
    assert Metric.called("pixel error %").of(3.14159) == "3.14 %"
    assert Metric.called("distance [m]").of(0.123456) == "0.1235 m"
    assert Metric.called("of a kind").name == "of a kind"
    assert Metric("loss").of(math.inf) == "not finite"


def test_its_rows_are_the_loss_the_count_and_each_metrics_two_sums():
    task = OwnTask(squares, "squares", CPU)
    found = task(nn.Linear(3, 1), data()[1].tensors, Recipe(), evaluating=True)
    assert (found.loss.dtype, found.others.dtype, found.others.shape) == (torch.float64, torch.float64, (3, 1))
    assert (task.rows, CLASSIFICATION.rows) == (4, 2)


def test_the_line_has_the_tasks_names_and_no_others(tmp_path: Path):
    line = json.loads((run(tmp_path).folder / "metrics.jsonl").read_text().splitlines()[1])
    assert line["higher_is_better"] == []
    assert not {"top1_error", "train_error"} & line.keys()
