"""Layers found by themselves, in all classification networks of torchvision and a spread of timm's families."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l2t_fast import L2T, Engine
from l2t_fast.learner.candidates import Candidate, find_layers, layers_of
from l2t_fast.networks.architectures import build_model, build_shapes
from l2t_fast.reference import Reference
from tests.shared import error, moved_off

pytestmark = pytest.mark.slow

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coatnet_nano_rw_224",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "davit_tiny",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla34",
    "dm_nfnet_f0",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_lite0",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_100",
    "hrnet_w18_small",
    "inception_next_atto",
    "inception_v4",
    "levit_128s",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnety_002",
    "repvit_m0_9",
    "resmlp_12_224",
    "resnet10t",
    "rexnet_100",
    "selecsls42b",
    "starnet_s1",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "tresnet_m",
    "twins_pcpvt_small",
    "vgg11",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "vovnet39a",
    "xcit_nano_12_p16_224",
]
# Families whose blocks all work at one resolution.
ONE_SIZE = {"vit", "beit", "cait", "convit", "convmixer", "deit", "eva02", "mixer", "resmlp", "xcit"}


def found(name: str) -> list[Candidate]:
    """The candidates that are chosen, of a network that has shapes but no numbers."""
    network = build_shapes(name, 10)
    side = getattr(network, "default_cfg", {}).get("input_size", (3, 299 if name == "inception_v3" else 224))[-1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        example = torch.empty(2, 3, side, side)
    layers = find_layers(network, example, role="target", output=True)
    usual = layers_of(network, example, role="target", output=True)
    assert set(usual) <= set(layers.candidates), "what is usual can be tapped, too"
    return [layers.candidates[layer] for layer in layers.chosen]


@pytest.mark.parametrize("name", [*TORCHVISION, *(f"timm/{name}" for name in TIMM)])
def test_layers_are_found(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    sizes = [candidate.size for candidate in found(name)]
    family = name.removeprefix("timm/").replace("_", " ").replace("-", " ").split()[0]
    if family in ONE_SIZE:
        assert len(sizes) == 4
        assert len(set(sizes)) == 1
    else:
        assert len(sizes) >= 2
        areas = [h * w for h, w in sizes]
        assert areas == sorted(areas, reverse=True)
        assert len(set(areas)) == len(areas)


# Of each family one that is small, with images of a size that it takes; its depth or options where it has such.
RUN: list[tuple[str, int, dict[str, Any]]] = [
    ("mobilenet_v3_small", 64, {}),
    ("squeezenet1_1", 64, {}),
    ("shufflenet_v2_x0_5", 64, {}),
    ("timm/convnext_atto", 64, {"depths": (1, 1, 1, 1)}),
    ("timm/vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 4}),
    ("timm/mambaout_femto", 64, {"depths": (1, 1, 1, 1)}),
    ("timm/pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}),
]


def small() -> nn.Sequential:
    def stage(c: int, d: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.BatchNorm2d(d), nn.Tanh(), nn.Conv2d(d, d, 3, 1, 1))

    return nn.Sequential(stage(3, 4), stage(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def as_map(candidate: Candidate, x: Tensor) -> Tensor:
    if candidate.layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    h, w = candidate.size
    return x[:, x.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w)) if candidate.layout == "tokens" else x


@pytest.mark.parametrize(("name", "side", "options"), RUN, ids=lambda value: value if isinstance(value, str) else "")
def test_one_step_equals_the_reference(name: str, side: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        target: nn.Module = timm.create_model(name.removeprefix("timm/"), num_classes=3, **options).double()
    else:
        target = build_model(name, 3).double()
    for module in target.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # few values on the last maps: 1e-5 makes the meta-gradient chaotic
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    source = small().double()
    x, y = torch.randn(3, 3, side, side, dtype=torch.float64), torch.arange(3)
    layers = find_layers(target, x, role="target", output=True)
    plain_target = copy.deepcopy(target)
    learner = L2T(source, target, example=x)
    assert learner.target_layers == layers.chosen
    assert learner.source_layers == [["0", "1"]]

    def to_map(candidate: Candidate) -> Any:
        return lambda feature: as_map(candidate, feature)

    plain = Reference(
        source,
        plain_target,
        source_layers=["0", "1"],
        target_layers=layers.chosen,
        pairs=learner.pairs,
        example=x,
        lr=0.05,
        inner_steps=1,
        target_maps={name: to_map(layers.candidates[name]) for name in layers.chosen},
    )
    moved_off(learner, plain)
    engine = Engine(learner, lr=0.05, inner_steps=1, mode="eager", say=lambda text: None)
    expected = plain.meta_gradient(x, y)
    assert error(engine.meta_gradient(x, y), expected) < 1e-9
    engine.step(x, y)
    plain.step(x, y)
    theta = dict(target.named_parameters())
    assert error(theta, dict(plain_target.named_parameters())) < 1e-9
