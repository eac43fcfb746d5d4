"""BatchNorm in Triton, with a ReLU and a sum before it if wanted: y = relu(γ x̂ + β + addend).

The gradient and its adjoint (`batch_norm.adjoint`) are three launches each, which read every feature twice
(`batch_norm_kernels.py`):

1. `sums_kernel`: a program owns a block of channels and a part of the positions, and leaves partial sums;
2. `coefficients_kernel`: adds them up in order (no atomics: the same bits again), for what the combinations need;
3. `combine_kernel`: a program owns a block of channels and of positions, and writes the results there.
"""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.layers.batch_norm_kernels import (
    coefficients_kernel,
    combine_kernel,
    normalise_kernel,
    running_kernel,
    sums_kernel,
)

ELEMENTS = 4096  # of a tile
WARPS = 8
PROGRAMS = 2  # of `sums_kernel` for each multiprocessor, at most
SUMMED = (256, 16)  # partial sums x channels that `coefficients_kernel` adds at a time
CHANNELS = 1024  # that a program of `running_kernel` owns
COEFFICIENTS = 7  # of each channel; see `coefficients_kernel`
Mask = tuple[Tensor, Tensor | None]  # see `batch_norm.Mask`


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    addend: Tensor | None,
    relu: bool,
    eps: float | None = None,
) -> Tensor:
    """y [B, C, H, W], of x, which is dense. With `eps`, `rstd` is a variance."""
    tiled, grid, _ = _tiles(x)
    y = torch.empty_like(x)
    tensors = {"x": x, "y": y, "gamma": gamma, "beta": beta, "mean": mean, "rstd": rstd}
    tensors["addend"] = x if addend is None else _laid_out(addend, x)
    flags = {"ADDEND": addend is not None, "RELU": relu, "EPS": eps}
    launch.launch(normalise_kernel, grid, {**tiled, **tensors, **flags}, x, WARPS)
    return y


