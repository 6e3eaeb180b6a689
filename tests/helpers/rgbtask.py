"""A few colour images of 64 pixels and a ResNet-18, for what digits are too small to show."""

import torch
from torch.utils.data import TensorDataset

from onehour import init_weights_
from onehour.models.resnet import ResNet, resnet18


def data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    return TensorDataset(images, labels), TensorDataset(images[:4], labels[:4])


def net() -> ResNet:
    return init_weights_(resnet18(classes=10))
