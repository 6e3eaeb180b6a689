"""Named recipes: functions that return a Recipe; a variant is a call and `replace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.messages import nearest

__all__ = ["recipe"]

IMAGENET, COCO = 1_281_167, 118_287


def resnet50(**changes: Any) -> Recipe:
    """The paper's recipe (§5.1): ResNet-50 on ImageNet, 0.1 at 256, 90 epochs.

    >>> resnet50(minibatch=8192).target_lr
    3.2
    """
    return Recipe(name="resnet50", model="resnet50", data="", samples=IMAGENET).replace(**changes)


def resnet101(**changes: Any) -> Recipe:
    """The paper's T2c: ResNet-101, otherwise the same."""
    return resnet50(name="resnet101", model="resnet101").replace(**changes)


def cifar10(**changes: Any) -> Recipe:
    """CIFAR-10, for the public elbow of AdaScale's table (94.1 % correct at 128, 76.6 % at 8k, linear with warmup).

    Its data is the python-version archive: `--data cifar-10-python.tar.gz`. n is 128, the base minibatch itself.
    """
    return Recipe(
        name="cifar10",
        model="resnet18_cifar",
        data="",
        samples=50_000,
        minibatch=128,
        per_worker=128,
        base_lr=0.1,
        base_minibatch=128,
        weight_decay=5e-4,
        epochs=100,
        milestones=("50", "75"),
    ).replace(**changes)


def detection(**changes: Any) -> Recipe:
    """The paper's Mask R-CNN on COCO (§5.4, T3b): 0.0025 for the 2 images of a GPU, 1.28M iterations, a drop at 3/4.

    Its schedule counts iterations: 2.56 million images, 21.6 epochs of the 118,287 of trainval35k. All else is He et
    al.'s (2017), whose settings the paper keeps. Model, data, task and collate are yours, as in examples/tasks.

    >>> big = detection(minibatch=16)
    >>> big.target_lr, big.workers.iterations(big.samples, big.epochs)
    (0.02, 160000)
    """
    return Recipe(
        name="detection",
        model="",
        data="",
        samples=COCO,
        minibatch=2,
        per_worker=2,
        base_lr=0.0025,
        base_minibatch=2,
        nesterov=False,
        epochs=2_560_000 / COCO,
        milestones=(f"1920000/{COCO}",),
        warmup="none",
    ).replace(**changes)


def digits(**changes: Any) -> Recipe:
    """The embedded task: composites of real handwritten digits, a ResNet-8, seconds on a laptop."""
    return Recipe(
        name="digits",
        model="resnet8",
        data="digits",
        samples=8192,
        minibatch=32,
        per_worker=16,
        base_lr=0.2,
        base_minibatch=32,
        epochs=24,
        milestones=("8", "16", "64/3"),
    ).replace(**changes)


def fashion(**changes: Any) -> Recipe:
    """Fashion-MNIST, 60,000 real photographs of 28×28: minutes a run on a core, seconds on a GPU.

    Chosen on 10,000 of the training images, never on the test images: benchmarks/fashion_choice.py.
    """
    return Recipe(
        name="fashion",
        model="resnet8_wide",
        data="fashion-mnist",
        samples=60_000,
        minibatch=64,
        per_worker=32,
        base_lr=0.1,
        base_minibatch=64,
        weight_decay=5e-4,
        epochs=12,
        milestones=("6", "9", "11"),
        warmup_epochs=2,
    ).replace(**changes)


RECIPES = {function.__name__: function for function in (digits, fashion, cifar10, resnet50, resnet101, detection)}


def recipe(name: str | Path, /, **changes: Any) -> Recipe:
    """A recipe by name or from a TOML file, with changes.

    Args:
        name: one of `RECIPES`, or the path of a file that ends in .toml.
        changes: any field of `Recipe`.

    Raises:
        ValueError: for an unknown name (the nearest is offered), key or value.

    >>> recipe("digits", minibatch=64).workers.workers
    4
    """
    if str(name).endswith(".toml"):
        return Recipe.from_toml(Path(name)).replace(**changes)
    if str(name) not in RECIPES:
        raise ValueError(
            f"no recipe is called {str(name)!r}; expected {nearest(str(name), RECIPES)}, or a path that ends in .toml"
        )
    return RECIPES[str(name)](**changes)