def track(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor,
    momentum: float,
) -> None:
    """Moves the running statistics towards those of x, in place, and counts it."""
    C = x.shape[1]
    tensors = {"mean": mean, "rstd": rstd, "running_mean": running_mean, "running_var": running_var, "tracked": tracked}
    of_x = {"N": x.numel() // C, "C": C, "EPS": eps, "MOMENTUM": momentum, "BC": CHANNELS, "DTYPE": _dtype(x)}
    launch.launch(running_kernel, (triton.cdiv(C, CHANNELS),), {**tensors, **of_x}, x, WARPS)


def gradient(
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Mask | None = None,
    plus: Tensor | None = None,
    passed: bool = False,
    plus_gamma: Tensor | None = None,
    also: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(g_x, g_γ, g_β, and if `passed` what ReLU let pass of g) of the cotangent g of y, or g + `also`.

    plus, plus_gamma: are added to g_x and g_γ.
    """
    g_x, g_gamma, g_beta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
    g_passed = torch.empty_like(x) if passed else None
    results = {"v_g": g_x, "v_x": g_passed, "v_gamma": g_gamma, "v_beta": g_beta}
    of_x = {"gamma": gamma, "mean": mean, "rstd": rstd}
    of_x |= {} if plus_gamma is None else {"u_gamma": plus_gamma}
    _three_launches(x, {"u": g, "addend": plus, "also": also}, of_x, results, mask, first=True)
    return g_x, g_gamma, g_beta, g_passed


def adjoint(
    u: Tensor,
    u_gamma: Tensor,
    u_beta: Tensor,
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    g_gamma: Tensor,
    g_beta: Tensor,
    primal: bool,
    mask: Mask | None = None,
    u_passed: Tensor | None = None,
    also: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(v_g, v_x, v_γ) in the direction u, or u + `also`; the last two only if `primal`; x dense, [B, C, H, W].

    u_passed: as u, of what was passed.
    """
    v_g = torch.empty_like(x)
    v_x, v_gamma = (torch.empty_like(x), torch.empty_like(gamma)) if primal else (None, None)
    results = {"v_g": v_g, "v_x": v_x, "v_gamma": v_gamma, "v_beta": None}
    vectors = {"gamma": gamma, "mean": mean, "rstd": rstd, "g_gamma": g_gamma, "g_beta": g_beta}
    vectors |= {"u_gamma": u_gamma, "u_beta": u_beta}
    _three_launches(x, {"u": u, "g": g, "addend": u_passed, "also": also}, vectors, results, mask, first=False)
    return v_g, v_x, v_gamma


def _three_launches(
    x: Tensor,
    features: dict[str, Tensor | None],
    vectors: dict[str, Tensor],
    results: dict[str, Tensor | None],
    mask: Mask | None,
    first: bool,
) -> None:
    """Fills the results; what a kernel does not read or write is some tensor of the same dtype."""
    tiled, grid, shares = _tiles(x)
    N, C, primal = tiled["N"], tiled["C"], results["v_x"] is not None
    share = triton.cdiv(triton.cdiv(N, shares), tiled["BN"]) * tiled["BN"]
    shares = triton.cdiv(N, share)
    y = None if mask is None else mask[1]
    given = {"x": x, "g": None, "y": y, **features}.items()
    plus_gamma = "u_gamma" in vectors
    inputs = {name: x if t is None else _laid_out(t, x) for name, t in given}
    gamma = vectors["gamma"]
    vectors = {**dict.fromkeys(("beta", "u_gamma", "u_beta", "g_gamma", "g_beta"), gamma), **vectors}
    if mask is not None:
        vectors["beta"] = mask[0]
    of_line = {name: vectors[name] for name in ("gamma", "beta", "mean", "rstd")}
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(shares, 3, C, dtype=dtype, device=x.device)
    coefficients = torch.empty(COEFFICIENTS, C, dtype=dtype, device=x.device)
    options = {"FIRST": first, "MASK": 0 if mask is None else 1 if y is None else 2}
    options["ALSO"] = features["also"] is not None

    sums = {**tiled, **options, **of_line, **inputs, "partial": partial, "SHARE": share, "PRIMAL": primal and not first}
    del sums["addend"]
    launch.launch(sums_kernel, (grid[1], shares), sums, x, WARPS)
    chosen: dict[str, Any] = {"partial": partial, "coefficients": coefficients, "SHARES": shares, "N": N, "C": C}
    chosen |= {"BS": SUMMED[0], "BC": SUMMED[1], "DTYPE": tiled["DTYPE"], "FIRST": first, "PRIMAL": sums["PRIMAL"]}
    chosen["PLUS"] = first and plus_gamma
    chosen |= {name: gamma if results[name] is None else results[name] for name in ("v_gamma", "v_beta")}
    chosen |= {name: t for name, t in vectors.items() if name != "beta"}
    launch.launch(coefficients_kernel, (triton.cdiv(C, SUMMED[1]),), chosen, x, WARPS)
    outputs = {"coefficients": coefficients, "v_g": results["v_g"], "v_x": results["v_x"] if primal else results["v_g"]}
    combined = {**tiled, **options, **of_line, **inputs, **outputs}
    combined |= {"PRIMAL": primal, "ADDEND": features.get("addend") is not None}
    launch.launch(combine_kernel, grid, combined, x, WARPS)


def _tiles(x: Tensor) -> tuple[dict[str, Any], tuple[int, int], int]:
    """(arguments of all kernels that own tiles, their grid over positions and channels, shares of `sums_kernel`)."""
    channels_last, (B, C, H, W) = not x.is_contiguous(), x.shape
    N = B * H * W
    BC = min(64 if channels_last else 4, triton.next_power_of_2(C))
    BN = ELEMENTS // BC
    blocks = triton.cdiv(C, BC)
    shares = max(1, min(triton.cdiv(N, BN), PROGRAMS * launch.device_properties(x.device)[1] // blocks))
    tiled = {"N": N, "C": C, "HW": H * W, "CHANNELS_LAST": channels_last, "BN": BN, "BC": BC}
    tiled["DTYPE"] = _dtype(x)
    return tiled, (triton.cdiv(N, BN), blocks), shares


def _dtype(x: Tensor) -> tl.dtype:
    """That a kernel computes in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _laid_out(t: Tensor, x: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
