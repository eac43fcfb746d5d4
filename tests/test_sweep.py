"""Networks of torchvision and timm, each as source and as target: the engine's meta-gradient against the reference's.

They are made small, since only what they are made of matters here: low resolution, few of their like blocks, narrow
heads. What layout a tapped layer has is written down for the reference; the engine finds it out by itself.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from timm.models.nfnet import NormFreeNet, model_cfgs
from torch import Tensor, nn
from torchvision.models import inception, maxvit

from l2t_fast import L2T, Engine
from l2t_fast.reference import Reference
from tests.shared import error

pytestmark = pytest.mark.slow

CLASSES, BATCH = 3, 3
TAPS = ("2", "5")  # of the small network on the other side


class Net(NamedTuple):
    """One network.

    Attributes:
        name: as its library has it.
        size: of the images, in pixels.
        layers: their names; "x:NHWC" gives [B, H, W, C], "x:tokens+1" [B, 1 + H W, C] with one token before the map.
        make: the network, without weights.
        logits: where the outputs have them.
    """

    name: str
    size: int
    layers: tuple[str, ...]
    make: Callable[[], nn.Module]
    logits: int | str | None = None

    @property
    def names(self) -> list[str]:
        """Of the layers, without their layouts."""
        return [layer.split(":")[0] for layer in self.layers]

    @property
    def maps(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """{layer: what turns its feature into [B, C, H, W]}, for those that give something else."""
        pairs = (layer.split(":") for layer in self.layers if ":" in layer)
        return {name: nhwc if layout == "NHWC" else partial(tokens, int(layout[6:] or 0)) for name, layout in pairs}


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def tokens(prefix: int, x: Tensor) -> Tensor:
    side = round((x.shape[1] - prefix) ** 0.5)
    return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def shrunk(
    make: Callable[..., nn.Module], blocks: dict[str, int], heads: dict[str, nn.Module], **options: Any
) -> nn.Module:
    """The network with only the first of the blocks in some of its sequences, and with other heads."""
    network = make(num_classes=CLASSES, **options)
    for path, count in blocks.items():
        parent, _, name = path.rpartition(".")
        whole = network.get_submodule(path)
        network.get_submodule(parent).register_module(name, whole[:count])
    for path, head in heads.items():
        parent, _, name = path.rpartition(".")
        network.get_submodule(parent).register_module(name, head)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # 1e-5, with only three values on the last maps, makes the meta-gradient chaotic
    return network


def tv(
    name: str,
    size: int,
    layers: str,
    blocks: dict[str, int] | None = None,
    heads: Callable[[], dict[str, nn.Module]] = dict,
    logits: int | str | None = None,
    **options: Any,
) -> Net:
    """One of torchvision's."""
    make = partial(torchvision.models.get_model, name, weights=None)
    return Net(
        name,
        size,
        tuple(layers.split()),
        lambda: shrunk(make, blocks or {}, heads(), **options),
        logits,
    )


def tm(name: str, size: int, layers: str, blocks: dict[str, int] | None = None, **options: Any) -> Net:
    """One of timm's."""
    make = partial(timm.create_model, name)
    return Net(name, size, tuple(layers.split()), lambda: shrunk(make, blocks or {}, {}, **options))


def maxvit_small() -> nn.Module:
    return maxvit.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=CLASSES)


def nfnet_small() -> nn.Module:
    narrow: Any = {"depths": (1, 1, 1), "channels": (32, 64, 96), "group_size": 16, "stem_chs": 32, "num_features": 64}
    return NormFreeNet(replace(model_cfgs["dm_nfnet_f0"], **narrow), num_classes=CLASSES)


