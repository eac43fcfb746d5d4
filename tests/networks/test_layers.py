"""Layers that are matched by default."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers


def test_default_layers_of_vgg9_enter_the_pools() -> None:
    model = build_model("vgg9_bn", 10).eval()
    entering: list[Tensor] = []
    x = torch.rand(1, 3, 32, 32)
    features = create_feature_extractor(model, default_layers("vgg9_bn", model))(x)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(lambda _, args: entering.append(args[0].clone()))
    model(x)
    assert len(entering) == len(features) == 5
    assert all(torch.equal(a, b) for a, b in zip(entering, features.values(), strict=True))


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_default_layers_of_torchvision_vgg(name: str) -> None:
    with torch.device("meta"):  # shapes only
        model = build_model(name, 10)
        features = create_feature_extractor(model, default_layers(name, model))(torch.rand(1, 3, 64, 64))
    assert [f.shape[1:3] for f in features.values()] == [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]
    assert all(isinstance(model.get_submodule(layer), nn.ReLU) for layer in features)


def test_default_layers_of_resnets() -> None:
    assert default_layers("resnet14", build_model("resnet14", 10)) == ["layer1", "layer2", "layer3"]
    with torch.device("meta"):
        resnet18 = build_model("resnet18", 10)
    assert default_layers("resnet18", resnet18) == ["layer1", "layer2", "layer3", "layer4"]


def test_no_default_layers() -> None:
    with torch.device("meta"):
        alexnet = build_model("alexnet", 10)
    with pytest.raises(L2TError, match=r"alexnet has no default layers.*features\.0"):
        default_layers("alexnet", alexnet)
