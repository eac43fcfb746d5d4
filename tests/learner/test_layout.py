"""What a layer gives, against what is written down by hand and against what a changed corner of the image moves."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2t_fast.errors import L2TError
from l2t_fast.learner.layout import FeatureMap, parse_layer, pick
from l2t_fast.learner.network import Network
from l2t_fast.learner.trail import AxisTrail
from tests.learner.shared import (
    Do,
    attend,
    cube,
    find,
    grouped_windows,
    images,
    mixer,
    permute,
    prefixed,
    shifted_windows,
    stem,
    tokens,
    windows,
)

SQUARE, WIDE = images(8, 8), images(16, 24)
KNOWN: dict[str, tuple[nn.Module, Tensor, FeatureMap]] = {
    "conv": (stem(), WIDE, FeatureMap("NCHW", (8, 8, 12))),
    "C is H": (cube(), SQUARE, FeatureMap("NCHW", (8, 8, 8))),
    "norm, relu, pool": (
        stem(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)), WIDE, FeatureMap("NCHW", (8, 4, 6))
    ),
    "group norm, hardswish": (stem(nn.GroupNorm(2, 8), nn.Hardswish()), WIDE, FeatureMap("NCHW", (8, 8, 12))),
    "upsampled": (stem(nn.Upsample(scale_factor=2)), WIDE, FeatureMap("NCHW", (8, 16, 24))),
    "pixel shuffle": (stem(nn.PixelShuffle(2)), WIDE, FeatureMap("NCHW", (2, 16, 24))),
    "last op is a permute": (cube(permute(0, 2, 3, 1)), SQUARE, FeatureMap("NHWC", (8, 8, 8))),
    "norm on permuted": (cube(permute(0, 2, 3, 1), nn.LayerNorm(8)), SQUARE, FeatureMap("NHWC", (8, 8, 8))),
    "linear on permuted": (
        stem(permute(0, 2, 3, 1), nn.Linear(8, 12), nn.GELU()), WIDE, FeatureMap("NHWC", (12, 8, 12))
    ),
    "permuted and back": (
        cube(permute(0, 2, 3, 1), nn.LayerNorm(8), permute(0, 3, 1, 2)), SQUARE, FeatureMap("NCHW", (8, 8, 8))
    ),
    "layer norm that is NCHW": (
        cube(torchvision.models.convnext.LayerNorm2d(8)), SQUARE, FeatureMap("NCHW", (8, 8, 8))
    ),
    "norm over all": (cube(nn.LayerNorm([8, 8, 8])), SQUARE, FeatureMap("NCHW", (8, 8, 8))),
    "norm over the columns": (cube(nn.LayerNorm(8)), SQUARE, FeatureMap("NCHW", (8, 8, 8))),
    "linear on the columns, as residual": (
        cube(Do(lambda x, f: x + f(x), nn.Linear(8, 8))), SQUARE, FeatureMap("NCHW", (8, 8, 8))
    ),
    "batch of C images": (cube(), images(8, 8, batch=8), FeatureMap("NCHW", (8, 8, 8))),
    "one image": (cube(permute(0, 2, 3, 1)), images(8, 8, batch=1), FeatureMap("NHWC", (8, 8, 8))),
    "tokens": (stem(tokens(), nn.LayerNorm(8)), WIDE, FeatureMap("tokens", (8, 8, 12))),
    "as many tokens as channels": (
        nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), tokens()), SQUARE, FeatureMap("tokens", (64, 8, 8))
    ),
    "class token": (stem(tokens(), prefixed(1)), WIDE, FeatureMap("tokens", (8, 8, 12), 1)),
    "a prefix that makes another grid": (stem(tokens(), prefixed(4)), WIDE, FeatureMap("tokens", (8, 8, 12), 4)),
    "class token and registers": (
        stem(tokens(), prefixed(1), nn.LayerNorm(8), prefixed(3), nn.Linear(8, 6)),
        WIDE,
        FeatureMap("tokens", (6, 8, 12), 4),
    ),
    "tokens behind": (
        stem(tokens(), Do(lambda x: torch.cat([x, x.mean(1, keepdim=True)], dim=1))),
        WIDE,
        FeatureMap("tokens", (8, 8, 12)),
    ),
    "class token taken off": (
        stem(tokens(), prefixed(1), nn.LayerNorm(8), Do(lambda x: x[:, 1:])), WIDE, FeatureMap("tokens", (8, 8, 12))
    ),
    "attention": (
        stem(tokens(), prefixed(1), Do(attend, nn.Linear(8, 24))), WIDE, FeatureMap("tokens", (8, 8, 12), 1)
    ),
    "encoder layer": (
        stem(tokens(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), WIDE, FeatureMap("tokens", (8, 8, 12))
    ),
    "mixer": (
        stem(tokens(), Do(mixer, nn.LayerNorm(8), nn.Linear(96, 96))), WIDE, FeatureMap("tokens", (8, 8, 12))
    ),
    "tokens back to a map": (
        stem(tokens(), Do(lambda x: x.transpose(1, 2).reshape(len(x), 8, 8, 12))), WIDE, FeatureMap("NCHW", (8, 8, 12))
    ),
    "patches of the image": (
        Do(
            lambda x, f: f(x.reshape(2, 3, 4, 4, 6, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 24, 48)), nn.Linear(48, 5)
        ),
        WIDE,
        FeatureMap("tokens", (5, 4, 6)),
    ),
    "shifted windows": (
        stem(permute(0, 2, 3, 1), Do(shifted_windows, nn.LayerNorm(8))), WIDE, FeatureMap("NHWC", (8, 8, 12))
    ),
    "attention of windows in five axes": (stem(tokens(), Do(grouped_windows)), WIDE, FeatureMap("tokens", (8, 8, 12))),
    "space to depth": (
        stem(nn.PixelUnshuffle(2), permute(0, 2, 3, 1), nn.LayerNorm(32)), WIDE, FeatureMap("NHWC", (32, 4, 6))
    ),
    "merged patches": (
        stem(
            permute(0, 2, 3, 1),
            Do(lambda x: x.reshape(2, 4, 2, 6, 2, 8).permute(0, 1, 3, 4, 2, 5).flatten(3)),
        ),
        WIDE,
        FeatureMap("NHWC", (32, 4, 6)),
    ),
    "patches by nn.Unfold": (
        nn.Sequential(nn.Unfold(4, stride=4), Do(lambda x: x.transpose(1, 2)), nn.Linear(48, 5)),
        WIDE,
        FeatureMap("tokens", (5, 4, 6)),
    ),
    "patches by unfold": (
        Do(
            lambda x, f: f(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)), nn.Linear(48, 5)
        ),
        WIDE,
        FeatureMap("NHWC", (5, 4, 6)),
    ),
    "1 x 1": (stem(nn.AdaptiveAvgPool2d(1)), WIDE, FeatureMap("NCHW", (8, 1, 1))),
    "1 x 1, channels last": (
        stem(nn.AdaptiveAvgPool2d(1), permute(0, 2, 3, 1), nn.LayerNorm(8)), WIDE, FeatureMap("NHWC", (8, 1, 1))
    ),
    "one row": (
        nn.Sequential(nn.Conv2d(3, 5, (16, 2), (16, 2)), tokens(), prefixed(1)),
        WIDE,
        FeatureMap("tokens", (5, 1, 12), 1),
    ),
    "one column": (
        nn.Sequential(nn.Conv2d(3, 5, (2, 24), (2, 24)), tokens()), WIDE, FeatureMap("tokens", (5, 8, 1))
    ),
    "written in place": (
        stem(Do(lambda x: torch.zeros_like(x).copy_(x).mul_(2))), WIDE, FeatureMap("NCHW", (8, 8, 12))
    ),
    "a map of its own, by the kind of what makes it": (
        Do(lambda x, f, g: g(f(x.flatten(1)).view(2, 5, 4, 6)), nn.Linear(1152, 120), nn.Conv2d(5, 7, 1)),
        WIDE,
        FeatureMap("NCHW", (7, 4, 6)),
    ),
    "checkpointed": (
        stem(Do(lambda x, f: checkpoint(f, x, use_reentrant=False), permute(0, 2, 3, 1))),
        WIDE,
        FeatureMap("NHWC", (8, 8, 12)),
    ),
    "autocast": (
        stem(Do(lambda x, f: autocast(f, x), nn.Sequential(permute(0, 2, 3, 1), nn.Linear(8, 9)))),
        WIDE,
        FeatureMap("NHWC", (9, 8, 12)),
    ),
}  # fmt: skip


def autocast(f: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result: Tensor = f(x)
    return result


@pytest.mark.core
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", KNOWN)
def test_known_layouts(name: str, mode: type[AbstractContextManager[None]]) -> None:
    module, x, expected = KNOWN[name]
    with mode():
        assert find(module.train(mode is torch.enable_grad), x) == expected


class ChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.permute(0, 3, 1, 2)


def test_functions_and_scripts_are_seen_through() -> None:
    assert find(stem(Do(ChannelsLast.apply)), WIDE) == FeatureMap("NHWC", (8, 8, 12))
    scripted = torch.jit.trace(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1)), torch.zeros(2, 8, 8, 12))
    assert find(stem(scripted, permute(0, 2, 3, 1)), WIDE) == FeatureMap("NHWC", (8, 8, 12))


REFUSED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "positions last": (stem(tokens(), Do(lambda x: x.transpose(1, 2))), WIDE, "[2, 8, 96]"),
    "mixed positions": (stem(Do(lambda x, f: f(x.flatten(2)), nn.Linear(96, 96))), WIDE, "[2, 8, 96]"),
    "mixed positions, 8 of 8": (
        nn.Sequential(nn.Conv2d(3, 8, (4, 2), (4, 2)), Do(lambda x, f: f(x.flatten(2)), nn.Linear(8, 8))),
        SQUARE,
        "[2, 8, 8]",
    ),
    "linear on the columns": (cube(nn.Linear(8, 8)), SQUARE, "[2, 8, 8, 8]"),
    "windows": (stem(permute(0, 2, 3, 1), Do(windows)), WIDE, "[12, 16, 8]"),
    "attention weights": (stem(tokens(), Do(lambda x: (x @ x.transpose(1, 2))[:, None])), WIDE, "[2, 1, 96, 96]"),
    "a window": (stem(Do(lambda x: x.view(2, 8, 2, 4, 12)[:, :, 1])), WIDE, "[2, 8, 4, 12]"),
    "a pooled window": (
        stem(Do(lambda x: x.view(2, 8, 2, 4, 12).mean(2)), nn.MaxPool2d(2)), WIDE, "[2, 8, 2, 6]"
    ),
    "patches that overlap": (stem(Do(lambda x: x.mean(1).unfold(1, 4, 3))), WIDE, "[2, 2, 12, 4]"),
    "images in another order": (stem(Do(lambda x: x[[1, 0]])), WIDE, "[2, 8, 8, 12]"),
    "rolled": (stem(Do(lambda x: x.roll(3, dims=2))), WIDE, "[2, 8, 8, 12]"),
    "mirrored": (stem(Do(lambda x: x.flip(3))), WIDE, "[2, 8, 8, 12]"),
    "columns before rows": (cube(permute(0, 1, 3, 2)), SQUARE, "[2, 8, 8, 8]"),
    "plus its own transpose": (cube(Do(lambda x: x + x.transpose(2, 3))), SQUARE, "[2, 8, 8, 8]"),
    "tokens, columns first": (cube(permute(0, 1, 3, 2), tokens()), SQUARE, "[2, 64, 8]"),
    "windows as tokens": (stem(permute(0, 2, 3, 1), Do(lambda x: windows(x).view(2, 96, 8))), WIDE, "[2, 96, 8]"),
    "some tokens": (stem(tokens(), Do(lambda x: x[:, torch.arange(96).flip(0)])), WIDE, "[2, 96, 8]"),
    "class token alone": (stem(tokens(), prefixed(1), Do(lambda x: x[:, :1])), WIDE, "[2, 1, 8]"),
    "two maps": (stem(tokens(), Do(lambda x: torch.cat([x, x], dim=1))), WIDE, "[2, 192, 8]"),
    "a map of its own": (
        Do(lambda x, f: f(x.flatten(1)).view(2, 5, 8, 8), nn.Linear(192, 320)), SQUARE, "[2, 5, 8, 8]"
    ),
    "frequencies": (stem(Do(lambda x: torch.fft.fft2(x).real)), WIDE, "[2, 8, 8, 12]"),
    "images second": (stem(permute(1, 0, 2, 3)), WIDE, "[8, 2, 8, 12]"),
}  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    module, x, shape = REFUSED[name]
    option = "'tokens'" if shape.count(",") == 2 else "'NHWC'"
    with torch.no_grad(), pytest.raises(L2TError) as error:
        find(module, x)
    assert str(error.value).startswith(f"layer '0' of the target gives {shape}, and ")
    assert f"layout={{'0': {option}" in str(error.value)


@pytest.mark.parametrize("shape", [(2, -1), (2, 2, 2, -1, 3)])
def test_no_map_at_all(shape: tuple[int, ...]) -> None:
    with pytest.raises(L2TError, match=r"layer '0' of the target gives \[2, .*which is no map"):
        find(stem(Do(lambda x: x.flatten(1)[:, :12].reshape(shape))), WIDE)


LOST = nn.Sequential(nn.Flatten(), Do(lambda x: x.flip(1)))  # no axis is known any more


@pytest.mark.parametrize(
    ("shape", "option", "expected"),
    [
        ((2, 8, 9, 16), "NCHW", FeatureMap("NCHW", (8, 9, 16))),
        ((2, 8, 9, 16), "NHWC", FeatureMap("NHWC", (16, 8, 9))),
        ((2, 24, 48), "tokens", FeatureMap("tokens", (48, 4, 6))),
        ((2, 25, 46), "tokens+1", FeatureMap("tokens", (46, 4, 6), 1)),
        ((2, 8, 144), "tokens+2", FeatureMap("tokens", (144, 2, 3), 2)),
        ((2, 25, 46), "tokens", "25 - 0 tokens are no grid with the aspect of the images (16 x 24)"),
        ((2, 16, 72), "tokens", "16 - 0 tokens are no grid"),
        ((2, 2, 5), "tokens+2", "2 - 2 tokens are no grid"),
        ((2, 24, 48), "NHWC", "gives [2, 24, 48], which is not 'NHWC': tokens have three axes"),
        ((2, 8, 9, 16), "tokens", "gives [2, 8, 9, 16], which is not 'tokens': tokens have three axes"),
        ((2, 8, 9, 16), "CHW", "layout={'0': 'CHW'} is not a layout: say 'NCHW', 'NHWC', 'tokens' or 'tokens+1'."),
    ],
)
def test_the_user_decides(shape: tuple[int, ...], option: str, expected: FeatureMap | str) -> None:
    size = torch.Size(shape).numel() // 2
    module = nn.Sequential(LOST, Do(lambda x: x[:, :size].reshape(shape)))
    if isinstance(expected, FeatureMap):
        with pytest.raises(L2TError, match="layout="):
            find(module, WIDE)
        assert find(module, WIDE, option) == expected
    else:
        with pytest.raises(L2TError, match=re.escape(expected)):
            find(module, WIDE, option)


def test_the_user_overrules_what_was_found() -> None:
    assert find(cube(), SQUARE, "NHWC") == FeatureMap("NHWC", (8, 8, 8))
    tall = stem(tokens(), prefixed(1))  # 96 positions of an image with another aspect are known without it
    assert find(tall, WIDE, "tokens+1") == FeatureMap("tokens", (8, 8, 12), 1)
    with pytest.raises(L2TError, match="97 - 0 tokens are no grid"):
        find(tall, WIDE, "tokens")


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (FeatureMap("NCHW", (5, 2, 3)), (2, 5, 2, 3)),
        (FeatureMap("NHWC", (5, 2, 3)), (2, 2, 3, 5)),
        (FeatureMap("tokens", (5, 2, 3), 2), (2, 9, 5)),
    ],
)
def test_to_map(layout: FeatureMap, shape: tuple[int, ...]) -> None:
    feature = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result = layout.to_map(feature)
    assert result.shape == (2, 5, 2, 3)
    assert result.data_ptr() == feature[:, layout.prefix :].data_ptr()  # a view
    for c, i, j in ((0, 0, 0), (4, 1, 2), (3, 0, 1)):
        entry = {"NCHW": (c, i, j), "NHWC": (i, j, c), "tokens": (2 + 3 * i + j, c)}[layout.layout]
        assert result[1, c, i, j] == feature[1][entry]
    assert torch.autograd.gradgradcheck(lambda f: layout.to_map(f) ** 3, feature)


def test_the_pass_is_unchanged() -> None:
    network = nn.Sequential(
        stem(nn.BatchNorm2d(8), nn.Dropout(0.5)), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(240, 3)
    )
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        network[0][1].reset_running_stats()
        if watched:
            with AxisTrail(WIDE):
                output = network(WIDE)
        else:
            output = network(WIDE)
        gradients = torch.autograd.grad(output.square().sum(), list(network.parameters()))
        results.append([output, *gradients, network[0][1].running_mean.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_by_place_and_key() -> None:
    assert parse_layer("layer1.0") == ("layer1.0", None)
    assert parse_layer("stage2[1]") == ("stage2", 1)
    assert parse_layer("stage2.0[-1]") == ("stage2.0", -1)
    assert parse_layer("body[out]") == parse_layer("body['out']") == ("body", "out")
    a, b = torch.zeros(2, 3), torch.ones(2, 4)
    assert pick(a, "l", "target") is a
    assert pick([a, b], "l[1]", "target") is pick((a, b), "l[-1]", "target") is b
    assert pick({"out": a, "0": b}, "l[out]", "target") is a
    assert pick({"out": a, "0": b}, "l[0]", "target") is b
    named = torch.return_types.max([a, b])
    assert pick(named, "l[indices]", "target") is b
    for output, layer, message in (
        (
            [a, b],
            "l",
            "layer 'l' of the target gives several features: tap one by its place, of 'l[0]' [2, 3], 'l[1]' ",
        ),
        ([a, b], "l[2]", "has no tensor [2]: tap one by its place, of 'l[0]' [2, 3], 'l[1]' [2, 4]."),
        ((a, None), "l[1]", "has no tensor [1]: tap one by its place, of 'l[0]' [2, 3], 'l[1]' NoneType."),
        ({"out": a}, "l", "of 'l[out]' [2, 3]."),
        (a, "l[0]", "layer 'l' of the target gives one tensor [2, 3]: name it without [0]."),
        (None, "l", "layer 'l' of the target gives NoneType, not a tensor: tap a layer in it."),
    ):
        with pytest.raises(L2TError, match=re.escape(message)):
            pick(output, layer, "target")


class Gives(nn.Module):
    """`layer` gives what `make` makes of a map."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.layer = type("Layer", (nn.Module,), {"forward": lambda _, x: make(x)})()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.layer(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :0], r"gives float32 \[2, 0, 6, 6\] for 2 images"),
        (lambda x: x[:, :, :0], r"gives float32 \[2, 4, 0, 6\] for 2 images"),
        (lambda x: torch.cat([x, x]), r"gives float32 \[4, 4, 6, 6\] for 2 images"),
        (lambda x: torch.complex(x, x), "which are no real numbers"),
        (lambda x: x > 0, "which are no real numbers"),
        (lambda x: x.to_sparse(), "laid out as torch.sparse_coo"),
    ],
)
def test_what_is_no_map_of_numbers_is_refused_whatever_its_layout_is_said_to_be(make: Any, message: str) -> None:
    with pytest.raises(L2TError, match=message):
        Network(Gives(make), ["layer"], SQUARE, role="target", output=True, layout={"layer": "NCHW"})


def test_a_feature_is_an_attribute_of_what_a_layer_returns() -> None:
    network = Gives(lambda x: SimpleNamespace(low=x, high=x * 2))
    high = Network(network, ["layer[high]"], SQUARE, role="target", output=True)
    torch.testing.assert_close(high.run(SQUARE).features[0], network.conv(SQUARE) * 2)
    with pytest.raises(L2TError, match="gives several features: tap one by its place"):
        Network(network, ["layer"], SQUARE, role="target", output=True)
