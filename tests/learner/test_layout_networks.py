"""Layouts of features of real networks, of torchvision and timm, without their weights and at small sizes.

Each is written down by hand, and held against what changed places of the image move.
"""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.learner.layout import FeatureMap, find_layout
from tests.learner.shared import features_of, images

# Builder, size of the images, and what layers give: name, layout, C, H, W.
TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], str]] = {
    "resnet18": (
        torchvision.models.resnet18,
        (64, 96),
        "conv1 NCHW 64 32 48, layer1 NCHW 64 16 24, layer3.0.bn2 NCHW 256 4 6, avgpool NCHW 512 1 1",
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48),
        (32, 32),
        "conv_proj NCHW 24 4 4, encoder.layers.encoder_layer_0 tokens+1 24 4 4, encoder.ln tokens+1 24 4 4",
    ),
    "convnext_tiny": (
        torchvision.models.convnext_tiny,
        (64, 96),
            "features.1 NCHW 96 16 24, features.1.0.block.2 NHWC 96 16 24, "
            "features.1.0.block.3 NHWC 384 16 24, features.2.0 NCHW 96 16 24, features.7 NCHW 768 2 3",
    ),
    "swin_t": (
        torchvision.models.swin_t,
        (64, 96),
        "features.0 NHWC 96 16 24, features.1.1 NHWC 96 16 24, features.3 NHWC 192 8 12, norm NHWC 768 2 3",
    ),
    "swin_v2_t": (
        torchvision.models.swin_v2_t, (64, 96), "features.1 NHWC 96 16 24, features.5 NHWC 384 4 6"
    ),
    "maxvit": (
        lambda: torchvision.models.MaxVit((64, 64), 16, 2, [16, 24], [1, 1], 8, 0.0),
        (64, 64),
        "stem NCHW 16 32 32, blocks.0 NCHW 16 16 16, blocks.1 NCHW 24 8 8",
    ),
}  # fmt: skip

SIZED: dict[str, object] = {"img_size": (64, 96)}
TIMM: dict[str, tuple[dict[str, object], str]] = {
    "vit_tiny_patch16_224": (
        {"img_size": (128, 192), "depth": 2},
            "patch_embed tokens 192 8 12, blocks.0 tokens+1 192 8 12, "
            "blocks.1.mlp.fc1 tokens+1 768 8 12, norm tokens+1 192 8 12",
    ),
    "vit_small_patch14_reg4_dinov2": (
        {"img_size": (56, 84), "depth": 1}, "blocks.0 tokens+5 384 4 6"
    ),
    "deit_tiny_distilled_patch16_224": ({"img_size": (64, 96), "depth": 2}, "blocks.1 tokens+2 192 4 6"),
    "mixer_s32_224": (
        {"img_size": (128, 192)},
        "stem tokens 512 4 6, blocks.0 tokens 512 4 6, blocks.1.mlp_channels tokens 512 4 6",
    ),
    "swin_tiny_patch4_window7_224": (
        SIZED,
            "patch_embed NHWC 96 16 24, layers.0.blocks.1 NHWC 96 16 24, layers.1 NHWC 192 8 12, "
            "layers.1.downsample.norm NHWC 384 8 12",
    ),
    "mambaout_femto": ({}, "stem NHWC 48 16 24, stages.1 NHWC 96 8 12, stages.0.blocks.0.conv NCHW 48 16 24"),
    "convnext_atto": ({}, "stages.0 NCHW 40 16 24, stages.1.downsample.0 NCHW 40 16 24, stem.1 NCHW 40 16 24"),
    "pvt_v2_b0": ({},
        "stages.0 NCHW 32 16 24, stages.0.blocks.0 tokens 32 16 24, "
        "stages.2.blocks.1.mlp.dwconv NCHW 640 4 6"),
    "hrnet_w18_small": ({}, "stage2[0] NCHW 16 16 24, stage2[1] NCHW 32 8 12, stage4.0[2] NCHW 64 4 6"),
    "mobilevit_xxs": ({}, "stages.1 NCHW 24 16 24, stages.2 NCHW 48 8 12, stages.3.1 NCHW 64 4 6"),
    "coatnet_nano_rw_224": (SIZED, "stages.0 NCHW 64 16 24, stages.2 NCHW 256 4 6"),
    "maxvit_nano_rw_256": ({"img_size": 128}, "stages.0 NCHW 64 32 32, stages.1 NCHW 128 16 16"),
    "cait_xxs24_224": ({"img_size": (128, 192), "depth": 2}, "blocks.0 tokens 192 8 12, blocks.1 tokens 192 8 12"),
    "xcit_nano_12_p16_224": ({"img_size": (128, 192), "depth": 2},
        "blocks.1 tokens 128 8 12, cls_attn_blocks.0 tokens+1 128 8 12, "
        "patch_embed[0] tokens 128 8 12"),
    "levit_128s": ({"img_size": 96}, "stem NCHW 128 6 6, stages.0 tokens 128 6 6, stages.1.blocks.1 tokens 256 3 3"),
    "poolformer_s12": ({}, "stages.0 NCHW 64 16 24, stages.1.blocks.0.norm1 NCHW 128 8 12"),
    "efficientformer_l1": ({}, "stages.1 NCHW 96 28 28, stages.3 tokens 448 7 7"),
    "edgenext_xx_small": ({},
        "stages.1 NCHW 48 8 12, stages.1.blocks.1.norm NHWC 48 8 12, "
        "stages.1.blocks.1.xca tokens 48 8 12"),
    "volo_d1_224": ({"img_size": (64, 96)},
        "patch_embed NCHW 192 8 12, network.0.0 NHWC 192 8 12, network.2 NHWC 384 4 6"),
    "efficientvit_b0": ({}, "stages.1 NCHW 32 8 12, stages.2 NCHW 64 4 6"),
    "beit_base_patch16_224": ({"img_size": (64, 64), "depth": 1}, "blocks.0 tokens+1 768 4 4"),
    "eva02_tiny_patch14_224": ({"img_size": (56, 56), "depth": 1}, "blocks.0 tokens+1 192 4 4"),
    "gmlp_s16_224": ({"img_size": (128, 192)}, "blocks.0 tokens 256 8 12"),
    "resmlp_12_224": ({"img_size": (128, 192)}, "blocks.0 tokens 384 8 12"),
    "twins_svt_small": ({"img_size": (64, 96)}, "blocks.0.1 tokens 64 16 24, blocks.1.0 tokens 128 8 12"),
    "davit_tiny": ({}, "stages.0 NCHW 96 16 24, stages.1 NCHW 192 8 12"),
    "focalnet_tiny_srf": ({}, "layers.0 NCHW 96 16 24, layers.1 NCHW 192 8 12"),
    "nest_tiny": ({"img_size": 128}, "levels.0 NCHW 96 32 32, levels.1 NCHW 192 16 16"),
}  # fmt: skip
FAST = ("resnet18", "vit_tiny_patch16_224", "mambaout_femto", "hrnet_w18_small")


