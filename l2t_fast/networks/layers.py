"""The layers of ResNets and VGGs that are matched unless others are named."""

import itertools

import torchvision.models
from torch import nn

from l2t_fast.errors import UnfitError
from l2t_fast.networks.architectures import CifarResNet, CifarVGG


def usual_layers(model: nn.Module) -> list[str] | None:
    """The stages of a ResNet, and of a VGG the layers whose output enters each max-pool (section 4.1 of the paper).

    None for any other network: `l2t_fast.learner.candidates` finds its layers.
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
    return None


def default_layers(name: str, model: nn.Module) -> list[str]:
    """`usual_layers` of `model`.

    Raises L2TError where there are none; `name` is what the message calls it.
    """
    if (usual := usual_layers(model)) is not None:
        return usual
    modules = [module for module, _ in model.named_modules() if module.count(".") < 2 and module]
    raise UnfitError(
        f"{name} has no default layers; name the layers to match, for example among {', '.join(modules[:12])}."
    )
