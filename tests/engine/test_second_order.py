"""Second derivatives: every module of torch.nn that has one mathematically, and the name of what has none."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torchvision import ops

from l2t_fast.engine.second_order import SecondOrder, examine
from l2t_fast.errors import UnfitError

pytestmark = pytest.mark.core

MAPS = {1: (2, 4, 12), 2: (2, 4, 8, 8), 3: (1, 2, 6, 6, 6)}
Function = Callable[[Tensor], Tensor]


class Unpool(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{d}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


def of_dimension(d: int) -> dict[str, Function]:
    """Modules of torch.nn in 1, 2 or 3 dimensions."""
    channels = MAPS[d][1]

    def new(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        return getattr(nn, f"{name}{d}d")(*args, **kwargs)

    modules: dict[str, Function] = {
        "MaxPool": new("MaxPool", 3, 2, 1),
        "MaxPool ceil": new("MaxPool", 3, 2, ceil_mode=True),
        "MaxPool dilation": new("MaxPool", 2, 1, dilation=2),
        "MaxUnpool": Unpool(d),
        "AvgPool": new("AvgPool", 3, 2, 1),
        "AdaptiveAvgPool": new("AdaptiveAvgPool", 3),
        "AdaptiveAvgPool 1": new("AdaptiveAvgPool", 1),
        "AdaptiveMaxPool": new("AdaptiveMaxPool", 3),
        "LPPool": new("LPPool", 3, 2),
        "BatchNorm": new("BatchNorm", channels, momentum=0.0),
        "BatchNorm eval": new("BatchNorm", channels).eval(),
        "InstanceNorm": new("InstanceNorm", channels, affine=True),
        "ReflectionPad": new("ReflectionPad", 1),
        "ReplicationPad": new("ReplicationPad", 1),
        "ConstantPad": new("ConstantPad", 1, 0.5),
        "ZeroPad": new("ZeroPad", 1),
        "CircularPad": new("CircularPad", 1),
        "ConvTranspose": new("ConvTranspose", channels, 2, 3, 2, 1),
        "Conv groups": new("Conv", channels, 2, 3, padding=2, dilation=2, groups=2),
        "Dropout": new("Dropout", 0.5),
    }
    if d > 1:
        samples = torch.rand(MAPS[d][0], channels, d, dtype=torch.float64)
        modules["FractionalMaxPool"] = new("FractionalMaxPool", 2, output_size=3, _random_samples=samples)
    for padding in ("zeros", "reflect", "replicate", "circular"):
        modules[f"Conv {padding}"] = new("Conv", channels, 2, 3, padding=1, padding_mode=padding)
    linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[d]
    for mode in ("nearest", "nearest-exact", "area", linear, *(("bicubic",) if d == 2 else ())):
        modules[f"Upsample {mode}"] = nn.Upsample(size=5, mode=mode)
        if mode in (linear, "bicubic"):
            modules[f"Upsample {mode} aligned"] = nn.Upsample(scale_factor=1.5, mode=mode, align_corners=True)
    return {f"{name} {d}d": module for name, module in modules.items()}


ACTIVATIONS: dict[str, Function] = {
    name: getattr(nn, name)(*arguments)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "LogSoftmax", "Softmin", "GLU")
    for arguments in [(0.3, 0.7) if name == "Threshold" else ()]
}
INPLACE: dict[str, Function] = {
    f"{name} in place": nn.Sequential(nn.Conv2d(4, 4, 1), getattr(nn, name)(inplace=True))
    for name in (
        "ReLU",
        "ReLU6",
        "Hardswish",
        "Hardsigmoid",
        "SELU",
        "CELU",
        "ELU",
        "SiLU",
        "Mish",
        "LeakyReLU",
        "RReLU",
    )
}
OTHERS_2D: dict[str, Function] = {
    "Softmax": nn.Softmax(1),
    "LogSoftmax": nn.LogSoftmax(1),
    "Softmin": nn.Softmin(1),
    "GLU": nn.GLU(1),
    "GELU tanh": nn.GELU("tanh"),
    "F.hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "F.hardsigmoid in place": lambda x: F.hardsigmoid(3 * x, inplace=True),
    "RReLU eval": nn.RReLU().eval(),
    "AlphaDropout": nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.5),
    "LayerNorm": nn.LayerNorm([8, 8]),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LocalResponseNorm": nn.LocalResponseNorm(3),
    "RMSNorm": nn.RMSNorm(8),
    "CosineSimilarity": lambda x: F.cosine_similarity(x, x.flip(2) * 1.3),
    "PairwiseDistance": lambda x: F.pairwise_distance(x[0], x[1]),
    "cdist": lambda x: torch.cdist(x[:, 0], x[:, 1]),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "ChannelShuffle": nn.ChannelShuffle(2),
    "Unfold": nn.Unfold(3),
    "Fold": lambda x: F.fold(F.unfold(x, 3) ** 2, (8, 8), 3),
    "interpolate bilinear antialias": lambda x: F.interpolate(x, size=5, mode="bilinear", antialias=True),
    "interpolate bicubic antialias": lambda x: F.interpolate(x, size=5, mode="bicubic", antialias=True),
    "embedding": lambda x: F.embedding(torch.tensor([1, 0, 1]), x[0, 0]),
    "affine_grid": lambda x: F.affine_grid(x[:, 0, :2, :3], [2, 3, 4, 4], align_corners=False),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "SqueezeExcitation": ops.SqueezeExcitation(4, 2, scale_activation=nn.Hardsigmoid),
    "StochasticDepth": ops.StochasticDepth(0.5, "row"),
    "DropBlock2d": ops.DropBlock2d(0.3, 3),
    "FrozenBatchNorm2d": ops.FrozenBatchNorm2d(4),
    **{
        f"grid_sample {mode} {padding}": lambda x, m=mode, p=padding: F.grid_sample(  # type: ignore[misc]
            x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)), mode=m, padding_mode=p, align_corners=False
        )
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
    },
}


def transformer(name: str, training: bool) -> Function:
    layer: nn.Module = getattr(nn, name)(4, 2, 8, dropout=0.0, batch_first=True).double().train(training)
    return (lambda x: layer(x, 1.1 * x)) if "Decoder" in name else layer


def attention(training: bool, weights: bool) -> Function:
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().train(training)
    return lambda x: layer(x, x, x, need_weights=weights)[0]


def recurrent(name: str, **options: Any) -> Function:
    layer = getattr(nn, name)(4, 3, batch_first=True, **options).double()
    return lambda x: layer(x)[0]


SEQUENCES: dict[str, Function] = {
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, 1.1 * x, x.flip(1)),
    "scaled_dot_product_attention causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "scaled_dot_product_attention dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    **{f"MultiheadAttention {t} {w}": attention(t, w) for t in (True, False) for w in (True, False)},
    **{
        f"{n} {t}": transformer(n, t)
        for t in (True, False)
        for n in ("TransformerEncoderLayer", "TransformerDecoderLayer")
    },
    **{name: recurrent(name) for name in ("LSTM", "GRU", "RNN")},
    "LSTM bidirectional": recurrent("LSTM", bidirectional=True, proj_size=2),
    "RNN relu": recurrent("RNN", nonlinearity="relu"),
}
OPERATIONS = {
    **{name: (function, MAPS[2]) for name, function in {**ACTIVATIONS, **INPLACE, **OTHERS_2D}.items()},
    **{name: (function, MAPS[d]) for d in MAPS for name, function in of_dimension(d).items()},
    **{name: (function, (3, 2, 4)) for name, function in SEQUENCES.items()},
}


# PyTorch's own second derivatives of these are younger than the oldest version that is supported; there it is refused.
YOUNG = ("cdist", "grid_sample")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_has_a_second_derivative(name: str) -> None:
    if name.startswith(YOUNG) and TORCH < (2, 14):
        pytest.skip(f"PyTorch {torch.__version__} has none")
    function, shape = OPERATIONS[name]
    if isinstance(function, nn.Module):
        function.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        with SecondOrder(replace=True).context():
            return function(x.abs() + 0.1 if "LPPool" in name else x + 0)  # LPPool divides zero by zero at zero

    assert gradgradcheck(run, x, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "op", [F.hardsigmoid, F.hardswish, nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), torch._C._nn.hardsigmoid]
)
def test_values_and_gradients_are_pytorchs_bit_by_bit(op: Function, dtype: torch.dtype) -> None:
    """At the kinks too, and on both sides of them."""
    kinks = torch.tensor([-3.0, 3.0, 0.0], dtype=dtype)
    x = torch.cat(
        [torch.linspace(-4, 4, 33, dtype=dtype), *(torch.nextafter(kinks, s * kinks - s) for s in (2, 0, -2))]
    )
    x.requires_grad_()
    g = torch.randn(x.shape, dtype=dtype)
    expected = op(x + 0)
    (slopes,) = torch.autograd.grad(expected, x, g)
    with SecondOrder(replace=True).context():
        y = op(x + 0)
    (actual,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(y, expected)
    assert torch.equal(actual, slopes)
    assert actual.requires_grad or "hardsig" not in str(op).lower()


TWICE = torch.tensor([0, 2, 2, 1, 2])
SILENTLY_WRONG: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), ((4, 3), (4, 1))),
    "weight_norm, last": (lambda v, g: torch._weight_norm(v, g, 1), ((4, 3), (1, 3))),
    "weight_norm, whole": (lambda v, g: torch._weight_norm(v, g, -1), ((4, 3), (1,))),
    "F.embedding": (lambda w: F.embedding(TWICE, w, scale_grad_by_freq=True), ((4, 3),)),
    "embedding": (lambda w: torch.embedding(w, TWICE, 1, True), ((4, 3),)),
}


@pytest.mark.parametrize("name", SILENTLY_WRONG)
def test_what_pytorch_differentiates_twice_wrongly_is_found_and_right(name: str) -> None:
    function, shapes = SILENTLY_WRONG[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    expected = function(*inputs)
    slopes = torch.autograd.grad(expected.pow(3).sum(), inputs)
    with examine(nn.Module(), lambda: function(*inputs), inputs).context():
        y = function(*inputs)
        assert gradgradcheck(function, inputs)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y.pow(3).sum(), inputs), slopes, rtol=1e-13, atol=1e-14)


def test_normalize_is_pytorchs_bit_by_bit() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 1, 5, dtype=torch.float64)
    mask[0, 0, 1] = 0
    g = torch.randn(3, 4, 5, dtype=torch.float64)
    for options in ({}, {"dim": -1}, {"p": 3.0}, {"p": 1.0, "dim": 2}):
        expected = F.normalize(x * mask, **options)
        (slopes,) = torch.autograd.grad(expected, x, g)
        with SecondOrder(replace=True).context():
            y = F.normalize(x * mask, **options)
        (actual,) = torch.autograd.grad(y, x, g, create_graph=True)
        assert torch.equal(y, expected)
        assert torch.equal(actual, slopes)
        assert torch.autograd.grad(actual.square().sum(), x)[0].isfinite().all()


class Net(nn.Module):
    """One block after a convolution; state of every kind, which a forward pass changes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.block, self.head = block, nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.kept, self.calls = torch.zeros(()), 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        self.kept.add_(1 + random.random() + np.random.rand() + torch.rand(()))  # noqa: NPY002
        h = self.norm(self.conv(x))
        self.mean = 0.9 * self.mean + 0.1 * h.mean((0, 2, 3)).detach()  # another tensor
        h = self.block(h)
        return {"features": [h], "logits": self.head(h.mean((2, 3)))}


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


class PaddedNormalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.normalize(F.pad(x, (1, 1)))[..., 1:-1] + F.normalize(x * torch.eye(6).to(x))


class RoiAlign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.roi_align(x, torch.tensor([[0, 0.0, 0, 6, 6]]).to(x), 3)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2)
        return F.scaled_dot_product_attention(t, t, t).view_as(x)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Container(nn.Module):
    """An operation between its modules, whose missing derivative torch.autograd.grad would not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.conv(x))


def everything(net: nn.Module) -> dict[str, Any]:
    return {
        **{name: t.detach().clone() for name, t in net.state_dict(keep_vars=True).items()},
        **{f"grad {name}": p.grad for name, p in net.named_parameters()},
        "kept": net.kept.clone(),
        "calls": net.calls,
        "modes": [m.training for m in net.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


def look(net: nn.Module) -> SecondOrder:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return examine(net, lambda: net(x), [*net.parameters()], role="target")


@pytest.mark.parametrize(
    ("block", "replace"),
    [
        (nn.ReLU(), False),
        (Attention(), False),
        (nn.Hardswish(), False),
        (nn.LPPool2d(2, 2), False),
        (nn.Sequential(nn.ReLU(), nn.ConstantPad2d(2, 0.0), nn.LPPool2d(2, 2)), False),  # NaN, which nothing can mend
        (PaddedNormalize(), True),
        (Normalize(), True),  # for batches with zeros
        (nn.Hardsigmoid(), True),
        (nn.Hardsigmoid(inplace=True), True),
        (nn.Sequential(Attention(), ops.SqueezeExcitation(4, 2, scale_activation=nn.Hardsigmoid)), True),
    ],
)
def test_replacements_run_only_where_they_are_needed(block: nn.Module, replace: bool) -> None:
    net = Net(block)
    before = everything(net)
    mean = net.mean
    assert look(net) == SecondOrder(replace)
    assert str(everything(net)) == str(before)
    assert net.mean is mean


@pytest.mark.parametrize(
    ("block", "place", "reason"),
    [
        (RoiAlign(), "'block' of the target (RoiAlign)", "roi_align"),
        (
            nn.Sequential(nn.Hardsigmoid(), nn.Sequential(nn.ReLU(inplace=True), RoiAlign())),
            "'block.1.1' of",
            "roi_align",
        ),
        (nn.CrossMapLRN2d(3), "'block' of the target (CrossMapLRN2d)", "automatic differentiation"),
        (nn.Sequential(Container(), RoiAlign()), "'block.0' of the target (Container)", "once_differentiable"),
    ],
)
def test_what_has_no_second_derivative_is_named(block: nn.Module, place: str, reason: str) -> None:
    net = Net(block)
    before = everything(net)
    with pytest.raises(UnfitError) as caught:
        look(net)
    assert place in str(caught.value)
    assert reason in str(caught.value)
    assert str(everything(net)) == str(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_only_what_is_trained_needs_second_derivatives() -> None:
    net = nn.Sequential(RoiAlign(), nn.Conv2d(3, 2, 1))
    assert look(net) == SecondOrder()
    frozen = Net(RoiAlign())
    frozen.conv.requires_grad_(False)
    frozen.norm.requires_grad_(False)
    assert look(frozen) == SecondOrder()


def test_the_forward_passs_own_error_passes_through() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        look(nn.Conv2d(4, 4, 1))
