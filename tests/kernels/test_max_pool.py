"""Max-pooling with its own second order against PyTorch's, and in Triton (in the interpreter, or on a GPU)."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2t_fast.kernels.layers import max_pool as layer
from l2t_fast.kernels.layers import max_pool_triton, twins
from l2t_fast.kernels.layers.autograd import differentiated_once
from l2t_fast.kernels.layers.max_pool import MaxPool, MaxPoolAdjoint, MaxPoolBackward, max_pool

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
aten = torch.ops.aten

# kernel, stride, padding, dilation, ceil_mode
PLAIN: dict[str, tuple[Any, ...]] = {
    "2": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "3 at 2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "3 at 2, ceil": ((3, 3), (2, 2), (0, 0), (1, 1), True),
    "2 at 2, ceil": ((2, 2), (2, 2), (1, 1), (1, 1), True),
    "3 at 1": ((3, 3), (1, 1), (1, 1), (1, 1), False),
    "uneven": ((3, 2), (2, 3), (1, 0), (1, 1), True),
    "gaps": ((2, 1), (3, 2), (0, 0), (1, 1), False),
    "5 at 3": ((5, 5), (3, 3), (2, 2), (1, 1), False),
    "whole": ((7, 6), (7, 6), (0, 0), (1, 1), False),
}
GEOMETRIES = PLAIN | {
    "dilated": ((2, 2), (1, 1), (0, 0), (2, 2), False),
    "dilated, strided": ((2, 3), (2, 1), (1, 1), (3, 2), True),
}
SHAPES = [(2, 3, 7, 6), (3, 5, 9, 8), (1, 1, 8, 6), (1, 66, 7, 7)]
geometries = pytest.mark.parametrize("geometry", [pytest.param(g, id=name) for name, g in GEOMETRIES.items()])
plain = pytest.mark.parametrize("geometry", [pytest.param(g, id=name) for name, g in PLAIN.items()])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def randn(*shape: int, seed: int = 0, layout: Any = torch.contiguous_format, dtype: Any = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)


@geometries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nchw_is_pooled_in_channels_last(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    """On a CPU, where that is faster: the same maxima at the same places, of equal numbers and NaN too, in NCHW."""
    for channels in (8, 7):
        x = randn(2, channels, 9, 8, dtype=dtype).round()  # many are equal
        x[0, 1, 2:4, 3] = float("nan")
        with Inputs() as inputs:
            y, places = MaxPool.apply(x, *geometry)
        assert inputs.channels_last == [channels == 8]
        wanted, wanted_places = aten.max_pool2d_with_indices(x, *geometry)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places, wanted_places)
        assert y.stride() == wanted.stride()
        assert places.stride() == wanted_places.stride()


class Inputs(TorchDispatchMode):
    """Notes which images that are pooled are laid out as channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.max_pool2d_with_indices.default:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


def test_a_twin_pools_so_even_where_nobody_differentiates_twice() -> None:
    pool = nn.Sequential(nn.MaxPool2d(2))
    x = randn(2, 8, 6, 6).requires_grad_()
    with Inputs() as inputs, twins.Twins(pool).taken(simulated=False), differentiated_once():
        y = pool(x)
    assert inputs.channels_last == [True]
    plain = torch.nn.functional.max_pool2d(x, 2)
    assert torch.equal(torch.autograd.grad(y.sin().sum(), x)[0], torch.autograd.grad(plain.sin().sum(), x)[0])


@geometries
@layouts
def test_gradcheck(geometry: tuple[Any, ...], layout: Any) -> None:
    x = randn(2, 3, 7, 6, layout=layout).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return max_pool(x, *geometry)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda x: run(x.exp()).square(), x)


@geometries
@layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch_and_keeps_the_layout(geometry: tuple[Any, ...], layout: Any, shape: tuple[int, ...]) -> None:
    """Value, gradient, double backward, to the last bit."""
    found = []
    for pool in (max_pool, aten.max_pool2d_with_indices):
        x = randn(*shape, layout=layout).requires_grad_()
        z = x * 1.5
        y = pool(z, *geometry) if pool is max_pool else pool(z, *geometry)[0]
        weight = randn(*y.shape, seed=1, layout=layout).requires_grad_()
        (g,) = torch.autograd.grad((y * weight).sum(), z, create_graph=True)
        u = randn(*shape, seed=2, layout=layout)
        found.append((y, g, *torch.autograd.grad((g.square() * u).sum(), [weight])))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    for ours in found[0]:
        assert ours.is_contiguous(memory_format=layout)


