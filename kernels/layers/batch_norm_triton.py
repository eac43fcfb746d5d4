"""BatchNorm in Triton, with a ReLU and a sum before it if wanted: y = relu(γ x̂ + β + addend).

The gradient and its adjoint (`batch_norm.adjoint`) are three launches each, which read every feature twice:

1. `sums_kernel`: a program owns a block of channels and a part of the positions, and leaves partial sums;
2. `coefficients_kernel`: adds them up in order (no atomics: the same bits again), for what the combinations need;
3. `combine_kernel`: a program owns a block of channels and of positions, and writes the results there.

Where ReLU let pass is computed from x, which is read anyway; with an addend it is read off y. Positions are the
N = B·H·W of a channel; x is [N, C] in memory where it is channels_last, [B, C, H·W] where not.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch

ELEMENTS = 4096  # of a tile
WARPS = 8
PROGRAMS = 2  # of `sums_kernel` for each multiprocessor, at most
SUMMED = (256, 16)  # partial sums x channels that `coefficients_kernel` adds at a time
COEFFICIENTS = 7  # of each channel; see `coefficients_kernel`
Mask = tuple[Tensor, Tensor | None]  # see `batch_norm.Mask`


@triton.jit
def _offsets(n, c, C, HW, CHANNELS_LAST: tl.constexpr):
    """Places of the positions n [BN] of the channels c [BC]: [BN, BC]."""
    position = n * C if CHANNELS_LAST else (n // HW) * (C * HW) + n % HW
    channel = c if CHANNELS_LAST else c * HW
    return position[:, None] + channel[None, :]


@triton.jit
def _channels(x, c, ok, dtype: tl.constexpr):
    """x[c]: [BC], 0 where there is none."""
    return tl.load(x + c, mask=ok, other=0.0).to(dtype)


@triton.jit
def _feature(x, places, mask, dtype: tl.constexpr):
    return tl.load(x + places, mask=mask, other=0.0).to(dtype)


@triton.jit
def _line(mean, rstd, gamma, beta, c, ok, dtype: tl.constexpr):
    """(slope, constant) [BC] of γ x̂ + β as a function of x."""
    slope = _channels(gamma, c, ok, dtype) * _channels(rstd, c, ok, dtype)
    return slope, tl.fma(-_channels(mean, c, ok, dtype), slope, _channels(beta, c, ok, dtype))


@triton.jit
def _normalised(x, slope, constant):
    """γ x̂ + β of a tile: to the bit the same wherever it is computed."""
    return tl.fma(x, slope[None, :] + tl.zeros_like(x), constant[None, :] + tl.zeros_like(x))


@triton.jit
def _passed(g, x, y, places, mask, slope, constant, MASK: tl.constexpr, dtype: tl.constexpr):
    """The tile g where ReLU let pass, 0 elsewhere; MASK: 0 no ReLU, 1 by x, 2 by y. NaN passes."""
    if MASK == 1:
        g = tl.where(_normalised(x, slope, constant) <= 0, 0.0, g)
    if MASK == 2:
        g = tl.where(_feature(y, places, mask, dtype) <= 0, 0.0, g)
    return g


@triton.jit
def normalise_kernel(
    x,
    addend,
    y,
    gamma,
    beta,
    mean,
    rstd,
    N,
    C,
    HW,
    ADDEND: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y = γ x̂ + β, with ADDEND plus that, with RELU what is positive of it, of a tile."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = c < C
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & ok[None, :]
    places = _offsets(n, c, C, HW, CHANNELS_LAST)
    slope, constant = _line(mean, rstd, gamma, beta, c, ok, DTYPE)
    out = _normalised(_feature(x, places, mask, DTYPE), slope, constant)
    if ADDEND:
        out += _feature(addend, places, mask, DTYPE)
    if RELU:
        out = tl.where(out <= 0, 0.0, out)
    tl.store(y + places, out, mask=mask)


@triton.jit
def sums_kernel(
    u,
    g,
    x,
    y,
    gamma,
    beta,
    mean,
    rstd,
    partial,
    N,
    C,
    HW,
    SHARE,
    FIRST: tl.constexpr,
    PRIMAL: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """partial[share] = (Σ u, Σ u x̂, and with PRIMAL Σ u g) over SHARE positions: [shares, 3, C].

    FIRST, for the gradient: u is its cotangent, of which ReLU let pass a part; else it let pass a part of g.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    mu, inverse = _channels(mean, c, ok, DTYPE)[None, :], _channels(rstd, c, ok, DTYPE)[None, :]
    slope, constant = _line(mean, rstd, gamma, beta, c, ok, DTYPE)
    sum_u = tl.zeros([BN, BC], DTYPE)
    sum_ux = tl.zeros([BN, BC], DTYPE)
    sum_ug = tl.zeros([BN, BC], DTYPE)
    first = tl.program_id(1) * SHARE
    for start in range(first, min(first + SHARE, N), BN):
        n = start + tl.arange(0, BN)
        mask = ((n < N) & (n < first + SHARE))[:, None] & ok[None, :]
        places = _offsets(n, c, C, HW, CHANNELS_LAST)
        u_tile, x_tile = _feature(u, places, mask, DTYPE), _feature(x, places, mask, DTYPE)
        if FIRST:
            u_tile = _passed(u_tile, x_tile, y, places, mask, slope, constant, MASK, DTYPE)
        sum_u += u_tile
        sum_ux += u_tile * (x_tile - mu)
        if PRIMAL:
            g_tile = _feature(g, places, mask, DTYPE)
            sum_ug += u_tile * _passed(g_tile, x_tile, y, places, mask, slope, constant, MASK, DTYPE)
    row = partial + tl.program_id(1) * (3 * C) + c
    tl.store(row, tl.sum(sum_u, 0), mask=ok)
    tl.store(row + C, tl.sum(sum_ux * inverse, 0), mask=ok)
    if PRIMAL:
        tl.store(row + 2 * C, tl.sum(sum_ug, 0), mask=ok)


