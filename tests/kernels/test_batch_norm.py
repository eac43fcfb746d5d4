"""BatchNorm's second order in Triton (in the interpreter, or on a GPU) against its formulas in ATen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from l2t_fast.kernels.layers import batch_norm, batch_norm_triton

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 4, 5), (3, 70, 3, 3), (5, 64, 1, 1), (2, 1, 9, 7), (4, 5, 8, 8)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMES = ("v_g", "v_x", "v_gamma")


def problem(shape: tuple[int, ...], dtype: torch.dtype, layout: Any, wide: torch.dtype) -> list[Tensor]:
    """u, u_γ, u_β, g, x, γ, μ, 1/σ, g_γ, g_β: features of `dtype`, statistics and parameters of `wide`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    features = [randn(*shape).to(DEVICE, dtype).contiguous(memory_format=layout) for _ in range(3)]
    u, g, x = features[0], features[1], 2 * features[2] + 1
    vectors = [randn(channels).to(DEVICE, wide) for _ in range(3)]
    mean = x.to(wide).mean((0, 2, 3))
    rstd = (x.to(wide).var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
    normal = (x.to(wide) - mean[:, None, None]) * rstd[:, None, None]
    sums = [(g.to(wide) * normal).sum((0, 2, 3)), g.to(wide).sum((0, 2, 3))]
    return [u, vectors[0], vectors[1], g, x, vectors[2], mean, rstd, *sums]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small shapes have several of each kind."""
    monkeypatch.setattr(batch_norm_triton, "ELEMENTS", 64)
    monkeypatch.setattr(batch_norm_triton, "PROGRAMS", 8)
    monkeypatch.setattr(batch_norm_triton, "SUMMED", (4, 16))


def poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan)


@pytest.mark.parametrize("primal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(shape: tuple[int, ...], layout: Any, primal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(shape, torch.float64, layout, torch.float64)
    expected = batch_norm.adjoint(*arguments, (True, primal, primal))
    like, empty = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(like(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    actual = batch_norm_triton.adjoint(*arguments, primal)
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
            assert ours.stride() == (arguments[4] if name != "v_gamma" else arguments[5]).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_of_another_layout(layout: Any) -> None:
    arguments = problem((4, 5, 8, 8), torch.float64, layout, torch.float64)
    expected = batch_norm_triton.adjoint(*arguments, True)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    arguments[0], arguments[3] = (arguments[i].contiguous(memory_format=other) for i in (0, 3))
    for ours, theirs in zip(batch_norm_triton.adjoint(*arguments, True), expected, strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("features", "factor"), [(torch.float32, 1.5), (torch.bfloat16, 2.0)])
def test_lower_precision(features: torch.dtype, factor: float) -> None:
    """No worse than ATen in the same precision; the interpreter's bfloat16 cuts where hardware rounds."""
    arguments = problem((8, 16, 16, 16), features, torch.channels_last, torch.float32)
    exact = batch_norm.adjoint(*(t.double() for t in arguments), (True, True, True))
    aten = batch_norm.adjoint(*arguments, (True, True, True))
    ours = batch_norm_triton.adjoint(*arguments, True)
    for name, one, other, wanted in zip(NAMES, ours, aten, exact, strict=True):
        assert one is not None
        assert one.dtype == (torch.float32 if name == "v_gamma" else features)
        error, theirs = ((t.double() - wanted).norm() / wanted.norm() for t in (one, other))
        assert error <= factor * theirs + 1e-7, name


def test_the_same_bits_again() -> None:
    arguments = problem((4, 70, 8, 8), torch.float32, torch.channels_last, torch.float32)
    first, second = (batch_norm_triton.adjoint(*arguments, True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))  # type: ignore[arg-type]
