"""Networks by name."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 38, 44, 56, 110])
def test_cifar_resnet_has_its_depth(depth: int) -> None:
    model = build_model(f"resnet{depth}", num_classes=7, width=0.25)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_cifar_resnet_stages() -> None:
    model = build_model("resnet8", num_classes=3)
    features = create_feature_extractor(model, ["layer1", "layer2", "layer3"])(torch.rand(2, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features.values()] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert "conv1.bias" in model.state_dict()


def test_vgg9_is_the_papers() -> None:
    model = build_model("vgg9_bn", num_classes=10)
    channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == expected
    features = sum(9 * i * o + 3 * o for i, o in itertools.pairwise(channels))  # weight, bias, BatchNorm
    assert parameters(model) == features + 512 * 10 + 10
    assert model.eval()(torch.rand(1, 3, 40, 64)).shape == (1, 10)


def test_initialisation_is_kaiming_by_fan_out() -> None:
    torch.manual_seed(0)
    for model in (build_model("resnet20", 10), build_model("vgg9_bn", 10)):
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
                deviation = (2 * m.weight.numel()) ** -0.5  # of the estimate, relative
                assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=5 * deviation)
                assert m.bias is None or not m.bias.any()
    assert model.state_dict()["classifier.weight"].std().item() == pytest.approx(0.01, rel=0.05)


def test_width_scales_every_layer() -> None:
    for name in ("resnet8", "vgg9_bn"):
        whole, half = build_model(name, 10), build_model(name, 10, width=0.5)
        for a, b in zip(whole.modules(), half.modules(), strict=True):
            if isinstance(a, nn.Conv2d) and isinstance(b, nn.Conv2d):
                assert b.weight.shape[0] == a.weight.shape[0] // 2
        assert build_model(name, 10, width=0.001)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_torchvision_networks() -> None:
    with torch.device("meta"):  # shapes only
        assert build_model("resnet18", 5)(torch.rand(2, 3, 32, 32)).shape == (2, 5)
        assert build_model("googlenet", 5).train()(torch.rand(2, 3, 64, 64)).shape == (2, 5)  # no tuple


@pytest.mark.parametrize(
    ("name", "num_classes", "width", "words"),
    [
        ("resnet33", 10, 1.0, "resnet32"),
        ("VGG9_BN", 10, 1.0, "vgg9_bn"),
        ("fcn_resnet50", 10, 1.0, "no network named"),  # torchvision's, but no classification network
        ("resnet18", 10, 0.5, "width 1 only"),
        ("resnet20", 0, 1.0, "at least one class"),
        ("resnet20", 10, 0.0, "must be positive"),
    ],
)
def test_build_model_refuses(name: str, num_classes: int, width: float, words: str) -> None:
    with pytest.raises(L2TError, match=words):
        build_model(name, num_classes, width)
