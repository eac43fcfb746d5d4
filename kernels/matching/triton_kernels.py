"""The device code of the operators in Triton; `plan.py` says who owns what, `triton_launch.py` launches it.

d = r T + bias − R(S) is formed a tile [positions, C_s] at a time and never leaves the chip. Position programs sum over
channels and pairs, channel programs over positions and samples; both form d anew, because a [B, C_s, H·W] that reached
memory would cost more than the product.

Sums are kept in DTYPE (fp32, or float64 for float64) and in a fixed order: no atomics, so two runs give the same bits.

Names: T, u_T, S, r, u_r, bias, u_bias, a as in `ops.py`; BP positions and BS source channels a tile, s the source
channels [BS] and s_ok whether there are such; `at` = (b0, b, ij, ok), the first sample of a tile and of each of its
positions [BP] the sample − b0, the position ij = y W + x and whether there is one.
LAYER = (C, H, W, channels_last, CHUNK, BP, HP, FIRST, LAST), constants of a target layer with pairs FIRST..LAST − 1.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from l2t_fast.kernels.triton_functions import pick

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's tl.dot knows no bf16


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr):
    """total + x y."""
    if INTERPRETED:
        x, y = x.to(total.dtype), y.to(total.dtype)
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _positions(b0, ij0, b_end, LAYER: tl.constexpr):
    """`at` of a tile: BP / HP samples from b0 x HP positions from ij0."""
    HP: tl.constexpr = LAYER[6]
    j = tl.arange(0, LAYER[5])
    b, ij = j // HP, ij0 + j % HP
    return b0, b, ij, (ij < LAYER[1] * LAYER[2]) & (b0 + b < b_end)


@triton.jit
def _target_tile(T, at, c0, LAYER: tl.constexpr, CHANNELS: tl.constexpr):
    """(pointers, mask) of T[b0 + b, c0..c0 + CHANNELS, ij]: [BP, CHANNELS]."""
    C: tl.constexpr = LAYER[0]
    HW: tl.constexpr = LAYER[1] * LAYER[2]
    b0, b, ij, ok = at
    c = tl.arange(0, CHANNELS)
    if LAYER[3]:
        pointers = T + (b0.to(tl.int64) * (C * HW) + c0) + ((b * (C * HW) + ij * C)[:, None] + c[None, :])
    else:
        pointers = T + (b0.to(tl.int64) * (C * HW) + c0 * HW) + ((b * (C * HW) + ij)[:, None] + (c * HW)[None, :])
    mask = ok[:, None]
    if C % CHANNELS != 0:
        mask = mask & (c0 + c < C)[None, :]
    return pointers, mask


@triton.jit
def _load_target(T, at, c0, LAYER: tl.constexpr, CHANNELS: tl.constexpr):
    """T[b0 + b, c0..c0 + CHANNELS, ij]: [BP, CHANNELS], 0 where there is none."""
    pointers, mask = _target_tile(T, at, c0, LAYER, CHANNELS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _load_projection(r, s, s_ok, c0, C: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr):
    """r[s, c0..c0 + CHANNELS]: [BS, CHANNELS], 0 where there is none."""
    c = c0 + tl.arange(0, CHANNELS)
    mask = s_ok[:, None]
    if C % CHANNELS != 0:
        mask = mask & (c < C)[None, :]
    return tl.load(r + (s[:, None] * C + c[None, :]), mask=mask, other=0.0).to(dtype)


@triton.jit
def _project(T, r, total, at, s, s_ok, LAYER: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """total + r T: [BP, BS], STEP of the C channels of T at a time."""
    for c0 in range(0, LAYER[0], STEP):
        t = _load_target(T, at, c0, LAYER, STEP)  # [BP, STEP]
        total = _dot(t, _load_projection(r, s, s_ok, c0, LAYER[0], STEP, t.dtype).T, total, PRECISION)
    return total


@triton.jit
def _source(sources, pairs, i, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """(S, C_s, h, w, stride of a position, stride of a channel) of pair i."""
    row = pairs + i * 8
    S = pick(sources, tl.load(row), 0, len(sources))
    C_s, h, w = tl.multiple_of(tl.load(row + 1), ALIGN), tl.load(row + 2), tl.load(row + 3)
    if LAYOUT == 0:
        position, channel = 1, h * w
    elif LAYOUT == 1:
        position, channel = C_s, 1
    else:
        channels_last = tl.load(row + 4) != 0
        position, channel = tl.where(channels_last, C_s, 1), tl.where(channels_last, 1, h * w)
    return S, C_s, h, w, position, channel


@triton.jit
def _neighbours(i, n, N: tl.constexpr, dtype: tl.constexpr):
    """Bilinear resize of n to N (align_corners=False): the two source indices of i and the weight of the second.

    The source coordinate (i + 1/2) n/N − 1/2 = ((2i + 1) n − N) / 2N is split into integer and fraction exactly.
    """
    numerator = tl.maximum((2 * i + 1) * n - N, 0)
    low = numerator // (2 * N)
    return low, tl.minimum(low + 1, n - 1), (numerator - low * (2 * N)).to(dtype) / (2 * N)


@triton.jit
def _resized(source, at, s, s_ok, LAYER: tl.constexpr, dtype: tl.constexpr):
    """R(S)[b0 + b, s, ij]: [BP, BS], gathered from the source's own resolution."""
    H: tl.constexpr = LAYER[1]
    W: tl.constexpr = LAYER[2]
    S, C_s, h, w, position, channel = source
    b0, b, ij, ok = at
    S += b0.to(tl.int64) * (C_s * h * w)
    o_b, o_s = b * (C_s * h * w), (s * channel)[None, :]
    mask = ok[:, None] & s_ok[None, :]
    if (h == H) & (w == W):
        resized = tl.load(S + ((o_b + ij * position)[:, None] + o_s), mask=mask, other=0.0).to(dtype)
    else:
        y0, y1, v = _neighbours(ij // W, h, H, dtype)
        x0, x1, u = _neighbours(ij % W, w, W, dtype)
        o_0, o_1, x0, x1 = o_b + y0 * w * position, o_b + y1 * w * position, x0 * position, x1 * position
        top = tl.load(S + ((o_0 + x0)[:, None] + o_s), mask=mask, other=0.0).to(dtype) * (1 - u)[:, None]
        top += tl.load(S + ((o_0 + x1)[:, None] + o_s), mask=mask, other=0.0).to(dtype) * u[:, None]
        low = tl.load(S + ((o_1 + x0)[:, None] + o_s), mask=mask, other=0.0).to(dtype) * (1 - u)[:, None]
        low += tl.load(S + ((o_1 + x1)[:, None] + o_s), mask=mask, other=0.0).to(dtype) * u[:, None]
        resized = top * (1 - v)[:, None] + low * v[:, None]
    return resized


@triton.jit
def _load_channels(x, s, s_ok, dtype: tl.constexpr):
    """x[s]: [1, BS], for every position alike."""
    return tl.load(x + s, mask=s_ok, other=0.0).to(dtype)[None, :]


@triton.jit
def _scale(a, C_s, at, s, s_ok, LAYER: tl.constexpr, dtype: tl.constexpr):
    """k a[b0 + b, s], k = 2/HW: [BP, BS], or [1, BS] where the tile has one sample."""
    b0, b, ij, ok = at  # noqa: RUF059
    a += b0.to(tl.int64) * C_s
    if LAYER[5] == LAYER[6]:
        scale = _load_channels(a, s, s_ok, dtype)
    else:
        mask = ok[:, None] & s_ok[None, :]
        scale = tl.load(a + ((b * C_s)[:, None] + s[None, :]), mask=mask, other=0.0).to(dtype)
    return scale * (2 / (LAYER[1] * LAYER[2]))


@triton.jit
def _position_program(
    T, u_T, out, sources, projections, u_projections, biases, u_biases, coefficients, pairs, c_out, b0, ij0, batch,
    LAYER: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
    LAYOUT: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile and chunk of g_T = Σ_pairs rᵀ G or, adjoint, of v_T = Σ_pairs rᵀ (k a H) + u_rᵀ G."""
    C: tl.constexpr = LAYER[0]
    CHUNK: tl.constexpr = LAYER[4]
    RESIDENT: tl.constexpr = CHUNK >= C  # one tile serves all products
    BP: tl.constexpr = LAYER[5]
    FIRST: tl.constexpr = LAYER[7]
    LAST: tl.constexpr = LAYER[8]
    X: tl.constexpr = T.dtype.element_ty
    at = _positions(b0, ij0, batch, LAYER)
    total = tl.zeros((BP, CHUNK), DTYPE)
    if FIRST < LAST:
        if RESIDENT:
            t = _load_target(T, at, 0, LAYER, CHUNK)  # [BP, CHUNK]
            if ADJOINT:
                u_t = _load_target(u_T, at, 0, LAYER, CHUNK)  # [BP, CHUNK]
        for i in range(FIRST, LAST):
            source = _source(sources, pairs, i, LAYOUT, ALIGN)
            r, bias, a = (
                pick(projections, i, FIRST, LAST),
                pick(biases, i, FIRST, LAST),
                pick(coefficients, i, FIRST, LAST),
            )
            if ADJOINT:
                u_r, u_bias = pick(u_projections, i, FIRST, LAST), pick(u_biases, i, FIRST, LAST)
            for s0 in range(0, source[1], BS):
                s = s0 + tl.arange(0, BS)
                s_ok = s < source[1]
                d = tl.zeros((BP, BS), DTYPE)
                if RESIDENT:
                    r_tile = _load_projection(r, s, s_ok, 0, C, CHUNK, X)  # [BS, CHUNK]
                    d = _dot(t, r_tile.T, d, PRECISION)
                else:
                    d = _project(T, r, d, at, s, s_ok, LAYER, STEP, PRECISION)
                    r_tile = _load_projection(r, s, s_ok, c_out, C, CHUNK, X)
                d += _load_channels(bias, s, s_ok, DTYPE) - _resized(source, at, s, s_ok, LAYER, DTYPE)
                ka = _scale(a, source[1], at, s, s_ok, LAYER, DTYPE)
                G = d * ka  # [BP, BS]
                if ADJOINT:
                    h = tl.zeros((BP, BS), DTYPE)  # H of the formula
                    if RESIDENT:
                        u_r_tile = _load_projection(u_r, s, s_ok, 0, C, CHUNK, X)  # [BS, CHUNK]
                        h = _dot(u_t, r_tile.T, h, PRECISION)
                        h = _dot(t, u_r_tile.T, h, PRECISION)
                    else:
                        h = _project(u_T, r, h, at, s, s_ok, LAYER, STEP, PRECISION)
                        h = _project(T, u_r, h, at, s, s_ok, LAYER, STEP, PRECISION)
                        u_r_tile = _load_projection(u_r, s, s_ok, c_out, C, CHUNK, X)
                    h += _load_channels(u_bias, s, s_ok, DTYPE)
                    total = _dot((h * ka).to(X), r_tile, total, PRECISION)
                    total = _dot(G.to(X), u_r_tile, total, PRECISION)
                else:
                    total = _dot(G.to(X), r_tile, total, PRECISION)
    pointers, mask = _target_tile(out, at, c_out, LAYER, CHUNK)
    tl.store(pointers, total, mask=mask)


@triton.jit(do_not_specialize=["batch"])  # a smaller last batch must not compile it anew
def position_kernel(
    targets, u_targets, outputs, sources, projections, u_projections, biases, u_biases, coefficients,
    programs, pairs, batch,
    LAYERS: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr,
    LAYOUT: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """g_T or v_T of all layers: `position_launch`."""
    row = programs + tl.program_id(0) * 8
    layer, chunk, b0, tile = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    for n in tl.static_range(len(LAYERS)):
        if layer == n:
            _position_program(
                targets[n], u_targets[n], outputs[n], sources, projections, u_projections, biases, u_biases,
                coefficients, pairs, chunk * LAYERS[n][4], b0, tile * LAYERS[n][6], batch,
                tl.constexpr(LAYERS[n]), BS, STEP, ADJOINT, PRECISION, LAYOUT, ALIGN, DTYPE,
            )  # fmt: skip


@triton.jit
def _channel_program(
    T, u_T, sources, projections, u_projections, biases, u_biases, coefficients, sums, r_outputs, bias_outputs,
    workspace, pairs,
    i, s0, c_out, b_start, b_end, offset,
    LAYER: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums over all positions of the samples b_start..b_end − 1, for a block of source channels of pair i.

    Gradient: g_r = G Tᵀ, g_bias = Σ G (PRODUCTS); E = (1/HW) Σ_ij d² (SUMS).
    Adjoint: v_r = (k a H) Tᵀ + G u_Tᵀ, v_bias = Σ k a H (PRODUCTS); v_a = k Σ_ij d H (SUMS).
    """
    C: tl.constexpr = LAYER[0]
    HW: tl.constexpr = LAYER[1] * LAYER[2]
    CHUNK: tl.constexpr = LAYER[4]
    RESIDENT: tl.constexpr = CHUNK >= C  # one tile serves all products
    BP: tl.constexpr = LAYER[5]
    HP: tl.constexpr = LAYER[6]
    FIRST: tl.constexpr = LAYER[7]
    LAST: tl.constexpr = LAYER[8]
    NB: tl.constexpr = BP // HP
    TILES: tl.constexpr = (HW + HP - 1) // HP
    X: tl.constexpr = T.dtype.element_ty
    source = _source(sources, pairs, i, LAYOUT, ALIGN)
    C_s = source[1]
    r, a = pick(projections, i, FIRST, LAST), pick(coefficients, i, FIRST, LAST)
    s = s0 + tl.arange(0, BS)
    s_ok = s < C_s
    bias = _load_channels(pick(biases, i, FIRST, LAST), s, s_ok, DTYPE)
    r_product = tl.zeros((CHUNK, BS), DTYPE)
    bias_sum = tl.zeros((BS,), DTYPE)
    sample_sum = tl.zeros((NB, BS), DTYPE)
    if ADJOINT:
        u_r = pick(u_projections, i, FIRST, LAST)
        u_bias = _load_channels(pick(u_biases, i, FIRST, LAST), s, s_ok, DTYPE)
    if RESIDENT:
        r_tile = _load_projection(r, s, s_ok, 0, C, CHUNK, X)  # [BS, CHUNK]
        if ADJOINT:
            u_r_tile = _load_projection(u_r, s, s_ok, 0, C, CHUNK, X)  # [BS, CHUNK]
    for tile in range(tl.cdiv(b_end - b_start, NB) * TILES):
        b0 = b_start + (tile // TILES) * NB
        at = _positions(b0, (tile % TILES) * HP, b_end, LAYER)
        d = tl.zeros((BP, BS), DTYPE)
        if RESIDENT:
            t = _load_target(T, at, 0, LAYER, CHUNK)  # [BP, CHUNK]
            d = _dot(t, r_tile.T, d, PRECISION)
        else:
            d = _project(T, r, d, at, s, s_ok, LAYER, STEP, PRECISION)
            if PRODUCTS:
                t = _load_target(T, at, c_out, LAYER, CHUNK)
        d += bias - _resized(source, at, s, s_ok, LAYER, DTYPE)
        d = tl.where(at[3][:, None], d, 0.0)
        if ADJOINT:
            h = tl.zeros((BP, BS), DTYPE)  # H of the formula
            if RESIDENT:
                u_t = _load_target(u_T, at, 0, LAYER, CHUNK)  # [BP, CHUNK]
                h = _dot(u_t, r_tile.T, h, PRECISION)
                h = _dot(t, u_r_tile.T, h, PRECISION)
            else:
                h = _project(u_T, r, h, at, s, s_ok, LAYER, STEP, PRECISION)
                h = _project(T, u_r, h, at, s, s_ok, LAYER, STEP, PRECISION)
                if PRODUCTS:
                    u_t = _load_target(u_T, at, c_out, LAYER, CHUNK)
            h = tl.where(at[3][:, None], h + u_bias, 0.0)
        if SUMS:
            terms = d * h * (2 / HW) if ADJOINT else d * d / HW  # [BP, BS]
            sample_sum += tl.sum(tl.reshape(terms, (NB, HP, BS)), 1)
            done = tile % TILES == TILES - 1
            b = tl.arange(0, NB)
            b_done = b < tl.where(done, tl.where(c_out == 0, b_end - b0, 0), 0)
            pointers = pick(sums, i, FIRST, LAST) + b0.to(tl.int64) * C_s + b[:, None] * C_s + s[None, :]
            tl.store(pointers, sample_sum, mask=b_done[:, None] & s_ok[None, :])
            sample_sum = tl.where(done, 0.0, sample_sum)
        if PRODUCTS:
            ka = _scale(a, C_s, at, s, s_ok, LAYER, DTYPE)
            G = d * ka  # [BP, BS]
            if ADJOINT:
                kaH = h * ka  # [BP, BS]
                bias_sum += tl.sum(kaH, 0)
                r_product = _dot(t.T, kaH.to(X), r_product, PRECISION)
                r_product = _dot(u_t.T, G.to(X), r_product, PRECISION)
            else:
                bias_sum += tl.sum(G, 0)
                r_product = _dot(t.T, G.to(X), r_product, PRECISION)
    if PRODUCTS:
        c = c_out + tl.arange(0, CHUNK)
        o_r = s[None, :] * C + c[:, None]  # [CHUNK, BS]
        m_r = (c < C)[:, None] & s_ok[None, :]
        m_bias = s < tl.where(c_out == 0, C_s, 0)
        if offset < 0:
            tl.store(pick(r_outputs, i, FIRST, LAST) + o_r, r_product, mask=m_r)
            tl.store(pick(bias_outputs, i, FIRST, LAST) + s, bias_sum, mask=m_bias)
        else:
            tl.store(workspace + offset + o_r, r_product, mask=m_r)
            tl.store(workspace + offset + C_s * C + s, bias_sum, mask=m_bias)


@triton.jit
def channel_kernel(
    targets, u_targets, sources, projections, u_projections, biases, u_biases, coefficients, sums,
    r_outputs, bias_outputs, workspace, programs, pairs,
    LAYERS: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """g_r, g_bias and E, or v_r, v_bias and v_a, of all pairs: `channel_launch`."""
    row = programs + tl.program_id(0) * 8
    layer, i, block, chunk = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    b_start, b_end, offset = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    for n in tl.static_range(len(LAYERS)):
        if LAYERS[n][7] < LAYERS[n][8]:  # noqa: SIM102 (known at compile time, the other is not)
            if layer == n:
                _channel_program(
                    targets[n], u_targets[n], sources, projections, u_projections, biases, u_biases, coefficients, sums,
                    r_outputs, bias_outputs, workspace, pairs,
                    i, block * BS, chunk * LAYERS[n][4], b_start, b_end, offset,
                    tl.constexpr(LAYERS[n]), BS, STEP, ADJOINT, PRODUCTS, SUMS, PRECISION, LAYOUT, ALIGN, DTYPE,
                )  # fmt: skip


@triton.jit
def reduction_kernel(workspace, r_outputs, bias_outputs, programs, BLOCK: tl.constexpr):
    """g_r and g_bias of the pairs whose samples are split: the partial sums, added in order."""
    row = programs + tl.program_id(0) * 8
    i, start, n_r, size = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    offset, splits = tl.load(row + 4), tl.load(row + 5)
    o = start + tl.arange(0, BLOCK)
    total = tl.load(workspace + offset + o, mask=o < size, other=0.0)
    for split in range(1, splits):
        total += tl.load(workspace + offset + split * size + o, mask=o < size, other=0.0)
    tl.store(pick(r_outputs, i, 0, len(r_outputs)) + o, total, mask=o < n_r)
    tl.store(pick(bias_outputs, i, 0, len(bias_outputs)) + (o - n_r), total, mask=(o >= n_r) & (o < size))
