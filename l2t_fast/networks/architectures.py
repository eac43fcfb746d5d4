"""Networks by name."""

from __future__ import annotations

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from l2t_fast.bounds import BOUNDS, within
from l2t_fast.errors import L2TError
from l2t_fast.networks.libraries import called_model, split_name, timm_model, torchvision_model, unknown

# Depths 6n + 2 of He et al. 2016, section 4.2, without those that name a torchvision network (18, 34, 50, ...).
CIFAR_RESNETS = {f"resnet{depth}": (depth - 2) // 6 for depth in (8, 14, 20, 26, 32, 38, 44, 56, 110)}
VGG9 = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # channels; a max-pool ends each group
VGG9_SIDE = 2 ** len(VGG9)  # pixels that its images have at least


class CifarResNet(nn.Module):
    """ResNet for small images (He et al. 2016, section 4.2): [B, 3, H, W] -> [B, num_classes].

    Three stages `layer1`, `layer2`, `layer3` of `blocks` basic blocks with 16, 32, 64 channels times `width`,
    at H x W, H/2 x W/2, H/4 x W/4. As in the L2T-ww authors' source network, the stem convolution has a bias and
    the shortcut of a stage that changes shape is a 1x1 convolution with BatchNorm.
    """

    def __init__(self, blocks: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3 = (_scaled(c, width) for c in (16, 32, 64))
        self.conv1 = nn.Conv2d(3, c1, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(c1, c1, blocks, stride=1)
        self.layer2 = _stage(c1, c2, blocks, stride=2)
        self.layer3 = _stage(c2, c3, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c3, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # [B, c1, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [B, c3, H/4, W/4]
        x = torch.flatten(self.avgpool(x), 1)  # [B, c3]
        return self.fc(x)  # type: ignore[no-any-return]


class CifarVGG(nn.Module):
    """VGG9-bn for small images, the L2T-ww target network: [B, 3, H, W] -> [B, num_classes], H, W >= 32.

    Seven 3x3 convolutions with BatchNorm in five groups, each ended by a max-pool (`features`), global average
    pooling and one linear `classifier`.
    """

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group in VGG9:
            for base in group:
                conv = nn.Conv2d(channels, _scaled(base, width), kernel_size=3, padding=1)
                channels = conv.out_channels
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [B, C, H/32, W/32]
        x = torch.flatten(self.avgpool(x), 1)  # [B, C]
        return self.classifier(x)  # type: ignore[no-any-return]


def build_model(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """A freshly initialised network [B, 3, H, W] -> [B, num_classes].

    `name` is a CIFAR ResNet (`resnet8`, `resnet14`, `resnet20`, `resnet26`, `resnet32`, `resnet38`, `resnet44`,
    `resnet56`, `resnet110`), `vgg9_bn`, any classification network of torchvision (`torchvision/NAME`, or NAME alone),
    any network of timm (`timm/NAME`), or MODULE:FUNCTION, which returns one. `width` multiplies the channel counts of
    the first two kinds; all others have width 1.

    Raises L2TError for an unknown name (the nearest names are listed), for a number of classes or a width that no
    network has, and where timm or the function would not.
    """
    if num_classes < 1:
        raise L2TError(f"a network needs at least one class, not {num_classes}.")
    if not within("width", width):
        raise L2TError(f"the width of a network must be positive and at most {BOUNDS['width'][1]:g}, not {width}.")
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], num_classes, width)
    if name == "vgg9_bn":
        return CifarVGG(num_classes, width)

    library, rest = split_name(name)
    theirs = torchvision.models.list_models(module=torchvision.models)
    if library == "torchvision" and rest not in theirs:
        raise unknown(name, [f"torchvision/{each}" for each in theirs])
    if library == "" and name not in theirs:
        raise unknown(name, [*CIFAR_RESNETS, "vgg9_bn", *theirs])
    if width != 1:
        where = {"timm": "timm", "call": "a function of yours"}.get(library, "torchvision")
        raise L2TError(f"{name} comes from {where} and has width 1 only; leave width at 1.")
    if library == "timm":
        return timm_model(rest, num_classes=num_classes)
    return called_model(rest, num_classes) if library == "call" else torchvision_model(rest, num_classes)


def build_shapes(name: str, num_classes: int, width: float = 1.0) -> nn.Module:
    """As `build_model`, for names and shapes alone: where it can be on "meta", which takes no time and no memory."""
    if split_name(name)[0] == "call":  # what it does beside making a network is its own affair
        return build_model(name, num_classes, width)
    try:
        with torch.device("meta"):
            return build_model(name, num_classes, width)
    except (NotImplementedError, RuntimeError, L2TError):  # one that looks at numbers while it is made
        return build_model(name, num_classes, width)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels),
        )
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


def _initialise(model: nn.Module) -> None:
    """He et al. 2015 by fan-out, as the authors; BatchNorm starts at 1 and 0 on its own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