def slow_but(names: Sequence[str], fast: Callable[[str], bool]) -> list[object]:
    return [pytest.param(name, marks=() if fast(name) else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but(list(TORCHVISION), lambda name: name in FAST))
def test_torchvision(name: str) -> None:
    build, size, expected = TORCHVISION[name]
    check(build, size, expected)


@pytest.mark.parametrize("name", slow_but(list(TIMM), lambda name: name in FAST))
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    options, expected = TIMM[name]
    size = options.get("img_size", (224, 224) if name == "efficientformer_l1" else (64, 96))
    check(lambda: timm.create_model(name, **options), size if isinstance(size, tuple) else (size, size), expected)


@pytest.mark.parametrize("layer", ["blocks.0.mlp_tokens", "blocks.0.mlp_tokens.fc2"])
def test_mixed_positions_of_a_mixer_are_refused(layer: str) -> None:
    mixer = pytest.importorskip("timm").create_model("mixer_s32_224").eval()
    (feature,), trail = features_of(mixer, [layer], images(224, 224))
    with pytest.raises(L2TError, match=re.escape(f"layer '{layer}' of the target gives [2, 512, 49], and no axes")):
        find_layout(feature, trail, layer, "target")


@pytest.mark.slow
def test_tokens_in_another_order_are_refused() -> None:
    """Hiera's 56 x 56 tokens stand by windows: a grid of sqrt(N) would scramble them silently."""
    hiera = pytest.importorskip("timm").create_model("hiera_tiny_224").eval()
    (feature,), trail = features_of(hiera, ["blocks.0"], images(224, 224))
    with pytest.raises(L2TError, match=re.escape("layer 'blocks.0' of the target gives [2, 3136, 96], and no axes")):
        find_layout(feature, trail, "blocks.0", "target")


def check(build: Callable[[], nn.Module], size: tuple[int, int], expected: str) -> None:
    torch.manual_seed(0)
    network = build().eval().double()
    for p in network.parameters():  # scales that start at 0 or 1e-6 hide a branch
        if p.dim() == 1:
            nn.init.uniform_(p, 0.2, 0.5)
    written = dict(map(parsed, expected.split(", ")))
    x, layers = images(*size).double(), list(written)
    with torch.no_grad():
        features, trail = features_of(network, layers, x)
        found = {name: find_layout(f, trail, name, "target") for name, f in zip(layers, features, strict=True)}
        assert found == written
        for layer, moved in moves(network, found, x).items():
            _, h, w = found[layer].shape
            for index, (row, column) in ((moved.argmax(), PLACES[0]), (moved.argmin(), PLACES[1])):
                i, j = divmod(int(index), w)
                distance = max(abs((i + 0.5) / h - (row + 0.5) / 8), abs((j + 0.5) / w - (column + 0.5) / 8))
                assert distance < 1 / 8 + 1 / min(h, w), (
                    f"{layer}: {(i, j)} of {(h, w)} moves with {(row, column)} of 8"
                )


def parsed(text: str) -> tuple[str, FeatureMap]:
    layer, layout, c, h, w = text.split()
    layout, _, prefix = layout.partition("+")
    return layer, FeatureMap(layout, (int(c), int(h), int(w)), int(prefix or 0))  # type: ignore[arg-type]


PLACES = ((1, 6), (5, 2))  # row and column of the image in eighths, off the diagonal


def moves(network: nn.Module, found: dict[str, FeatureMap], x: Tensor) -> dict[str, Tensor]:
    """How much more a place of each map moves with the first of `PLACES` than with the second, [H, W].

    The difference leaves out what attention moves everywhere.
    """
    height, width = (n // 8 for n in x.shape[2:])
    noise = 1e-2 * torch.randn(*x.shape[:2], height, width, generator=torch.Generator().manual_seed(1))
    shares: list[list[Tensor]] = []
    before = features_of(network, list(found), x)[0]
    for row, column in PLACES:
        changed = x.clone()
        changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += noise
        after = features_of(network, list(found), changed)[0]
        changes = [m.to_map(b - a) for m, a, b in zip(found.values(), before, after, strict=True)]
        shares.append([change.norm(dim=(0, 1)) / change.norm() for change in changes])
    moved = dict(zip(found, (first - second for first, second in zip(*shares, strict=True)), strict=True))
    return {layer: m for layer, m in moved.items() if min(m.shape) >= 4}  # less tells no place
