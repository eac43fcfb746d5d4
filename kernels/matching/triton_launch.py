"""The operators as one pass of our own between cuBLAS's products.

Of each target layer the differences of all its pairs stand side by side: d = r T + bias − R(S) is formed, scaled to
G = k a d and written once, as a matrix [B HW, K] (`triton_kernels.py`). Then g_T = G r and g_r = Gᵀ T are one product
each; the adjoint likewise with [k a H | G]. G takes `SLICE` bytes at most: so many samples at a time.

On an H200 this is three times as fast as keeping d on the chip, where a tile must be formed for g_T and once more for
g_r, and neither product has the shape that tensor cores like (benchmarks/NOTES.md).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.beside import beside, joined
from l2t_fast.kernels.matching.blocks import blocks_of
from l2t_fast.kernels.matching.triton_kernels import difference_kernel

SLICE = 128 * 2**20  # bytes of G


@dataclass(frozen=True)
class _Layer:
    """A target layer that has pairs, with K source channels in all; `start` is the first among all layers'."""

    n: int
    pairs: list[int]
    start: int
    K: int
    shape: tuple[int, ...]  # [B, C, H, W]

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.K)

    @property
    def C(self) -> int:
        return self.shape[1]

    @property
    def area(self) -> int:
        return self.shape[2] * self.shape[3]


@dataclass(frozen=True)
class _Point:
    """The inputs of an operator: features channels_last, what belongs to pairs side by side in columns."""

    layers: list[_Layer]
    order: list[int]  # pairs, as they stand in columns
    source_of: Sequence[int]
    targets: list[Tensor]  # [B, C, H, W]
    sources: list[Tensor]  # [B, C_s, h, w]
    r: list[Tensor]  # [K, C] of each layer, in the dtype of the features
    bias: Tensor  # [columns]
    a: Tensor  # [B, columns]


@dataclass(frozen=True)
class _Direction:
    """The cotangents (u_T, u_r, u_bias) of an adjoint, likewise."""

    targets: list[Tensor]
    r: list[Tensor]
    bias: Tensor


def _point(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor] | None,
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> _Point:
    layers: list[_Layer] = []
    start = 0
    for n, T in enumerate(targets):
        pairs = [p for p, t in enumerate(target_of) if t == n]
        if pairs:
            layers.append(_Layer(n, pairs, start, sum(projections[p].shape[0] for p in pairs), tuple(T.shape)))
            start += layers[-1].K
    order = [p for layer in layers for p in layer.pairs]
    bias = torch.cat([biases[p] for p in order])
    # The distances do not depend on a: anything of its shape will do.
    a = bias.expand(targets[0].shape[0], -1) if coefficients is None else torch.cat([coefficients[p] for p in order], 1)
    r = _stacked(projections, layers, targets[0].dtype)
    return _Point(layers, order, source_of, _channels_last(targets), _channels_last(sources), r, bias, a)


def _direction(
    point: _Point, u_targets: Sequence[Tensor], u_projections: Sequence[Tensor], u_biases: Sequence[Tensor]
) -> _Direction:
    r = _stacked(u_projections, point.layers, point.targets[0].dtype)
    return _Direction(_channels_last(u_targets), r, torch.cat([u_biases[p] for p in point.order]))


def _channels_last(features: Sequence[Tensor]) -> list[Tensor]:
    return [feature.contiguous(memory_format=torch.channels_last) for feature in features]


def _stacked(projections: Sequence[Tensor], layers: Sequence[_Layer], dtype: torch.dtype) -> list[Tensor]:
    """r [K, C] of each layer: one copy, and one cast, of all."""
    flat = torch.cat([projections[p].reshape(-1) for layer in layers for p in layer.pairs]).to(dtype)
    parts = flat.split([layer.K * layer.C for layer in layers])
    return [r.view(layer.K, layer.C) for r, layer in zip(parts, layers, strict=True)]