NETS = [
    tv("alexnet", 64, "features.2 features.5", heads=lambda: {"classifier": nn.Linear(256 * 36, CLASSES)}),
    tv("vgg11", 32, "features.2 features.10", heads=lambda: {"classifier": nn.Linear(512 * 49, CLASSES)}),
    tv("vgg11_bn", 32, "features.3 features.14", heads=lambda: {"classifier": nn.Linear(512 * 49, CLASSES)}),
    tv("vgg13_bn", 32, "features.6 features.13", heads=lambda: {"classifier": nn.Linear(512 * 49, CLASSES)}),
    tv("convnext_tiny", 32, "features.1 features.3 features.1.0.block.5:NHWC", {"features.5": 1, "features.7": 1}),
    tv("densenet121", 32, "features.denseblock1 features.transition2"),
    tv("efficientnet_b0", 32, "features.2 features.4", {"features.4": 1, "features.5": 1, "features.6": 1}),
    tv("efficientnet_v2_s", 32, "features.2 features.4", {f"features.{i}": 1 for i in (2, 3, 4, 5, 6)}),
    tv(
        "googlenet",
        64,
        "conv3 inception3b inception4b",
        init_weights=False,
        aux_logits=True,
        logits="logits",
    ),
    tv(
        "inception_v3",
        107,
        "maxpool1 Mixed_5b",
        init_weights=False,
        logits=0,
        heads=lambda: {"AuxLogits.conv1": inception.BasicConv2d(128, 768, kernel_size=1)},
    ),
    Net("maxvit_t", 64, ("blocks.0", "blocks.1"), maxvit_small),
    tv("mnasnet0_5", 32, "layers.8 layers.9", {"layers.10": 1, "layers.12": 1}),
    tv("mnasnet1_0", 32, "layers.8 layers.9", {"layers.10": 1, "layers.12": 1}),
    tv("mobilenet_v2", 32, "features.3 features.6"),
    tv("mobilenet_v3_large", 32, "features.3 features.6"),
    tv("mobilenet_v3_small", 32, "features.1 features.3"),
    tv("regnet_x_400mf", 32, "trunk_output.block1 trunk_output.block2"),
    tv("regnet_y_400mf", 32, "trunk_output.block1 trunk_output.block2"),
    tv("regnet_y_800mf", 32, "trunk_output.block1 trunk_output.block3"),
    tv("resnet18", 32, "layer1 layer2 layer3"),
    tv("resnet34", 32, "layer1 layer2", {"layer3": 1, "layer4": 1}),
    tv("resnet50", 32, "layer1 layer2", {"layer3": 1, "layer4": 1}),
    tv("resnext50_32x4d", 32, "layer1 layer2", {"layer3": 1, "layer4": 1}),
    tv("wide_resnet50_2", 32, "layer1 layer2", {"layer2": 1, "layer3": 1, "layer4": 1}),
    tv("shufflenet_v2_x0_5", 32, "stage2 stage3"),
    tv("shufflenet_v2_x1_0", 32, "maxpool stage2"),
    tv("squeezenet1_0", 64, "features.3 features.7"),
    tv("squeezenet1_1", 32, "features.3 features.7"),
    tv("swin_t", 32, "features.1:NHWC features.3:NHWC", {"features.5": 1, "features.7": 1}),
    tv("swin_v2_t", 32, "features.1:NHWC features.3:NHWC", {"features.5": 1, "features.7": 1}),
    tv("vit_b_16", 64, "encoder.layers.encoder_layer_0:tokens+1 conv_proj", {"encoder.layers": 1}, image_size=64),
    tv("vit_b_32", 96, "encoder.layers.encoder_layer_0:tokens+1", {"encoder.layers": 1}, image_size=96),
    tm("pvt_v2_b0", 64, "stages.0 stages.2"),
    tm("mobilenetv3_small_050", 32, "blocks.0 blocks.1"),
    tm("ghostnet_100", 32, "blocks.1 blocks.3"),
    tm(
        "hrnet_w18_small",
        32,
        "layer1 stage2[0] stage2[1]",
        {f"stage4.0.branches.{i}": 1 for i in range(4)},
    ),
    tm("vit_tiny_patch16_224", 64, "blocks.0:tokens+1 blocks.1:tokens+1", depth=2, img_size=64),
    tm("deit_tiny_patch16_224", 64, "patch_embed:tokens blocks.1:tokens+1", depth=2, img_size=64),
    tm("deit_tiny_distilled_patch16_224", 64, "blocks.0:tokens+2 blocks.1:tokens+2", depth=2, img_size=64),
    tm("mixer_s32_224", 96, "blocks.0:tokens blocks.1:tokens", {"blocks": 2}, img_size=96),
    tm("swin_tiny_patch4_window7_224", 32, "layers.0:NHWC layers.1:NHWC", img_size=32, window_size=2, depths=(2, 2)),
    Net("dm_nfnet_f0", 32, ("stages.0", "stages.1"), nfnet_small),
    tm("mobilevit_xxs", 64, "stages.1 stages.2 stages.3"),
    tm("resnet10t", 32, "layer1 layer2"),
    tm("convnext_atto", 32, "stages.0 stages.1"),
    tm("convnextv2_atto", 32, "stages.0 stages.1"),
    tm("mambaout_femto", 32, "stem:NHWC stages.0:NHWC stages.1:NHWC"),
    tm("poolformer_s12", 32, "stages.0 stages.1"),
    tm("edgenext_xx_small", 64, "stages.0 stages.1"),
    tm("levit_128s", 64, "stem stages.0:tokens", img_size=64),
    tm("xcit_nano_12_p16_224", 64, "blocks.0:tokens", {"blocks": 2}, img_size=64),
    tm("repvgg_a0", 32, "stages.0 stages.1"),
    tm("res2net50_14w_8s", 32, "layer1 layer2", {"layer3": 1, "layer4": 1}),
    tm("resnest14d", 32, "layer1 layer2"),
    tm("skresnet18", 32, "layer1 layer2"),
    tm("regnety_002", 32, "s1 s2"),
    tm("lcnet_050", 32, "blocks.1 blocks.2"),
    tm("mobilenetv4_conv_small", 32, "blocks.0 blocks.1"),
    tm("fastvit_t8", 64, "stages.0 stages.1"),
    tm("starnet_s1", 32, "stages.0 stages.1"),
    tm("tinynet_e", 32, "blocks.1 blocks.2"),
    tm("dla34", 32, "level2 level3"),
    tm("ese_vovnet19b_dw", 32, "stages.0 stages.1"),
    tm("inception_next_atto", 32, "stages.0 stages.1"),
    tm("efficientvit_b0", 32, "stages.0 stages.1"),
    tm("sequencer2d_s", 32, "stem:NHWC stages.0:NHWC", {f"stages.{i}.blocks": 1 for i in range(4)}),
    tm("resmlp_12_224", 64, "blocks.0:tokens blocks.1:tokens", {"blocks": 2}, img_size=64),
    tm("eva02_tiny_patch14_224", 56, "blocks.0:tokens+1 blocks.1:tokens+1", depth=2, img_size=56),
    tm("cait_xxs24_224", 64, "blocks.0:tokens blocks.1:tokens", depth=2, img_size=64),
    tm("coatnet_nano_rw_224", 64, "stem stages.0", {f"stages.{i}.blocks": 1 for i in range(4)}, img_size=64),
    tm("repvit_m0_9", 32, "stages.0 stages.1", {"stages.2.blocks": 1, "stages.3.blocks": 1}),
    tm("hgnetv2_b0", 32, "stages.0 stages.1"),
    tm("rexnet_100", 32, "features.2 features.4"),
]