@triton.jit
def coefficients_kernel(
    partial,
    u_gamma,
    u_beta,
    gamma,
    mean,
    rstd,
    g_gamma,
    g_beta,
    coefficients,
    v_gamma,
    v_beta,
    N,
    C,
    SHARES,
    FIRST: tl.constexpr,
    PRIMAL: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of each channel, [7, C]: v_g = k₀ x + k₁ u + k₂ and v_x = k₃ x + k₄ u + k₅ g + k₆; and v_γ [C].

    The formulas are those of `batch_norm.adjoint`. FIRST: k₀ to k₂ of g_x, which is v_g of u = g, u_γ = u_β = 0; and
    g_γ, g_β in the places of v_γ and v_β.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    sum_u = tl.zeros([BC], DTYPE)
    sum_ux = tl.zeros([BC], DTYPE)
    sum_ug = tl.zeros([BC], DTYPE)
    for start in range(0, SHARES, BS):
        share = start + tl.arange(0, BS)
        mask = (share < SHARES)[:, None] & ok[None, :]
        places = share[:, None] * (3 * C) + c[None, :]  # [BS, BC]
        sum_u += tl.sum(_feature(partial, places, mask, DTYPE), 0)
        sum_ux += tl.sum(_feature(partial, places + C, mask, DTYPE), 0)
        if PRIMAL:
            sum_ug += tl.sum(_feature(partial, places + 2 * C, mask, DTYPE), 0)
    mu, inverse = _channels(mean, c, ok, DTYPE), _channels(rstd, c, ok, DTYPE)
    s = _channels(gamma, c, ok, DTYPE) * inverse
    m_u, u_mean = sum_ux / N, sum_u / N
    q = -s * m_u
    constant = -s * u_mean
    if FIRST:
        tl.store(v_gamma + c, sum_ux, mask=ok)
        tl.store(v_beta + c, sum_u, mask=ok)
    else:
        q += _channels(u_gamma, c, ok, DTYPE)
        constant += _channels(u_beta, c, ok, DTYPE)
    slope = q * inverse
    out = coefficients + c
    tl.store(out, slope, mask=ok)
    tl.store(out + C, s, mask=ok)
    tl.store(out + 2 * C, constant - slope * mu, mask=ok)
    if PRIMAL:
        m_g, g_mean = _channels(g_gamma, c, ok, DTYPE) / N, _channels(g_beta, c, ok, DTYPE) / N
        Q = sum_ug - sum_u * g_mean - sum_ux * m_g
        p = -s * m_g
        slope = -inverse * inverse * (p * m_u + q * m_g + s * Q / N)
        tl.store(out + 3 * C, slope, mask=ok)
        tl.store(out + 4 * C, p * inverse, mask=ok)
        tl.store(out + 5 * C, q * inverse, mask=ok)
        tl.store(out + 6 * C, -inverse * (p * u_mean + q * g_mean) - slope * mu, mask=ok)
        tl.store(v_gamma + c, inverse * Q, mask=ok)


@triton.jit
def combine_kernel(
    u,
    g,
    x,
    y,
    addend,
    gamma,
    beta,
    mean,
    rstd,
    coefficients,
    v_g,
    v_x,
    N,
    C,
    HW,
    FIRST: tl.constexpr,
    PRIMAL: tl.constexpr,
    ADDEND: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """v_g, and with PRIMAL v_x, of a tile; ADDEND adds to v_g before ReLU's part of it is taken.

    FIRST: v_g is g_x, to which ADDEND adds what else x is due; and with PRIMAL v_x is what ReLU let pass of u.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = c < C
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & ok[None, :]
    places = _offsets(n, c, C, HW, CHANNELS_LAST)
    x_tile, u_tile = _feature(x, places, mask, DTYPE), _feature(u, places, mask, DTYPE)
    slope, constant = _line(mean, rstd, gamma, beta, c, ok, DTYPE)
    if FIRST:
        u_tile = _passed(u_tile, x_tile, y, places, mask, slope, constant, MASK, DTYPE)
    k = coefficients
    out = _channels(k, c, ok, DTYPE)[None, :] * x_tile + _channels(k + C, c, ok, DTYPE)[None, :] * u_tile
    out += _channels(k + 2 * C, c, ok, DTYPE)[None, :]
    if ADDEND:
        out += _feature(addend, places, mask, DTYPE)
    if not FIRST:
        out = _passed(out, x_tile, y, places, mask, slope, constant, MASK, DTYPE)
    tl.store(v_g + places, out, mask=mask)
    if PRIMAL:
        if FIRST:
            out = u_tile
        else:
            g_tile = _feature(g, places, mask, DTYPE)
            g_tile = _passed(g_tile, x_tile, y, places, mask, slope, constant, MASK, DTYPE)
            out = _channels(k + 3 * C, c, ok, DTYPE)[None, :] * x_tile
            out += _channels(k + 4 * C, c, ok, DTYPE)[None, :] * u_tile
            out += _channels(k + 5 * C, c, ok, DTYPE)[None, :] * g_tile
            out += _channels(k + 6 * C, c, ok, DTYPE)[None, :]
        tl.store(v_x + places, out, mask=mask)


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, addend: Tensor | None, relu: bool
) -> Tensor:
    """y [B, C, H, W], of x, which is dense."""
    tiled, grid, _ = _tiles(x)
    y = torch.empty_like(x)
    tensors = {"x": x, "y": y, "gamma": gamma, "beta": beta, "mean": mean, "rstd": rstd}
    tensors["addend"] = x if addend is None else _laid_out(addend, x)
    launch.launch(normalise_kernel, grid, {**tiled, **tensors, "ADDEND": addend is not None, "RELU": relu}, x, WARPS)
    return y


def gradient(
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Mask | None = None,
    plus: Tensor | None = None,
    passed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(g_x, to which `plus` is added, g_γ, g_β, and if `passed` what ReLU let pass of g) of the cotangent g of y."""
    g_x, g_gamma, g_beta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
    g_passed = torch.empty_like(x) if passed else None
    results = {"v_g": g_x, "v_x": g_passed, "v_gamma": g_gamma, "v_beta": g_beta}
    of_x = {"gamma": gamma, "mean": mean, "rstd": rstd}
    _three_launches(x, {"u": g, "addend": plus}, of_x, results, mask, first=True)
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(v_g, v_x, v_γ), the last two only if `primal`; x dense, [B, C, H, W]; u_passed: as u, of what was passed."""
    v_g = torch.empty_like(x)
    v_x, v_gamma = (torch.empty_like(x), torch.empty_like(gamma)) if primal else (None, None)
    results = {"v_g": v_g, "v_x": v_x, "v_gamma": v_gamma, "v_beta": None}
    vectors = {"gamma": gamma, "mean": mean, "rstd": rstd, "g_gamma": g_gamma, "g_beta": g_beta}
    vectors |= {"u_gamma": u_gamma, "u_beta": u_beta}
    _three_launches(x, {"u": u, "g": g, "addend": u_passed}, vectors, results, mask, first=False)
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

    sums = {**tiled, **options, **of_line, **inputs, "partial": partial, "SHARE": share, "PRIMAL": primal and not first}
    del sums["addend"]
    launch.launch(sums_kernel, (grid[1], shares), sums, x, WARPS)
    chosen: dict[str, Any] = {"partial": partial, "coefficients": coefficients, "SHARES": shares, "N": N, "C": C}
    chosen |= {"BS": SUMMED[0], "BC": SUMMED[1], "DTYPE": tiled["DTYPE"], "FIRST": first, "PRIMAL": sums["PRIMAL"]}
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
    tiled["DTYPE"] = tl.float64 if x.dtype == torch.float64 else tl.float32
    return tiled, (triton.cdiv(N, BN), blocks), shares


def _laid_out(t: Tensor, x: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
