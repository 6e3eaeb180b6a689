"""Detection, the paper's transfer (§5.4): torchvision's Mask R-CNN on a folder in COCO's format, from a run's backbone.

    COCO=DIR onehour train detection --minibatch 16 --model detection:mask_rcnn --data detection:data \\
        --task detection:task --collate detection:collate --init RUN    # of resnet50
    python detection.py shapes                                          # writes a small folder of that kind
    COCO=shapes onehour train detection.toml --init RUN --trust         # of resnet18
    COCO=shapes python detection.py ap runs/shapes-4-s0                 # box AP

The loss of a worker is Mask R-CNN's own: means over what it samples in its n = 2 images together, as a GPU of the paper
computes it. n times that, over a count of n, is the mean over workers, which is the paper's over GPUs. One pass over kn
images would have another loss, since those means are over unequal numbers of regions: n belongs to the loss here too,
though BatchNorm is frozen. An AP is no sum over images; the run's metric is the mean over images of the AP within each.
"""

import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import resnet18
from torchvision.ops import box_iou
from torchvision.ops.misc import FrozenBatchNorm2d

import onehour
from onehour.training.record import Run
from onehour.training.weights import read_weights

Boxes = dict[str, Tensor]
Sample = tuple[Tensor, Boxes]
IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
SHAPES = ("disc", "square", "triangle")


class Coco(Dataset[Sample]):
    """Images (3, H, W) of bytes with boxes (M, 4), labels (M,) from 1 on and masks (M, H, W); without COCO's crowds.

    Args:
        folder: with annotations/instances_PART.json and the images in PART.
        part: for example train2017.
        flips: half of the images, left to right.
    """

    def __init__(self, folder: Path, part: str, *, flips: bool) -> None:
        self.folder, self.flips = folder / part, flips
        content = json.loads((folder / "annotations" / f"instances_{part}.json").read_text(encoding="utf-8"))
        self.images = content["images"]
        self.labels = {entry["id"]: 1 + label for label, entry in enumerate(content["categories"])}
        self.objects: dict[int, list[Any]] = {entry["id"]: [] for entry in self.images}
        for entry in content["annotations"]:
            if not entry["iscrowd"] and min(entry["bbox"][2:]) > 0:
                self.objects[entry["image_id"]].append(entry)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        entry = self.images[index]
        with Image.open(self.folder / entry["file_name"]) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        objects, (height, width) = self.objects[entry["id"]], image.shape[1:]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.labels[each["category_id"]] for each in objects], dtype=torch.int64)
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, each in zip(masks, objects, strict=True):
            mask.copy_(torch.from_numpy(filled(each["segmentation"], height, width)))
        if self.flips and random.random() < 0.5:
            image, masks = image.flip(2), masks.flip(2)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return image, {"boxes": boxes, "labels": labels, "masks": masks}