def small() -> nn.Sequential:
    """What stands on the other side: features of 16² and 8² of images of 32²."""
    layers = [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def built(net: Net, role: str) -> tuple[nn.Module, nn.Module, dict[str, Any], tuple[Tensor, Tensor]]:
    """Source, target, their taps, and a batch; always the same."""
    torch.manual_seed(0)
    one, other = net.make().double(), small().double()
    x = torch.randn(BATCH, 3, net.size, net.size, dtype=torch.float64)
    y = torch.arange(BATCH) % CLASSES
    layers = {"source_layers": net.names, "target_layers": list(TAPS)}
    if role == "target":
        layers = {"source_layers": list(TAPS), "target_layers": net.names}
    return *((one, other) if role == "source" else (other, one)), layers, (x, y)  # type: ignore[return-value]


def reference(
    net: Net, role: str, source: nn.Module, target: nn.Module, layers: dict[str, Any], x: Tensor
) -> Reference:
    """With random what and where networks."""
    torch.manual_seed(1)
    pairs = [(0, m, n) for m in range(len(layers["source_layers"])) for n in range(len(layers["target_layers"]))]
    of_role: dict[str, Any] = {"source_maps": net.maps}
    if role == "target":
        of_role = {"target_maps": net.maps, "logits": net.logits}
    made = Reference(source, target, **layers, pairs=pairs, example=x, lr=0.05, inner_steps=1, **of_role)
    with torch.no_grad():
        for p in made.phi.values():
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_meta_gradient_of(net: Net, role: str) -> None:
    source, target, layers, (x, y) = built(net, role)
    plain = reference(net, role, source, copy.deepcopy(target), layers, x)
    logits = {"logits": net.logits} if role == "target" and net.logits is not None else {}
    learner = L2T(source, target, **layers, pairs=plain.pairs, example=x, **logits)
    for part in ("projections", "what", "where"):
        getattr(learner, part).load_state_dict(getattr(plain, part).state_dict())
    engine = Engine(learner, lr=0.05, inner_steps=1, mode="eager", say=lambda text: None)
    torch.manual_seed(2)
    expected = plain.meta_gradient(x, y)
    torch.manual_seed(2)
    actual = engine.meta_gradient(x, y)
    assert all(g.isfinite().all() for g in expected.values())
    assert error(actual, expected) < 1e-9
