"""The device code of the matching operators: what is between the products, in one pass; `triton_launch.py` launches it.

Of a target layer with C channels and all its pairs, whose source channels stand side by side in K columns, a program
owns a tile [BP positions, BS columns of one pair]. It forms d = r T + bias − R(S) there and gives

    gradient   G = k a d, and its sums over the tile's positions (PRODUCTS); the terms of E, d²/HW (SUMS)
    adjoint    k a H and G beside each other, and the sums of k a H (PRODUCTS); the terms of v_a, k d H (SUMS)

with H = r u_T + u_r T + u_bias and k = 2/HW. The products with G and k a H are left to cuBLAS.

Features are rows of channels: position ij = y W + x of sample b is row b HW + ij. WHOLE tiles lie within one sample,
so that their terms are summed here; others are rows as they come, of layers so small that it does not matter.
Sums are kept in DTYPE (fp32, or float64 for float64) and nothing is added atomically: two runs give the same bits.
PRECISION of products in float32: "ieee", "tf32", or "rounded", which is tf32 of operands that are rounded here.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from l2t_fast.kernels.triton_functions import pick

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter's tl.dot knows no bf16


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """x as a factor of products.

    NVIDIA's tensor cores cut a float32 down to TF32, which errs four times as much as rounding it to the nearest.
    """
    if PRECISION == "rounded":
        if INTERPRETED:
            bits = x.to(tl.int32, bitcast=True)
            finite = (bits & 0x7F800000) != 0x7F800000
            x = tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
        else:
            x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr):
    """total + x y, both made by `_rounded`."""
    INPUT: tl.constexpr = "tf32" if PRECISION == "rounded" else PRECISION
    if INTERPRETED:
        x, y = x.to(total.dtype), y.to(total.dtype)
    return tl.dot(x, y, total, input_precision=INPUT, out_dtype=total.dtype)


@triton.jit
def _neighbours(i, n, N, dtype: tl.constexpr):
    """Bilinear resize of n to N (align_corners=False): the two source indices of i and the weight of the second.

    The source coordinate (i + 1/2) n/N − 1/2 = ((2i + 1) n − N) / 2N is split into integer and fraction exactly.
    """
    numerator = tl.maximum((2 * i + 1) * n - N, 0)
    low = numerator // (2 * N)
    return low, tl.minimum(low + 1, n - 1), (numerator - low * (2 * N)).to(dtype) / (2 * N)


@triton.jit
def _gathered(S, b, ij, C_s, h, w, H, W, s, mask, dtype: tl.constexpr):
    """R(S)[b, s, ij]: [BP, BS], gathered from the source's own resolution."""
    y0, y1, v = _neighbours(ij // W, h, H, dtype)
    x0, x1, u = _neighbours(ij % W, w, W, dtype)
    o_0, o_1 = b * (h * w) + y0 * w, b * (h * w) + y1 * w
    columns = s[None, :]
    top = tl.load(S + (((o_0 + x0) * C_s)[:, None] + columns), mask=mask, other=0.0).to(dtype) * (1 - u)[:, None]
    top += tl.load(S + (((o_0 + x1) * C_s)[:, None] + columns), mask=mask, other=0.0).to(dtype) * u[:, None]
    low = tl.load(S + (((o_1 + x0) * C_s)[:, None] + columns), mask=mask, other=0.0).to(dtype) * (1 - u)[:, None]
    low += tl.load(S + (((o_1 + x1) * C_s)[:, None] + columns), mask=mask, other=0.0).to(dtype) * u[:, None]
    return top * (1 - v)[:, None] + low * v[:, None]


@triton.jit(do_not_specialize=["batch"])  # a smaller last batch must not compile it anew
def difference_kernel(
    T, u_T, sources, r, u_r, bias, u_bias, a, G, position_sums, terms, blocks, batch, C, H, W, K, row_of_a,
    BP: tl.constexpr, BS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ADJOINT: tl.constexpr, PRODUCTS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """See above. r, u_r [K, C], bias, u_bias [K], a [batch, K] with rows `row_of_a` apart; G [batch HW, K or 2 K],
    position_sums [tiles, K], terms [tiles, K] or, of tiles that are not WHOLE, [batch HW, K]. A row of `blocks` for
    each program along the first axis of the grid, a tile for each along the second."""
    X: tl.constexpr = T.dtype.element_ty
    row = blocks + tl.program_id(0) * 8
    i, s0, first = tl.load(row), tl.multiple_of(tl.load(row + 1), BS), tl.multiple_of(tl.load(row + 2), ALIGN)
    C_s, h, w = tl.multiple_of(tl.load(row + 3), ALIGN), tl.load(row + 4), tl.load(row + 5)
    HW = H * W
    tile = tl.program_id(1)
    j = tl.arange(0, BP)
    if WHOLE:
        tiles = tl.cdiv(HW, BP)
        b0 = tile // tiles
        b = tl.zeros((BP,), tl.int32)
        ij = (tile % tiles) * BP + j
        ok = ij < HW
        rows = ij
    else:
        b0 = tile * BP // HW
        rows = tile * BP + j - b0 * HW  # of sample b0 and those after it
        b, ij = rows // HW, rows % HW
        ok = b0 + b < batch
    s = s0 + tl.arange(0, BS)
    s_ok = s < C_s
    mask = ok[:, None] & s_ok[None, :]
    start = b0.to(tl.int64) * HW  # row
    columns = first + s
    # What needs no product comes first, so that its loads are under way while the products wait for theirs.
    S = pick(sources, i, 0, len(sources)) + b0.to(tl.int64) * (h * w * C_s)
    if (h == H) & (w == W):
        S_tile = tl.load(S + ((rows * C_s)[:, None] + s[None, :]), mask=mask, other=0.0).to(DTYPE)
    else:
        S_tile = _gathered(S, b, ij, C_s, h, w, H, W, s, mask, DTYPE)
    d = tl.load(bias + columns, mask=s_ok, other=0.0).to(DTYPE)[None, :] - S_tile
    h_sum = tl.zeros((BP, BS), DTYPE)  # H of the formula
    if ADJOINT:
        h_sum += tl.load(u_bias + columns, mask=s_ok, other=0.0).to(DTYPE)[None, :]
    if PRODUCTS:
        a += b0.to(tl.int64) * row_of_a
        if WHOLE:
            ka = tl.load(a + columns, mask=s_ok, other=0.0).to(DTYPE)[None, :] * 2 / HW
        else:
            ka = tl.load(a + ((b * row_of_a)[:, None] + columns[None, :]), mask=mask, other=0.0).to(DTYPE) * 2 / HW
    T += start * C
    u_T += start * C
    for c0 in range(0, C, STEP):
        c = c0 + tl.arange(0, STEP)
        t_mask, r_mask = ok[:, None], s_ok[:, None]
        if not EVEN:
            t_mask, r_mask = t_mask & (c < C)[None, :], r_mask & (c < C)[None, :]
        o_t, o_r = (rows * C)[:, None] + c[None, :], (columns * C)[:, None] + c[None, :]
        t = _rounded(tl.load(T + o_t, mask=t_mask, other=0.0), PRECISION)  # [BP, STEP]
        r_tile = _rounded(tl.load(r + o_r, mask=r_mask, other=0.0), PRECISION)  # [BS, STEP]
        d = _dot(t, r_tile.T, d, PRECISION)
        if ADJOINT:
            u_t = _rounded(tl.load(u_T + o_t, mask=t_mask, other=0.0), PRECISION)
            u_r_tile = _rounded(tl.load(u_r + o_r, mask=r_mask, other=0.0), PRECISION)
            h_sum = _dot(u_t, r_tile.T, h_sum, PRECISION)
            h_sum = _dot(t, u_r_tile.T, h_sum, PRECISION)
    d = tl.where(mask, d, 0.0)
    h_sum = tl.where(mask, h_sum, 0.0)
    if SUMS:
        product = (d * h_sum * 2 if ADJOINT else d * d) / HW
        if WHOLE:
            tl.store(terms + (tile.to(tl.int64) * K + columns), tl.sum(product, 0), mask=s_ok)
        else:
            tl.store(terms + (start * K + ((rows * K)[:, None] + columns[None, :])), product, mask=mask)
    if PRODUCTS:
        width = 2 * K if ADJOINT else K
        G += start * width
        o_G = (rows * width)[:, None] + columns[None, :]
        g = d * ka
        total = g
        if ADJOINT:
            total = h_sum * ka
            tl.store(G + o_G, total.to(X), mask=mask)
            tl.store(G + (o_G + K), g.to(X), mask=mask)
        else:
            tl.store(G + o_G, g.to(X), mask=mask)
        tl.store(position_sums + (tile.to(tl.int64) * K + columns), tl.sum(total, 0), mask=s_ok)