class Layouts(TorchDispatchMode):
    """Collects what is not channels_last, and calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        maps = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dim() == 4]
        other = any(not t.is_contiguous(memory_format=torch.channels_last) for t in maps)
        if other and not func.is_view:  # permuted on the way
            self.others.add(func.overloadpacket.__name__)
        return result


@geometries
def test_nothing_leaves_channels_last_and_nothing_is_copied(geometry: tuple[Any, ...]) -> None:
    x = randn(2, 8, 7, 6, layout=torch.channels_last).requires_grad_()
    u = randn(2, 8, 7, 6, seed=1, layout=torch.channels_last)
    with Layouts() as seen:
        y = max_pool(x, *geometry)
        weight = torch.ones_like(y).requires_grad_()
        (g,) = torch.autograd.grad(y, x, weight, create_graph=True)
        torch.autograd.grad(g, weight, u)
    assert not seen.others
    assert not {"clone", "copy_", "zeros_like", "zeros", "fill_", "add"} & set(seen.calls)


def test_adjoint_where_layouts_mix() -> None:
    geometry = GEOMETRIES["3 at 2"]
    for one, other in itertools.product(LAYOUTS, LAYOUTS):
        x, u = randn(2, 4, 8, 8, layout=one), randn(2, 4, 8, 8, seed=1, layout=other)
        _, places = MaxPool.apply(x, *geometry)
        v = MaxPoolAdjoint.apply(u, x, places, *geometry)
        assert torch.equal(v, u.contiguous().flatten(2).gather(2, places.contiguous().flatten(2)).view(v.shape))
        assert v.is_contiguous(memory_format=one)
        expanded = MaxPoolAdjoint.apply(u[:, :, :1, :1].expand_as(u), x, places, *geometry)
        assert torch.equal(expanded, u[:, :, :1, :1].expand_as(v))


MODULES = [
    (nn.MaxPool2d(2), {}),
    (nn.MaxPool2d([3], 2, padding=(1, 0), ceil_mode=True), {}),
    (nn.MaxPool2d(2, dilation=2), {"dtype": torch.float32}),
    (nn.MaxPool2d((3, 2), (1, 2)), {"dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("module", "options"), MODULES)
@layouts
def test_twin_is_the_layer(module: nn.MaxPool2d, options: dict[str, Any], layout: Any) -> None:
    x = randn(2, 3, 9, 8, layout=layout, **options).requires_grad_()
    assert twins.twin_of(module) is twins.MaxPool2d
    y = twins.MaxPool2d.forward(module, x)  # type: ignore[arg-type]
    assert torch.equal(y, module(x))
    assert type(y.grad_fn).__name__ == "MaxPoolBackward"


def test_other_calls_run_the_ordinary_pass() -> None:
    x = randn(2, 3, 8, 8)
    y, indices = twins.MaxPool2d.forward(nn.MaxPool2d(2, return_indices=True), x)  # type: ignore[arg-type]
    assert indices.dtype == torch.int64
    assert y.shape == indices.shape
    pool: Any = nn.MaxPool2d(2)
    for given in (x[0], x.half(), x.to(torch.int32).clone()):
        assert torch.equal(twins.MaxPool2d.forward(pool, given), pool(given))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twins.MaxPool2d.forward(pool, x), pool(x))
    with pytest.raises(RuntimeError, match="pad"):
        twins.MaxPool2d.forward(nn.MaxPool2d(2, padding=2), x)  # type: ignore[arg-type]


# Triton


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small shapes have several, and what a kernel leaves out is NaN."""
    monkeypatch.setattr(max_pool_triton, "ELEMENTS", 512)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: _poison(empty(*args, **kwargs)))


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)


def in_the_plane(places: Tensor, geometry: tuple[Any, ...], width: int) -> Tensor:
    """What ATen gives, of places in windows."""
    (_, kw), (sh, sw), (ph, pw), *_ = geometry
    i, j = places.long() // kw, places.long() % kw
    rows, columns = torch.arange(places.shape[2]).to(i), torch.arange(places.shape[3]).to(i)
    return (rows[:, None] * sh - ph + i) * width + columns * sw - pw + j


