"""The gradient of a convolution's weight as one product of matrices: what it gives, and where it is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2t_fast.kernels.layers.autograd import differentiated_once
from l2t_fast.kernels.layers.convolution import convolution
from l2t_fast.kernels.layers.few_places import few_places, weight_gradient
from l2t_fast.kernels.layers.twins import Twins

pytestmark = pytest.mark.core

aten = torch.ops.aten
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# B, C_in, (H, W), C_out, kernel, stride, padding, dilation
CASES = {
    "2x2": (3, 5, (2, 2), 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": (2, 4, (6, 5), 16, (3, 2), (2, 3), (1, 0), (1, 1)),
    "dilated": (2, 3, (5, 7), 40, (2, 3), (1, 2), (2, 1), (2, 2)),
    "wide padding": (1, 3, (2, 1), 64, (3, 3), (1, 1), (3, 2), (1, 1)),
}


def drawn(case: tuple[Any, ...], layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    batch, C_in, size, C_out, kernel, *geometry = case
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        for shape in ((batch, C_in, *size), (C_out, C_in, *kernel))
    )
    shape = nn.functional.conv2d(x, w, None, *geometry).shape
    g = torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    return g, x, w, tuple(geometry)


def native(g: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    stride, padding, dilation = geometry
    arguments = ([w.shape[0]], stride, padding, dilation, False, (0, 0), 1, (False, True, True))
    _, g_w, g_bias = aten.convolution_backward(g, x, w, *arguments)
    return g_w, g_bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_gradient(case: tuple[Any, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    """In low precision as near to float64 as PyTorch's own, of the same rounded numbers."""
    *tensors, geometry = drawn(case, layout)
    g, x, w = (t.to(dtype) for t in tensors)
    exact = native(g.double(), x.double(), w.double(), geometry)
    ours = weight_gradient(g, x, w, *geometry)
    assert ours[0].stride() == w.stride()
    for mine, theirs, best in zip(ours, native(g, x, w, geometry), exact, strict=True):
        error, plain = ((t.double() - best).norm() / best.norm() for t in (mine, theirs))
        slack = 4 if dtype == torch.float64 else 1 / 2  # half a rounding; in float64 the plain one is the exact one
        assert error <= 1.2 * plain + slack * torch.finfo(dtype).eps
        assert mine.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_order_of_a_small_map(layout: torch.memory_format) -> None:
    """∇ of a quadratic form of (g_x, g_w, g_bias), in float32 through the products, against plain float64."""
    g, x, w, geometry = drawn(CASES["2x2"], layout)
    bias = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert few_places(g.float(), w.float(), 1)

    def second(dtype: torch.dtype, convolve: Any) -> list[Tensor]:
        variables = [t.detach().to(dtype).requires_grad_() for t in (g, x, w, bias)]
        y = convolve(variables[1], variables[2], variables[3], *geometry, 1)
        first = torch.autograd.grad(y, variables[1:], variables[0], create_graph=True)
        return list(torch.autograd.grad(sum(t.pow(2).sum() for t in first), variables[:3]))

    with Calls() as calls:
        ours = second(torch.float32, convolution)
    assert calls.products == 2  # of ∇ and of its adjoint
    assert not calls.weight_gradients
    for mine, best in zip(ours, second(torch.float64, nn.functional.conv2d), strict=True):
        assert (mine.double() - best).norm() <= 1e-6 * best.norm()


class Calls(TorchDispatchMode):
    """Counts products of matrices, and convolutions' own gradients of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.weight_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is aten.mm.default
        self.weight_gradients += func is aten.convolution_backward.default and args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("once", [True, False], ids=["once", "twice"])
@pytest.mark.parametrize(
    ("layer", "side", "dtype", "product"),
    [
        (nn.Conv2d(2, 64, 3, padding=1), 4, torch.float32, True),
        (nn.Conv2d(2, 64, 3, padding=1, bias=False), 4, torch.float32, True),
        (nn.Conv2d(2, 31, 3, padding=1), 4, torch.float32, False),  # 32 places
        (nn.Conv2d(2, 32, 3, padding=1), 4, torch.float32, True),
        (nn.Conv2d(2, 63, 3, padding=1), 4, torch.bfloat16, False),
        (nn.Conv2d(2, 64, 3, padding=1), 4, torch.bfloat16, True),
        (nn.Conv2d(2, 64, 3, padding=1, stride=2), 8, torch.float32, True),
        (nn.Conv2d(2, 64, 3, padding=1), 4, torch.float64, False),
        (nn.Conv2d(2, 64, 1), 4, torch.float32, False),
        (nn.Conv2d(2, 64, 3, padding=1, groups=2), 4, torch.float32, False),
    ],
    ids=[
        "few",
        "no bias",
        "many",
        "as many",
        "many in bf16",
        "few in bf16",
        "strided",
        "float64",
        "one place",
        "groups",
    ],
)
def test_where_it_is_taken(layer: nn.Conv2d, side: int, dtype: torch.dtype, product: bool, once: bool) -> None:
    layer = nn.Sequential(layer).to(dtype)
    x = torch.randn(2, 2, side, side, dtype=dtype)
    with Twins(layer).taken(simulated=False):
        if once:
            with differentiated_once():
                y = layer(x)
        else:
            y = layer(x)
    with Calls() as calls:
        torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert (calls.products, calls.weight_gradients) == (int(product), int(not product))
