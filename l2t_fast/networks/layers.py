"""The layers of a network that are matched unless others are named."""

import itertools

import torchvision.models
from torch import nn

from l2t_fast.errors import UnfitError
from l2t_fast.networks.architectures import CifarResNet, CifarVGG


def default_layers(name: str, model: nn.Module) -> list[str]:
    """The layers of `model` that are matched unless others are named, as in `model.named_modules()`.

    The stages of a ResNet, and of a VGG the layer whose output enters each max-pool (section 4.1 of the paper).

    Raises L2TError for any other network; `name` is what the message calls it.
    """
    if isinstance(model, CifarResNet):
        return ["layer1", "layer2", "layer3"]
    if isinstance(model, torchvision.models.ResNet):
        return ["layer1", "layer2", "layer3", "layer4"]
    if isinstance(model, (CifarVGG, torchvision.models.VGG)):
        features = list(model.features.named_children())
        return [
            f"features.{before}"
            for (before, _), (_, layer) in itertools.pairwise(features)
            if isinstance(layer, nn.MaxPool2d)
        ]
    modules = [module for module, _ in model.named_modules() if module.count(".") < 2 and module]
    raise UnfitError(
        f"{name} has no default layers; name the layers to match, for example among {', '.join(modules[:12])}."
    )
