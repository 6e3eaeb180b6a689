"""ResNet-18 … 152 as the paper trains them (§5.1): stride 2 in the 3×3 convolution, torchvision's state-dict keys.

And small ones, for the embedded digits and for images as MNIST has them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from onehour.rules.batchnorm import batchnorm_relu, kernels_take


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inside: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inside, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = batchnorm_relu(self.bn1, self.conv1(x))
        return batchnorm_relu(self.bn2, self.conv2(y), shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inside: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(inside, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = batchnorm_relu(self.bn1, self.conv1(x))
        y = batchnorm_relu(self.bn2, self.conv2(y))
        return batchnorm_relu(self.bn3, self.conv3(y), shortcut)


def _shortcut(inside: int, outside: int, stride: int) -> nn.Module | None:
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside))


class ResNet(nn.Module):
    """A residual network for images of about 224 pixels.

    Args:
        small_images: a 3×3 stem without pooling, for images of 32 pixels.

    Shape:
        (N, channels, H, W) → (N, classes).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        channels: int = 3,
        classes: int = 1000,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, 64, size, stride=stride, padding=size // 2, bias=False)
        self.pools = not small_images
        self.bn1 = nn.BatchNorm2d(64)
        inside, stages = 64, []
        for stage, depth in enumerate(depths):
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(inside, 64 * 2**stage, stride=stride))
                inside = 64 * 2**stage * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inside, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = batchnorm_relu(self.bn1, self.conv1(images))
        if self.pools:
            x = _max_pool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


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


def _max_pool(x: Tensor) -> Tensor:
    if kernels_take(x):
        from onehour.models.max_pool import MaxPool  # needs triton

        return MaxPool.apply(x)
    return F.max_pool2d(x, 3, stride=2, padding=1)


def resnet8(*, channels: int = 1, classes: int = 10) -> SmallResNet:
    """ResNet-8 with widths 8, 16, 32: 19.8 thousand parameters, for 8×8 digits."""
    return SmallResNet((8, 16, 32), channels=channels, classes=classes)


def resnet8_wide(*, channels: int = 1, classes: int = 10) -> SmallResNet:
    """ResNet-8 with widths 16, 32, 64 and a stem of stride 2: 78 thousand parameters, for images of 28 pixels."""
    return SmallResNet((16, 32, 64), channels=channels, classes=classes, stride=2)


def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet18_cifar(**options: Any) -> ResNet:
    """ResNet-18 for images of 32 pixels: a 3×3 stem, no pooling."""
    return ResNet(BasicBlock, (2, 2, 2, 2), small_images=True, **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34: 21,797,672 parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 25,557,032 parameters; the paper's main model."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 44,549,160 parameters; the paper's T2c."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152: 60,192,808 parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)
