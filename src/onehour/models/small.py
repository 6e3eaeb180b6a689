"""Small residual networks, for the embedded digits and for images as MNIST has them."""

from __future__ import annotations

from torch import Tensor, nn

from onehour.models.resnet import BasicBlock
from onehour.rules.batchnorm import batchnorm_relu


class SmallResNet(nn.Module):
    """A 3×3 stem, one basic block a stage, global average pooling, one linear layer.

    Args:
        widths: channels of each stage; every stage after the first halves the image.
        stride: of the stem; 2 halves the image there.

    Shape:
        (N, channels, H, W) → (N, classes).
    """

    def __init__(self, widths: tuple[int, ...], *, channels: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = len(widths)
        inside = widths[0]
        for number, width in enumerate(widths, 1):
            setattr(self, f"layer{number}", nn.Sequential(BasicBlock(inside, width, stride=1 if number == 1 else 2)))
            inside = width
        self.fc = nn.Linear(inside, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = batchnorm_relu(self.bn1, self.conv1(images))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def resnet8(*, channels: int = 1, classes: int = 10) -> SmallResNet:
    """ResNet-8 with widths 8, 16, 32: 19.8 thousand parameters, for 8×8 digits."""
    return SmallResNet((8, 16, 32), channels=channels, classes=classes)


def resnet8_wide(*, channels: int = 1, classes: int = 10) -> SmallResNet:
    """ResNet-8 with widths 16, 64, 128 and a stem of stride 2: 284 thousand parameters, for images of 28 pixels."""
    return SmallResNet((16, 64, 128), channels=channels, classes=classes, stride=2)