def compare(x: Tensor, geometry: tuple[Any, ...]) -> None:
    """All three, to the last bit but for a sum's rounding."""
    y, places = max_pool_triton.forward(x, geometry)
    expected, indices = aten.max_pool2d_with_indices(x.cpu(), *geometry)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(in_the_plane(places, geometry, x.shape[3]).cpu(), indices)
    g, u = (randn(*t.shape, seed=i, layout=torch.channels_last).to(x) for i, t in enumerate((y, x)))
    g_x = max_pool_triton.backward(g, x, places, geometry)
    wanted = aten.max_pool2d_with_indices_backward(g.double().cpu(), x.double().cpu(), *geometry, indices)
    rounded = {torch.float64: 0.0, torch.float32: 1e-6, torch.bfloat16: 8e-3}[x.dtype]  # the interpreter cuts bfloat16
    torch.testing.assert_close(g_x.double().cpu(), wanted, rtol=rounded, atol=rounded * 1e-1)
    v = max_pool_triton.adjoint(u, places, geometry)
    assert torch.equal(v.cpu(), layer._gathered(u.cpu(), x.cpu(), indices))
    for t in (y, places, g_x, v):
        assert t.is_contiguous(memory_format=torch.channels_last)


@plain
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_triton(geometry: tuple[Any, ...], shape: tuple[int, ...], small_tiles: None) -> None:
    compare(randn(*shape, layout=torch.channels_last).to(DEVICE), geometry)


@plain
def test_triton_with_ties_nan_and_infinity(geometry: tuple[Any, ...], small_tiles: None) -> None:
    """Few values, so that most windows have ties; -inf alone in some; several NaNs in some."""
    values = torch.tensor([0.0, -0.0, 1.0, 2.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    for kinds in ((0, 1), (0, 2), (5,), (2, 5), (0, 2, 6), (4, 5, 6)):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(kinds), (2, 5, 7, 6), generator=generator)
        x = values[list(kinds)][drawn].contiguous(memory_format=torch.channels_last)
        compare(x.to(DEVICE), geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_in_lower_precision(dtype: torch.dtype) -> None:
    for name in ("2", "3 at 2", "uneven"):
        compare(randn(2, 24, 8, 8, layout=torch.channels_last, dtype=dtype).to(DEVICE), GEOMETRIES[name])


@plain
def test_what_autograd_makes_of_the_kernels(
    geometry: tuple[Any, ...], small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is on a GPU: places are uint8 from the forward pass on."""
    monkeypatch.setattr(layer, "fused", lambda x, geometry: True)
    x = randn(2, 5, 7, 6, layout=torch.channels_last).to(DEVICE).requires_grad_()
    assert MaxPool.apply(x, *geometry)[1].dtype == torch.uint8
    y = max_pool(x, *geometry)
    weight = randn(*y.shape, seed=1).to(DEVICE).requires_grad_()  # another layout
    (g,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (v,) = torch.autograd.grad(g.square().sum(), weight, create_graph=True)
    assert torch.equal(v, 2 * MaxPoolAdjoint.apply(g, x, MaxPool.apply(x, *geometry)[1], *geometry))
    (third,) = torch.autograd.grad(v.sum(), weight)
    ones = torch.ones_like(y)
    places = MaxPool.apply(x, *geometry)[1]
    pushed = MaxPoolBackward.apply(2 * ones, x, places, *geometry)
    assert torch.equal(third, MaxPoolAdjoint.apply(pushed, x, places, *geometry))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@plain
def test_on_a_gpu_triton_computes(geometry: tuple[Any, ...]) -> None:
    x = randn(4, 64, 32, 32, layout=torch.channels_last, dtype=torch.bfloat16).cuda()
    assert layer.fused(x, geometry)
    assert not layer.fused(x.contiguous(), geometry)
    compare(x, geometry)
    x.requires_grad_()
    with Layouts() as seen:
        y = max_pool(x, *geometry)
        weight = torch.ones_like(y).requires_grad_()
        (g,) = torch.autograd.grad(y, x, weight, create_graph=True)
        torch.autograd.grad(g, weight, torch.ones_like(x))
    assert not seen.others
    assert not {"max_pool2d_with_indices", "max_pool2d_with_indices_backward", "gather", "copy_"} & set(seen.calls)
