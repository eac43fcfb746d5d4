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


def with_relu(shape: tuple[int, ...], dtype: torch.dtype, layout: Any, summand: bool) -> dict[str, Any]:
    """A problem, with β, an addend, what is added to g_x, the cotangent of what ReLU passed, and y."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, u_gamma, u_beta, g, x, gamma, mean, rstd, *_ = problem(shape, dtype, layout, wide)
    addend, plus, u_passed = (t.roll(1, 0) for t in (u, g, x))
    beta = u_beta.roll(1)
    y = (x.to(wide) - mean[:, None, None]) * (gamma * rstd)[:, None, None] + beta[:, None, None]
    y = (y + addend.to(wide) if summand else y).relu().to(dtype).contiguous(memory_format=layout)
    mask = (beta, y if summand else None)
    return {
        **{"u": u, "u_gamma": u_gamma, "u_beta": u_beta, "g": g, "x": x, "gamma": gamma, "beta": beta, "mean": mean},
        **{"rstd": rstd, "addend": addend if summand else None, "plus": plus, "mask": mask, "y": y},
        "u_passed": u_passed if summand else None,
    }


def all_orders(p: dict[str, Any], triton: bool) -> list[Tensor]:
    """y; g_x, g_γ, g_β, what was passed; v_g, v_x, v_γ."""
    x, gamma, mean, rstd, summand = p["x"], p["gamma"], p["mean"], p["rstd"], p["addend"] is not None
    if triton:
        y = batch_norm_triton.forward(x, gamma, p["beta"], mean, rstd, p["addend"], True)
        first = batch_norm_triton.gradient(p["g"], x, gamma, mean, rstd, p["mask"], p["plus"], passed=summand)
        us = p["u"], p["u_gamma"], p["u_beta"]
        second = batch_norm_triton.adjoint(
            *us, p["g"], x, gamma, mean, rstd, *first[1:3], True, p["mask"], p["u_passed"]
        )
        return [t for t in (y, *first, *second) if t is not None]
    aten = torch.ops.aten
    passed = aten.threshold_backward(p["g"], p["y"], 0)
    g_x, g_gamma, g_beta = batch_norm._normalize_backward(passed, x, gamma, mean, rstd, [True] * 3)
    arguments = (p["u"], p["u_gamma"], p["u_beta"], passed, x, gamma, mean, rstd, g_gamma, g_beta)
    v_g, v_x, v_gamma = batch_norm.adjoint(*arguments, (True, True, True))
    v_g = aten.threshold_backward(v_g + p["u_passed"] if summand else v_g, p["y"], 0)
    return [p["y"], g_x + p["plus"], g_gamma, g_beta, *([passed] if summand else []), v_g, v_x, v_gamma]


@pytest.mark.parametrize("summand", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_with_relu(shape: tuple[int, ...], layout: Any, summand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of the three orders against ATen's formulas, with a sum in front of ReLU and without."""
    p = with_relu(shape, torch.float64, layout, summand)
    expected = all_orders(p, triton=False)
    like, empty = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(like(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    for ours, theirs in zip(all_orders(p, triton=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        assert ours.dim() < 4 or ours.stride() == p["x"].stride()


@pytest.mark.parametrize("summand", [True, False])
@pytest.mark.parametrize(("features", "factor"), [(torch.float32, 1.5), (torch.bfloat16, 2.5)])
def test_with_relu_in_lower_precision(features: torch.dtype, factor: float, summand: bool) -> None:
    """No worse than ATen in that precision, but for the interpreter: its bfloat16 cuts where hardware rounds."""
    p = with_relu((4, 16, 4, 4), features, torch.channels_last, summand)
    exact = {name: t.double() if isinstance(t, Tensor) else t for name, t in p.items()}
    ours, aten, wanted = all_orders(p, True), all_orders(p, False), all_orders(exact, False)
    y, rounded = ours.pop(0), aten.pop(0)
    torch.testing.assert_close(y, rounded, rtol=2 * torch.finfo(features).eps, atol=1e-6)
    for one, other, all_of_it in zip(ours, aten, wanted[1:], strict=True):
        error, theirs = ((t.double() - all_of_it).norm() / all_of_it.norm() for t in (one, other))
        assert error <= factor * theirs + 1e-6


@pytest.mark.parametrize("summand", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_summands(layout: Any, summand: bool) -> None:
    """Of cotangents, read where their sum is due, and of the gradient of γ."""
    p = with_relu(SHAPES[1], torch.float64, layout, summand)
    of_x = (p["x"], p["gamma"], p["mean"], p["rstd"])
    also, plus_gamma = p["u"].roll(2, 1), p["u_gamma"].roll(2)
    wanted = list(batch_norm_triton.gradient(p["g"] + also, *of_x, p["mask"], p["plus"], summand))
    wanted[1] = wanted[1] + plus_gamma
    found = batch_norm_triton.gradient(p["g"], *of_x, p["mask"], p["plus"], summand, plus_gamma, also)
    rest = (p["u_gamma"], p["u_beta"], p["g"], *of_x, *wanted[1:3], True, p["mask"], p["u_passed"])
    wanted += batch_norm_triton.adjoint(p["u"] + also, *rest)
    for ours, theirs in zip((*found, *batch_norm_triton.adjoint(p["u"], *rest, also)), wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_nan_passes() -> None:
    """As in PyTorch's ReLU, forward and backward: a training that diverges is to be seen."""
    p = with_relu((2, 3, 4, 5), torch.float64, torch.contiguous_format, summand=False)
    p["x"][0, 1, 2, 3] = torch.nan
    y = batch_norm_triton.forward(p["x"], p["gamma"], p["beta"], p["mean"], p["rstd"], None, True)
    assert y[0, 1, 2, 3].isnan()
    assert y.isnan().sum() == 1
    *_, passed = batch_norm_triton.gradient(p["g"], p["x"], p["gamma"], p["mean"], p["rstd"], p["mask"], None, True)
    assert passed is not None
    assert passed[0, 1, 2, 3] == p["g"][0, 1, 2, 3]
