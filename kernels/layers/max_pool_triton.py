"""Max-pooling in Triton, of channels_last images: forward, backward and its adjoint, a launch each.

A tile is a block of positions and of channels, contiguous in memory. The place of a maximum in its window takes a byte.
The backward goes through the windows that each position lies in, so that it writes everything once, without a fill and
without atomics; where windows do not overlap that is one.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch

ELEMENTS = 1024  # of a tile
THREADS = 128  # so that each loads 16 bytes of bfloat16


@triton.jit
def _tile(C, BN: tl.constexpr, BC: tl.constexpr):
    """Positions [BN] and channels [BC] of a program, and whether these are any."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return tl.program_id(0) * BN + tl.arange(0, BN), c, c < C


@triton.jit
def max_pool_forward_kernel(
    x,
    y,
    places,
    N,
    C,
    H,
    W,
    h,
    w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The first maximum of each window, row by row, and its place; of NaNs, which win, the last: as PyTorch has it."""
    n, c, ok = _tile(C, BN, BC)
    top, left = (n // w) % h * SH - PH, n % w * SW - PW
    image = n // (h * w) * H
    best = tl.full([BN, BC], float("-inf"), DTYPE)
    # Where nothing is greater than -inf: the first place inside the image.
    place = tl.zeros([BN, BC], tl.int32) + (tl.maximum(-top, 0) * KW + tl.maximum(-left, 0))[:, None]
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            row, column = top + i, left + j
            inside = (n < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            mask = inside[:, None] & ok[None, :]
            at = ((image + row) * W + column) * C
            value = tl.load(x + at[:, None] + c[None, :], mask=mask, other=float("-inf")).to(DTYPE)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            place = tl.where(better, i * KW + j, place)
    mask = (n < N)[:, None] & ok[None, :]
    to = (n * C)[:, None] + c[None, :]
    tl.store(y + to, best, mask=mask)
    tl.store(places + to, place.to(tl.uint8), mask=mask)


@triton.jit
def max_pool_backward_kernel(
    g,
    places,
    g_x,
    N,
    C,
    H,
    W,
    h,
    w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """g_x: of each position the sum of g over the windows that have their maximum there."""
    n, c, ok = _tile(C, BN, BC)
    row, column = (n // W) % H + PH, n % W + PW
    image = n // (H * W) * h
    total = tl.zeros([BN, BC], DTYPE)
    ABOVE: tl.constexpr = (KH - 1) // SH
    BEFORE: tl.constexpr = (KW - 1) // SW
    for s in tl.static_range(ABOVE + 1):
        for t in tl.static_range(BEFORE + 1):
            up, across = row // SH - (ABOVE - s), column // SW - (BEFORE - t)  # of the window
            i, j = row - up * SH, column - across * SW  # in it
            inside = (n < N) & (up >= 0) & (up < h) & (across >= 0) & (across < w) & (i < KH) & (j < KW)
            mask = inside[:, None] & ok[None, :]
            at = (((image + up) * w + across) * C)[:, None] + c[None, :]
            place = tl.load(places + at, mask=mask, other=255).to(tl.int32)
            value = tl.load(g + at, mask=mask, other=0.0).to(DTYPE)
            total += tl.where(place == (i * KW + j)[:, None], value, 0.0)
    tl.store(g_x + (n * C)[:, None] + c[None, :], total, mask=(n < N)[:, None] & ok[None, :])


@triton.jit
def max_pool_adjoint_kernel(
    u,
    places,
    v,
    N,
    C,
    H,
    W,
    h,
    w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """v: u where the window has its maximum. All of the window is read, 16 bytes at a time, and one value chosen."""
    n, c, ok = _tile(C, BN, BC)
    top, left = (n // w) % h * SH - PH, n % w * SW - PW
    image = n // (h * w) * H
    mask = (n < N)[:, None] & ok[None, :]
    to = (n * C)[:, None] + c[None, :]
    place = tl.load(places + to, mask=mask, other=255).to(tl.int32)
    chosen = tl.zeros([BN, BC], DTYPE)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            row, column = top + i, left + j
            inside = (n < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            at = ((image + row) * W + column) * C
            value = tl.load(u + at[:, None] + c[None, :], mask=inside[:, None] & ok[None, :], other=0.0).to(DTYPE)
            chosen = tl.where(place == i * KW + j, value, chosen)
    tl.store(v + to, chosen, mask=mask)


def forward(x: Tensor, geometry: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(y, places) [B, C, h, w] of x [B, C, H, W], all channels_last."""
    kernel, stride, padding, _, ceil = geometry
    sizes = [_windows(*axis, ceil) for axis in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    y, places = (_empty(x, (*x.shape[:2], *sizes), dtype) for dtype in (x.dtype, torch.uint8))
    _launch(max_pool_forward_kernel, {"x": x, "y": y, "places": places}, y, x, y, geometry)
    return y, places


def backward(g: Tensor, x: Tensor, places: Tensor, geometry: Sequence[Any]) -> Tensor:
    """g_x [B, C, H, W] of g [B, C, h, w]; of x only the shape matters."""
    g_x = _empty(g, x.shape, g.dtype)
    arguments = {"g": g.contiguous(memory_format=torch.channels_last), "places": places, "g_x": g_x}
    _launch(max_pool_backward_kernel, arguments, g_x, g_x, places, geometry)
    return g_x


def adjoint(u: Tensor, places: Tensor, geometry: Sequence[Any]) -> Tensor:
    """u [B, C, H, W] at the maxima: [B, C, h, w]."""
    v = _empty(u, places.shape, u.dtype)
    arguments = {"u": u.contiguous(memory_format=torch.channels_last), "places": places, "v": v}
    _launch(max_pool_adjoint_kernel, arguments, v, u, v, geometry)
    return v


def _windows(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    """As many as PyTorch has; with `ceil` the last may run over the edge, but not begin behind it."""
    count = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _launch(
    kernel: Any, tensors: dict[str, Tensor], over: Tensor, wide: Tensor, narrow: Tensor, geometry: Sequence[Any]
) -> None:
    """Launches over the positions of one tensor; `wide` is as x, `narrow` as y."""
    (KH, KW), (SH, SW), (PH, PW), _, _ = geometry
    B, C, *size = over.shape
    N = B * size[0] * size[1]
    BC = min(64, triton.next_power_of_2(C))
    BN = ELEMENTS // BC
    arguments = {
        **tensors,
        **{"N": N, "C": C, "H": wide.shape[2], "W": wide.shape[3], "h": narrow.shape[2], "w": narrow.shape[3]},
        **{"KH": KH, "KW": KW, "SH": SH, "SW": SW, "PH": PH, "PW": PW, "BN": BN, "BC": BC},
        "DTYPE": tl.float64 if over.dtype == torch.float64 else tl.float32,
    }
    threads_of_warp = 64 if launch.device_properties(over.device)[0].startswith("gfx") else 32
    grid = (triton.cdiv(N, BN), triton.cdiv(C, BC))
    launch.launch(kernel, grid, arguments, over, THREADS // threads_of_warp)
