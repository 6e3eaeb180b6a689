"""ResNets as the paper trains them: torchvision's names, stride 2 in the 3×3 convolution (§5.1)."""

import pytest
import torch
from torch import nn

from onehour.models import resnet
from onehour.models.resnet import ResNet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def built(name: str, **options: int) -> ResNet:
    with torch.device("meta"):
        return getattr(resnet, name)(**options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnet18_cifar", 11_173_962 + 990 * 513),  # with a thousand classes
    ],
)
def test_each_has_torchvisions_number_of_parameters(name: str, parameters: int):
    assert sum(p.numel() for p in built(name).parameters()) == parameters


def block_keys(prefix: str, convolutions: int, *, downsample: bool) -> list[str]:
    keys = []
    for number in range(1, convolutions + 1):
        keys.append(f"{prefix}.conv{number}.weight")
        keys += [f"{prefix}.bn{number}.{part}" for part in NORM]
    if downsample:
        keys.append(f"{prefix}.downsample.0.weight")
        keys += [f"{prefix}.downsample.1.{part}" for part in NORM]
    return keys


@pytest.mark.parametrize(
    ("name", "depths", "convolutions", "total"),
    [("resnet50", (3, 4, 6, 3), 3, 320), ("resnet18", (2, 2, 2, 2), 2, 122), ("resnet34", (3, 4, 6, 3), 2, 218)],
)
def test_state_dict_keys_are_torchvisions(name: str, depths: tuple[int, ...], convolutions: int, total: int):
    expected = ["conv1.weight", *(f"bn1.{part}" for part in NORM), "fc.weight", "fc.bias"]
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            # A bottleneck widens in the first stage too, so it needs a shortcut of its own there.
            downsample = block == 0 and (stage > 1 or convolutions == 3)
            expected += block_keys(f"layer{stage}.{block}", convolutions, downsample=downsample)
    assert sorted(built(name).state_dict()) == sorted(expected)
    assert len(expected) == total


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv1.weight", (64, 3, 7, 7)),
        ("layer1.0.conv1.weight", (64, 64, 1, 1)),
        ("layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        ("layer3.5.conv2.weight", (256, 256, 3, 3)),
        ("layer4.0.conv3.weight", (2048, 512, 1, 1)),
        ("layer4.2.bn3.running_var", (2048,)),
        ("fc.weight", (1000, 2048)),
    ],
)
def test_shapes_of_resnet50_are_torchvisions(key: str, shape: tuple[int, ...]):
    assert tuple(built("resnet50").state_dict()[key].shape) == shape


def test_a_bottlenecks_stride_is_in_its_3x3_convolution():
    strides = {
        name: module.stride for name, module in built("resnet50").named_modules() if isinstance(module, nn.Conv2d)
    }
    moving = {name for name, stride in strides.items() if stride == (2, 2)}
    blocks = [f"layer{stage}.0" for stage in (2, 3, 4)]
    assert moving == {"conv1", *(f"{b}.conv2" for b in blocks), *(f"{b}.downsample.0" for b in blocks)}


def test_a_basic_blocks_stride_is_in_its_first_convolution():
    modules = dict(built("resnet18").named_modules())
    assert [modules[f"layer2.0.conv{number}"].stride for number in (1, 2)] == [(2, 2), (1, 1)]  # pyright: ignore


@pytest.mark.parametrize(("pixels", "maps"), [(224, 7), (64, 2)])
def test_an_image_shrinks_32_times(pixels: int, maps: int):
    model, seen = built("resnet50", classes=5), []
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    logits = model(torch.zeros(2, 3, pixels, pixels, device="meta"))
    assert tuple(logits.shape) == (2, 5)
    assert seen == [(2, 2048, maps, maps)]


def test_resnet8_is_that_of_the_digits():
    model = resnet.resnet8()
    assert sum(p.numel() for p in model.parameters()) == 19_810
    assert tuple(model(torch.randn(2, 1, 8, 8)).shape) == (2, 10)
    keys = {key.split(".")[0] for key in model.state_dict()}
    assert keys == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}
    strides = [getattr(model, f"layer{number}")[0].conv1.stride for number in (1, 2, 3)]
    assert strides == [(1, 1), (2, 2), (2, 2)]


def test_the_wide_resnet8_halves_images_in_its_stem():
    model, seen = resnet.resnet8_wide(), []
    model.get_submodule("layer3").register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    assert sum(p.numel() for p in model.parameters()) == 77_754
    assert tuple(model(torch.randn(2, 1, 28, 28)).shape) == (2, 10)
    assert seen == [(2, 64, 4, 4)]
