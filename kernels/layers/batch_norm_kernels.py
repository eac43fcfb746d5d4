"""The device code of `batch_norm_triton.py`.

Where ReLU let pass is computed from x, which is read anyway; with an addend it is read off y. Positions are the
N = B·H·W of a channel; x is [N, C] in memory where it is channels_last, [B, C, H·W] where not.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


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
def _cotangent(u, also, places, mask, ALSO: tl.constexpr, dtype: tl.constexpr):
    """The tile u, with ALSO plus that."""
    tile = _feature(u, places, mask, dtype)
    if ALSO:
        tile += _feature(also, places, mask, dtype)
    return tile


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
    EPS: tl.constexpr,
    ADDEND: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y = γ x̂ + β, with ADDEND plus that, with RELU what is positive of it, of a tile.

    EPS: None, or what σ² = variance + ε has; then the place of 1/σ holds the variance.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = c < C
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & ok[None, :]
    places = _offsets(n, c, C, HW, CHANNELS_LAST)
    if EPS is None:
        slope, constant = _line(mean, rstd, gamma, beta, c, ok, DTYPE)
    else:
        slope = _channels(gamma, c, ok, DTYPE) / tl.sqrt(_channels(rstd, c, ok, DTYPE) + EPS)
        constant = tl.fma(-_channels(mean, c, ok, DTYPE), slope, _channels(beta, c, ok, DTYPE))
    out = _normalised(_feature(x, places, mask, DTYPE), slope, constant)
    if ADDEND:
        out += _feature(addend, places, mask, DTYPE)
    if RELU:
        out = tl.where(out <= 0, 0.0, out)
    tl.store(y + places, out, mask=mask)


@triton.jit
def running_kernel(
    mean,
    rstd,
    running_mean,
    running_var,
    tracked,
    N,
    C,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The running statistics of a block of channels moved towards those of a batch, the variance unbiased."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < C
    inverse = tl.load(rstd + c, mask=ok, other=1.0).to(DTYPE)
    variance = (1.0 / (inverse * inverse) - EPS) * N / (N - 1)
    before, spread = _channels(running_mean, c, ok, DTYPE), _channels(running_var, c, ok, DTYPE)
    tl.store(running_mean + c, before + MOMENTUM * (_channels(mean, c, ok, DTYPE) - before), mask=ok)
    tl.store(running_var + c, spread + MOMENTUM * (variance - spread), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def sums_kernel(
    u,
    also,
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
    ALSO: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """partial[share] = (Σ u, Σ u x̂, and with PRIMAL Σ u g) over SHARE positions: [shares, 3, C].

    FIRST, for the gradient: u is its cotangent, of which ReLU let pass a part; else it let pass a part of g. With ALSO
    that is the other summand of u.
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
        u_tile, x_tile = _cotangent(u, also, places, mask, ALSO, DTYPE), _feature(x, places, mask, DTYPE)
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
    PLUS: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of each channel, [7, C]: v_g = k₀ x + k₁ u + k₂ and v_x = k₃ x + k₄ u + k₅ g + k₆; and v_γ [C].

    The formulas are those of `batch_norm.adjoint`. FIRST: k₀ to k₂ of g_x, which is v_g of u = g, u_γ = u_β = 0; and
    g_γ, g_β in the places of v_γ and v_β; with PLUS, u_γ is added to g_γ.
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
        tl.store(v_gamma + c, sum_ux + _channels(u_gamma, c, ok, DTYPE) if PLUS else sum_ux, mask=ok)
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
    also,
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
    ALSO: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """v_g, and with PRIMAL v_x, of a tile; ADDEND adds to v_g before ReLU's part of it is taken, ALSO to u.

    FIRST: v_g is g_x, to which ADDEND adds what else x is due; and with PRIMAL v_x is what ReLU let pass of u.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = c < C
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (n < N)[:, None] & ok[None, :]
    places = _offsets(n, c, C, HW, CHANNELS_LAST)
    x_tile, u_tile = _feature(x, places, mask, DTYPE), _cotangent(u, also, places, mask, ALSO, DTYPE)
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
