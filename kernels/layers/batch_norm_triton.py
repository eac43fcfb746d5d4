"""BatchNorm's second order (`batch_norm.adjoint`) in Triton: three launches, each feature read twice.

1. `sums_kernel`: a program owns a block of channels and a part of the positions, and leaves partial sums;
2. `coefficients_kernel`: adds them up in order (no atomics: the same bits again) and makes of them, channel by channel,
   what the combinations need;
3. `combine_kernel`: a program owns a block of channels and of positions, and writes v_g and v_x there.

Positions are the N = B·H·W of a channel; x is [N, C] in memory where it is channels_last, [B, C, H·W] where not.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

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
def sums_kernel(
    u,
    g,
    x,
    mean,
    rstd,
    partial,
    N,
    C,
    HW,
    SHARE,
    PRIMAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """partial[share] = (Σ u, Σ u x̂, and with PRIMAL Σ u g) over SHARE positions: [shares, 3, C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    mu, inverse = _channels(mean, c, ok, DTYPE)[None, :], _channels(rstd, c, ok, DTYPE)[None, :]
    sum_u = tl.zeros([BN, BC], DTYPE)
    sum_ux = tl.zeros([BN, BC], DTYPE)
    sum_ug = tl.zeros([BN, BC], DTYPE)
    first = tl.program_id(1) * SHARE
    for start in range(first, min(first + SHARE, N), BN):
        n = start + tl.arange(0, BN)
        mask = ((n < N) & (n < first + SHARE))[:, None] & ok[None, :]
        places = _offsets(n, c, C, HW, CHANNELS_LAST)
        u_tile = _feature(u, places, mask, DTYPE)
        sum_u += u_tile
        sum_ux += u_tile * (_feature(x, places, mask, DTYPE) - mu)
        if PRIMAL:
            sum_ug += u_tile * _feature(g, places, mask, DTYPE)
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
    N,
    C,
    SHARES,
    PRIMAL: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of each channel, [7, C]: v_g = k₀ x + k₁ u + k₂ and v_x = k₃ x + k₄ u + k₅ g + k₆; and v_γ [C].

    The formulas are those of `batch_norm.adjoint`.
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
    q = _channels(u_gamma, c, ok, DTYPE) - s * m_u
    slope = q * inverse
    out = coefficients + c
    tl.store(out, slope, mask=ok)
    tl.store(out + C, s, mask=ok)
    tl.store(out + 2 * C, _channels(u_beta, c, ok, DTYPE) - s * u_mean - slope * mu, mask=ok)
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
    coefficients,
    v_g,
    v_x,
    N,
    C,
    HW,
    PRIMAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """v_g, and with PRIMAL v_x, of a tile."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = c < C
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & ok[None, :]
    places = _offsets(n, c, C, HW, CHANNELS_LAST)
    x_tile, u_tile = _feature(x, places, mask, DTYPE), _feature(u, places, mask, DTYPE)
    k = coefficients
    out = _channels(k, c, ok, DTYPE)[None, :] * x_tile + _channels(k + C, c, ok, DTYPE)[None, :] * u_tile
    tl.store(v_g + places, out + _channels(k + 2 * C, c, ok, DTYPE)[None, :], mask=mask)
    if PRIMAL:
        out = _channels(k + 3 * C, c, ok, DTYPE)[None, :] * x_tile
        out += _channels(k + 4 * C, c, ok, DTYPE)[None, :] * u_tile
        out += _channels(k + 5 * C, c, ok, DTYPE)[None, :] * _feature(g, places, mask, DTYPE)
        tl.store(v_x + places, out + _channels(k + 6 * C, c, ok, DTYPE)[None, :], mask=mask)


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(v_g, v_x, v_γ), the last two only if `primal`; x dense, [B, C, H, W]."""
    channels_last = not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    u, g = u.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
    B, C, H, W = x.shape
    N, dtype = B * H * W, torch.float64 if x.dtype == torch.float64 else torch.float32
    BC = min(64 if channels_last else 4, triton.next_power_of_2(C))
    BN = ELEMENTS // BC
    blocks = triton.cdiv(C, BC)
    shares = max(1, min(triton.cdiv(N, BN), PROGRAMS * launch.device_properties(x.device)[1] // blocks))
    share = triton.cdiv(triton.cdiv(N, shares), BN) * BN
    shares = triton.cdiv(N, share)
    partial = torch.empty(shares, 3, C, dtype=dtype, device=x.device)
    coefficients = torch.empty(COEFFICIENTS, C, dtype=dtype, device=x.device)
    v_g = torch.empty_like(g)
    v_x, v_gamma = (torch.empty_like(x), torch.empty_like(gamma)) if primal else (None, None)
    shape = {"N": N, "C": C}
    options = {"PRIMAL": primal, "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32}
    tiled = {
        **shape,
        **options,
        "HW": H * W,
        "CHANNELS_LAST": channels_last,
        "BN": BN,
        "BC": BC,
        "u": u,
        "g": g,
        "x": x,
    }
    sums = {**tiled, "mean": mean, "rstd": rstd, "partial": partial, "SHARE": share}
    launch.launch(sums_kernel, (blocks, shares), sums, x, WARPS)
    vectors = {
        "u_gamma": u_gamma,
        "u_beta": u_beta,
        "gamma": gamma,
        "mean": mean,
        "rstd": rstd,
        "g_gamma": g_gamma,
        "g_beta": g_beta,
        "v_gamma": gamma if v_gamma is None else v_gamma,  # without PRIMAL not written
    }
    chosen = {"partial": partial, "coefficients": coefficients, "SHARES": shares, "BS": SUMMED[0], "BC": SUMMED[1]}
    grid = (triton.cdiv(C, SUMMED[1]),)
    launch.launch(coefficients_kernel, grid, {**shape, **options, **vectors, **chosen}, x, WARPS)
    outputs = {"coefficients": coefficients, "v_g": v_g, "v_x": v_g if v_x is None else v_x}
    launch.launch(combine_kernel, (triton.cdiv(N, BN), blocks), {**tiled, **outputs}, x, WARPS)
    return v_g, v_x, v_gamma