def _rows(feature: Tensor) -> Tensor:
    """A channels_last feature as [B HW, C]."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def _differences(
    point: _Point, index: int, u: _Direction | None, sums: Tensor | None, *, products: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Goes through the samples of a layer, slice by slice: (samples, G, its sums over the positions of tiles).

    sums [B, columns]: gets E, or in the direction u v_a. Without `products` that is all.
    """
    layer = point.layers[index]
    dtype = point.targets[0].dtype
    precision = _precision(dtype)
    arch, _ = launch.device_properties(point.targets[0].device)
    chosen = blocks_of(arch, dtype, precision, u is not None)
    summed = _accumulator(dtype)
    d = u or _Direction(point.targets, point.r, point.bias)  # without u never read
    T = point.targets[layer.n]
    B, C, H, W = layer.shape
    S = [point.sources[point.source_of[p]] for p in layer.pairs]
    shapes = tuple((x.shape[1], x.shape[2], x.shape[3]) for x in S)
    channels = [C_s for C_s, _, _ in shapes]
    block = _block(channels, chosen.channels)
    table = _table(shapes, block, T.device)
    width = layer.K if u is None else 2 * layer.K
    whole = layer.area >= chosen.positions
    for part in _slices(B, layer.area * width * dtype.itemsize if products else 0):
        samples = part.stop - part.start
        rows = samples * layer.area
        tiles = samples * triton.cdiv(layer.area, chosen.positions) if whole else triton.cdiv(rows, chosen.positions)
        # What is not asked for is not written either: any pointer will do.
        G = T.new_empty((rows, width)) if products else T
        position_sums = T.new_empty((tiles, layer.K), dtype=summed) if products else point.bias
        terms = T if sums is None else T.new_empty((tiles if whole else rows, layer.K), dtype=summed)
        arguments: dict[str, Any] = {
            "T": T[part],
            "u_T": d.targets[layer.n][part],
            "sources": tuple(x[part] for x in S),
            "r": point.r[index],
            "u_r": d.r[index],
            "bias": point.bias[layer.columns],
            "u_bias": d.bias[layer.columns],
            "a": point.a[part, layer.columns],
            "G": G,
            "position_sums": position_sums,
            "terms": terms,
            "blocks": table,
            "batch": samples,
            "C": C,
            "H": H,
            "W": W,
            "K": layer.K,
            "row_of_a": point.a.stride(0),
            "BP": chosen.positions,
            "BS": block,
            "STEP": chosen.step,
            "EVEN": C % chosen.step == 0,
            "WHOLE": whole,
            "ADJOINT": u is not None,
            "PRODUCTS": products,
            "SUMS": sums is not None,
            "PRECISION": _of_products(arch, precision),
            "ALIGN": math.gcd(16, *channels),
            "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        }
        launch.launch(difference_kernel, (len(table), tiles), arguments, T, chosen.warps, chosen.stages)
        if sums is not None:
            torch.sum(terms.view(samples, -1, layer.K), 1, out=sums[part, layer.columns])
        del terms, arguments
        yield part, G, position_sums
        del G, position_sums  # before the next slice's are made


def _slices(batch: int, bytes_of_a_sample: int) -> Iterator[slice]:
    """Of equal length, of `SLICE` bytes at most where one sample takes no more."""
    parts = triton.cdiv(batch, max(1, SLICE // max(1, bytes_of_a_sample)))
    length = triton.cdiv(batch, parts)
    for start in range(0, batch, length):
        yield slice(start, min(start + length, batch))


@cache  # for good: CUDA graphs hold the tables' addresses
def _table(shapes: tuple[tuple[int, int, int], ...], block: int, device: torch.device) -> Tensor:
    """[blocks, 8] int32: pair, first channel, column of the pair's first channel, C_s, h, w."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the matching operators meet these shapes for the first time while a CUDA graph is captured: run them once "
            "before, with the same arguments."
        )
    rows, column = [], 0
    for i, (C_s, h, w) in enumerate(shapes):
        rows += [(i, s, column, C_s, h, w, 0, 0) for s in range(0, C_s, block)]
        column += C_s
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _block(channels: Sequence[int], most: int) -> int:
    """BS: the largest power of two that pads the source channels by less than a fourth."""
    candidates = [most >> i for i in range(most.bit_length()) if most >> i >= 16]
    padded = {block: sum(triton.cdiv(C_s, block) * block for C_s in channels) for block in candidates}
    return next((block for block in candidates if padded[block] < 1.25 * sum(channels)), candidates[-1])


def _precision(dtype: torch.dtype) -> str:
    """Of a product in fp32, as for PyTorch's own: torch.set_float32_matmul_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _of_products(arch: str, precision: str) -> str:
    """PRECISION of the kernel: the rounding is NVIDIA's instruction; AMD's matrix cores take operands as they are."""
    return "rounded" if precision == "tf32" and not arch.startswith("gfx") else precision


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(
    point: _Point,
    u: _Direction | None,
    sums: Tensor | None,
    targets: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(g_T, g_r, g_bias), or in the direction u (v_T, v_r, v_bias), like `targets`, `projections` and `biases`."""
    summed = _accumulator(point.targets[0].dtype)
    sizes = [layer.K * layer.C for layer in point.layers]
    flat = point.bias.new_empty(sum(sizes), dtype=summed)
    g_r = [x.view(layer.K, layer.C) for x, layer in zip(flat.split(sizes), point.layers, strict=True)]
    g_bias = point.bias.new_empty(len(point.bias), dtype=summed)
    g_T = {layer.n: torch.empty_like(point.targets[layer.n]) for layer in point.layers}
    factors = point.r if u is None else [torch.cat(two) for two in zip(point.r, u.r, strict=True)]  # [K or 2 K, C]

    def of_layer(index: int, layer: _Layer) -> None:
        for part, G, position_sums in _differences(point, index, u, sums, products=True):
            torch.mm(G, factors[index], out=_rows(g_T[layer.n][part]))
            first = part.start == 0
            _product(G[:, : layer.K].T, _rows(point.targets[layer.n][part]), g_r[index], add=not first)
            if u is not None:
                _product(G[:, layer.K :].T, _rows(u.targets[layer.n][part]), g_r[index], add=True)
            if first:
                torch.sum(position_sums, 0, out=g_bias[layer.columns])
            else:
                g_bias[layer.columns].add_(position_sums.sum(0))
            del G, position_sums

    _each_layer(point, of_layer)
    of_targets = [_like(g_T[n], T) if n in g_T else torch.zeros_like(T) for n, T in enumerate(targets)]
    return of_targets, _of_pairs(flat, point, projections), _of_pairs(g_bias, point, biases)


def _each_layer(point: _Point, function: Callable[[int, _Layer], None]) -> None:
    """The largest beside all others."""
    areas = [layer.area * layer.K * layer.C for layer in point.layers]
    largest = areas.index(max(areas))
    T = point.targets[0]
    with beside(T, when=len(areas) > 1):
        for index, layer in enumerate(point.layers):
            if index != largest:
                function(index, layer)
    function(largest, point.layers[largest])
    joined(T)


def _sums_alone(point: _Point, u: _Direction | None, sums: Tensor) -> None:
    """`sums` of `_differences`."""

    def of_layer(index: int, layer: _Layer) -> None:
        for _ in _differences(point, index, u, sums, products=False):
            pass

    _each_layer(point, of_layer)


def _product(x: Tensor, y: Tensor, into: Tensor, *, add: bool) -> None:
    """into = x y, or added to it; sums of bfloat16 factors are float32."""
    if x.dtype != into.dtype and not x.is_cuda:
        x, y = x.to(into.dtype), y.to(into.dtype)
    dtype: dict[str, Any] = {} if x.dtype == into.dtype else {"out_dtype": into.dtype}
    if add:
        torch.addmm(into, x, y, out=into, **dtype)
    else:
        torch.mm(x, y, out=into, **dtype)


def _like(feature: Tensor, target: Tensor) -> Tensor:
    """The feature laid out in memory as results for this target are."""
    own = torch.empty_like(target, device="meta").stride() == feature.stride()
    return feature if own else torch.empty_like(target).copy_(feature)


def _of_pairs(columns: Tensor, point: _Point, like: Sequence[Tensor]) -> list[Tensor]:
    """What stands side by side, a tensor of its own for each pair: the outputs of an operator share no storage."""
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    ordered = [outputs[p] for p in point.order]
    if columns.dim() == 1:
        parts = [x.view(p.shape) for x, p in zip(columns.split([p.numel() for p in ordered]), ordered, strict=True)]
    else:
        parts = list(columns.split([p.shape[1] for p in ordered], 1))
    torch._foreach_copy_(ordered, parts)
    return outputs


def _new_sums(point: _Point) -> Tensor:
    T = point.targets[0]
    return T.new_empty(T.shape[0], len(point.bias), dtype=_accumulator(T.dtype))


def matching_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E; see `matching.ops.matching_distances`."""
    point = _point(targets, sources, projections, biases, None, source_of, target_of)
    sums = _new_sums(point)
    _sums_alone(point, None, sums)
    return _of_pairs(sums, point, [r.new_empty(targets[0].shape[0], r.shape[0]) for r in projections])


def matching_gradient(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
    distances: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(E, g_T, g_r, g_bias); see `matching.ops.matching_gradient`."""
    point = _point(targets, sources, projections, biases, coefficients, source_of, target_of)
    sums = _new_sums(point) if distances else None
    g = _products(point, None, sums, targets, projections, biases)
    return [] if sums is None else _of_pairs(sums, point, coefficients), *g


def matching_adjoint(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    u_targets: Sequence[Tensor],
    u_projections: Sequence[Tensor],
    u_biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
    primal: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(v_T, v_r, v_bias, v_a); see `matching.ops.matching_adjoint`."""
    point = _point(targets, sources, projections, biases, coefficients, source_of, target_of)
    u = _direction(point, u_targets, u_projections, u_biases)
    sums = _new_sums(point)
    v: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    if primal:
        v = _products(point, u, sums, targets, projections, biases)
    else:
        _sums_alone(point, u, sums)
    return *v, _of_pairs(sums, point, coefficients)
