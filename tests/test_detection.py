"""examples/tasks/detection.py: Mask R-CNN on shapes, its box AP against pycocotools', its loss, its runs."""

import contextlib
import importlib
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from onehour import Recipe, train
from onehour.cli import main
from onehour.training.record import Run
from onehour.training.weights import read_weights

TASKS = Path(__file__).parents[1] / "examples" / "tasks"

pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The example, whose data is a folder of shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TASKS)
        example = importlib.import_module("detection")
        folder = tmp_path_factory.mktemp("shapes")
        example.write_shapes(folder, train=160, validation=20)
        patch.setenv("COCO", str(folder))
        patch.setenv("PYTHONPATH", str(TASKS))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield example
    sys.modules.pop("detection", None)


def test_a_flipped_sample_is_flipped_in_image_boxes_and_masks(shapes: ModuleType, monkeypatch: pytest.MonkeyPatch):
    dataset = shapes.data()[0]
    monkeypatch.setattr("random.random", lambda: 0.9)
    image, there = dataset[3]
    monkeypatch.setattr("random.random", lambda: 0.1)
    flipped, other = dataset[3]
    assert torch.equal(flipped, image.flip(2))
    for target in (there, other):
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            around = torch.stack([columns.min(), rows.min(), 1 + columns.max(), 1 + rows.max()])
            assert (around - box).abs().max() < 2
    assert not torch.equal(there["boxes"], other["boxes"])


def test_box_ap_is_pycocotools(shapes: ModuleType):
    """On boxes that are moved, doubled, missing, of another class or of one score."""
    coco, cocoeval = (importlib.import_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    draw, pairs, theirs = np.random.default_rng(0), [], []
    dataset = shapes.data()[1]
    for number in range(len(dataset)):
        there, boxes, labels = dataset[number][1], [], []
        for box, label in zip(there["boxes"].numpy(), there["labels"].tolist(), strict=True):
            for _ in range(draw.integers(4)):
                boxes.append(box + draw.normal(0, 3, 4))
                labels.append(label if draw.random() < 0.8 else int(draw.integers(1, 4)))
        scores = draw.random(len(boxes)).round(1 + number % 3)
        found = {
            "boxes": torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores),
        }
        pairs.append((found, there))
        for (left, top, right, bottom), label, score in zip(found["boxes"].tolist(), labels, scores, strict=True):
            row = {"image_id": number, "category_id": 10 * label, "score": score}
            theirs.append(row | {"bbox": [left, top, right - left, bottom - top]})
    annotations = json.loads((dataset.folder.parent / "annotations" / "instances_val2017.json").read_text())
    for entry in annotations["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(theirs), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0.1 < evaluation.stats[0] < 0.9
    ours = [shapes.average_precision(pairs, ious) for ious in (shapes.IOUS, shapes.IOUS[:1])]
    assert ours == pytest.approx(evaluation.stats[:2], abs=1e-12)


def test_the_loss_is_the_mean_of_the_workers_and_not_that_of_one_pass(shapes: ModuleType):
    """With every region sampled, so that nothing is drawn: means over unequal numbers of objects differ."""
    torch.manual_seed(0)
    model, dataset = shapes.small().train(), shapes.data()[0]
    model.rpn.fg_bg_sampler.batch_size_per_image = model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    samples = sorted((dataset[index] for index in range(8)), key=lambda sample: len(sample[1]["labels"]))
    workers = [samples[:2], samples[-2:]]
    with torch.no_grad():
        alone = [sum(model([i / 255 for i, _ in own], [t for _, t in own]).values()) for own in workers]
        sums = [shapes.task(model, own) for own in workers]
        together = shapes.task(model, samples[:2] + samples[-2:])
    loss = float(sum(each.loss for each in sums)) / sum(each.count for each in sums)
    assert loss == pytest.approx(sum(map(float, alone)) / 2, rel=1e-6)
    assert abs(together.loss / together.count / loss - 1) > 1e-3


def crops(part: Any) -> TensorDataset:
    """Each object alone, in 32 pixels."""
    images, labels = [], []
    for image, there in part:
        whole = (image[None] / 255 - 0.45) / 0.225
        for (left, top, right, bottom), label in zip(there["boxes"].long().tolist(), there["labels"], strict=True):
            images.append(F.interpolate(whole[:, :, top:bottom, left:right], (32, 32), mode="bilinear")[0])
            labels.append(label - 1)
    return TensorDataset(torch.stack(images), torch.stack(labels))


@pytest.fixture(scope="module")
def backbone(shapes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of ours that tells shapes apart."""
    random.seed(0)  # which samples are flipped
    sizes: dict[str, Any] = {"minibatch": 32, "per_worker": 16, "base_minibatch": 32}
    recipe = Recipe(model="resnet18", epochs=3, milestones=("2",), warmup="none", **sizes)
    return train(recipe, data=tuple(map(crops, shapes.data())), out=tmp_path_factory.mktemp("backbone") / "run")


def loaded(example: ModuleType, weights: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = example.small()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_detector_learns_from_a_runs_backbone(
    shapes: ModuleType, backbone: Run, tmp_path: Path, processes: int, seed: int, capfd: pytest.CaptureFixture[str]
):
    flags = ["--init", str(backbone.folder), "--seed", str(seed), "--processes", str(processes), "--epochs", "2"]
    where = ["--trust", "--loaders", "0", "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(["train", str(TASKS / "detection.toml"), *flags, *where]) == 0
    run, trained = Run(tmp_path / "run"), read_weights(tmp_path / "run")
    assert "100 of 136 tensors, as its backbone.body; " in capfd.readouterr().out
    known = {f"backbone.body.{name}": tensor for name, tensor in read_weights(backbone.folder).items()}
    start = {name: known[name] for name in trained if name in known}
    frozen = [name for name in start if "bn" in name or "downsample.1" in name or ".layer1." in name]
    assert len(frozen) > 80
    assert all(torch.equal(trained[name], start[name]) for name in frozen)
    before, after = (shapes.box_ap(loaded(shapes, weights), shapes.data()[1]) for weights in (start, trained))
    assert after > before + 3
    assert run.untrained is not None
    assert run.final_error > run.untrained["top1_error"] + 3