def filled(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """What lies in any of the polygons, as ones (H, W)."""
    mask = Image.new("L", (width, height))
    for polygon in polygons:
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.array(mask)


def data() -> tuple[Coco, Coco]:
    folder = Path(os.environ["COCO"])
    return Coco(folder, "train2017", flips=True), Coco(folder, "val2017", flips=False)


def collate(samples: list[Sample]) -> list[Sample]:
    """A list, since images differ in size."""
    return samples


def mask_rcnn() -> nn.Module:
    """The paper's for COCO: ResNet-50 with an FPN, whose stem and first stage do not train."""
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    return MaskRCNN(backbone, num_classes=81)


def small() -> nn.Module:
    """ResNet-18 with narrow heads, for shapes in 96 pixels."""
    layers = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    backbone = BackboneWithFPN(resnet18(norm_layer=FrozenBatchNorm2d), layers, [64, 128, 256, 512], out_channels=64)
    return MaskRCNN(
        backbone,
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        box_head=TwoMLPHead(64 * 7 * 7, 128),
        box_predictor=FastRCNNPredictor(128, 1 + len(SHAPES)),
        box_batch_size_per_image=32,
        mask_head=MaskRCNNHeads(64, (64,), 1),
        mask_predictor=MaskRCNNPredictor(64, 64, 1 + len(SHAPES)),
    )


def task(model: nn.Module, batch: list[Sample]) -> onehour.Sums:
    """The AP is that of evaluations; in training nothing is detected, and nothing counted."""
    images, targets = [image / 255 for image, _ in batch], [target for _, target in batch]
    within: list[float] = []
    if model.training:
        loss = len(batch) * sum(model(images, targets).values())
    else:
        loss = torch.zeros((), device=images[0].device)
        for image, target in zip(images, targets, strict=True):
            loss += sampled_loss(model, image, target)
            if len(target["labels"]):
                within.append(average_precision([(model([image])[0], target)], IOUS[:1]))
    metrics = {"AP50 within an image %": (100 * math.fsum(within), len(within))}
    return onehour.Sums(loss, len(batch), metrics, higher_is_better=list(metrics))


def sampled_loss(model: nn.Module, image: Tensor, target: Boxes) -> Tensor:
    """Of an image in evaluation, with the same regions each time: torchvision has a loss in training mode alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return sum(model.train()([image], [target]).values())
        finally:
            model.eval()


def average_precision(pairs: list[tuple[Boxes, Boxes]], ious: np.ndarray) -> float:
    """COCO's box AP: precision at 101 recalls, of all images' detections together; its mean over classes and IoUs.

    Args:
        pairs: of each image what was found, with scores, and what is there, one object in one of them at least.
        ious: from which on a detection is right; the surest takes the object that it overlaps most.
    """
    values = []
    for label in sorted({label for _, there in pairs for label in there["labels"].tolist()}):
        scores, right, objects = [np.zeros(0)], [np.zeros((len(ious), 0), dtype=bool)], 0
        for found, there in pairs:
            of_class = there["labels"] == label
            chosen = torch.nonzero(found["labels"] == label)[:, 0]
            chosen = chosen[found["scores"][chosen].argsort(descending=True, stable=True)]
            overlaps = box_iou(found["boxes"][chosen].double(), there["boxes"][of_class].double()).cpu().numpy()
            scores.append(found["scores"][chosen].cpu().numpy())
            right.append(np.stack([matched(overlaps, least) for least in ious]))
            objects += overlaps.shape[1]
        order = np.argsort(-np.concatenate(scores), kind="stable")
        hits = np.concatenate(right, 1)[:, order].cumsum(1)
        precision = np.maximum.accumulate((hits / np.arange(1, 1 + len(order)))[:, ::-1], 1)[:, ::-1]
        for row, recall in zip(precision, hits / objects, strict=True):
            values.append(np.append(row, 0)[np.searchsorted(recall, RECALLS)].mean())
    return float(np.mean(values))


def matched(overlaps: np.ndarray, least: float) -> np.ndarray:
    """Which detections, the surest first, take an object: each the free one that it overlaps most, if by `least`."""
    free, hits = overlaps.copy(), np.zeros(len(overlaps), dtype=bool)
    for number in range(len(free) if free.shape[1] else 0):
        best = int(free[number].argmax())
        hits[number] = free[number, best] >= least
        if hits[number]:
            free[:, best] = -1
    return hits


@torch.no_grad()
def box_ap(model: nn.Module, dataset: Dataset[Sample]) -> float:
    """COCO's box AP in percent over all of a data set's images."""
    model.eval()
    samples = (dataset[index] for index in range(len(dataset)))  # pyright: ignore[reportArgumentType]
    return 100 * average_precision([(model([image / 255])[0], target) for image, target in samples], IOUS)


def write_shapes(folder: Path, *, train: int = 160, validation: int = 20) -> None:
    """One to three bright shapes in each image of 96 pixels of noise, in COCO's format."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for part, count in (("train2017", train), ("val2017", validation)):
        (folder / part).mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 10 * (1 + label), "name": name} for label, name in enumerate(SHAPES)]
        for number in range(count):
            picture = Image.frombytes("RGB", (96, 96), bytes(b // 3 for b in draw.randbytes(3 * 96 * 96)))
            content["images"].append({"id": number, "file_name": f"{number}.png", "height": 96, "width": 96})
            for place in draw.sample([(24, 24), (24, 72), (72, 24), (72, 72)], draw.randint(1, 3)):
                label, radius = draw.randrange(len(SHAPES)), draw.uniform(10, 20)
                corners = (24, 4, 3)[label]
                angles = [
                    2 * math.pi * (corner + (label == 1) / 2) / corners - math.pi / 2 for corner in range(corners)
                ]
                x, y = (
                    [at + radius * turn(a) for a in angles]
                    for at, turn in zip(place, (math.cos, math.sin), strict=True)
                )
                outline = [coordinate for point in zip(x, y, strict=True) for coordinate in point]
                ImageDraw.Draw(picture).polygon(outline, fill=tuple(draw.randint(128, 255) for _ in range(3)))
                box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
                entry = {"id": 1 + len(content["annotations"]), "image_id": number, "category_id": 10 * (1 + label)}
                content["annotations"].append(entry | {"bbox": box, "segmentation": [outline], "iscrowd": 0})
            picture.save(folder / part / f"{number}.png")
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ap", folder]:
            trained = {"detection:small": small, "detection:mask_rcnn": mask_rcnn}[Run(Path(folder)).recipe.model]()
            trained.load_state_dict(read_weights(Path(folder)))
            print(f"box AP {box_ap(trained, data()[1]):.2f} %")
        case [folder]:
            write_shapes(Path(folder))
        case _:
            sys.exit("python detection.py FOLDER, or COCO=FOLDER python detection.py ap RUN")
