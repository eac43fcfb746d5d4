"""The matching operators as one pass of our own between cuBLAS's products; see `difference_kernel.py`.

Of each target layer the differences d of all its pairs are formed side by side, scaled, and written once as a matrix
G [B HW, K]; then g_T = G R and g_r = Gᵀ T are one product each. So many samples at a time that G takes no more than
`SLICE` bytes, which stay in the cache of the device until both products have read them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.matching.difference_kernel import difference_kernel

SLICE = 48 * 2**20  # bytes of G


@dataclass(frozen=True)
class Blocks:
    """Positions, source channels and target channels at a time of a program, its warps and pipeline stages."""

    positions: int
    channels: int
    step: int
    warps: int
    stages: int


# Of (adjoint, arithmetic).
BLOCKS = {
    (False, "bf16"): Blocks(128, 64, 64, 8, 3),
    (True, "bf16"): Blocks(128, 64, 64, 8, 2),
    (False, "tf32"): Blocks(128, 64, 32, 8, 3),
    (True, "tf32"): Blocks(128, 32, 32, 8, 2),
    (False, "ieee"): Blocks(64, 32, 16, 8, 1),
    (True, "ieee"): Blocks(64, 16, 16, 8, 1),
}


@dataclass(frozen=True)
class _Layer:
    """A target layer with pairs; features as rows of channels."""

    n: int
    pairs: list[int]
    first: int  # column of its first pair among all layers'
    K: int  # columns
    shape: tuple[int, ...]  # [B, C, H, W]

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
    targets: list[Tensor]  # [B, C, H, W]
    sources: list[Tensor]
    r: list[Tensor]  # [K, C] of each layer, in the dtype of the features
    bias: Tensor  # [columns]
    a: Tensor  # [B, columns]
    order: list[int]  # pairs, as they stand in columns
    source_of: Sequence[int]


def _point(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor] | None,
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> _Point:
    layers, first = [], 0
    for n, T in enumerate(targets):
        pairs = [p for p, t in enumerate(target_of) if t == n]
        if pairs:
            K = sum(projections[p].shape[0] for p in pairs)
            layers.append(_Layer(n, pairs, first, K, tuple(T.shape)))
            first += K
    order = [p for layer in layers for p in layer.pairs]
    bias = torch.cat([biases[p] for p in order])
    return _Point(
        layers,
        [_rows_of_channels(T) for T in targets],
        [_rows_of_channels(S) for S in sources],
        _stacked(projections, layers, targets[0].dtype),
        bias,
        bias if coefficients is None else torch.cat([coefficients[p] for p in order], 1),
        order,
        source_of,
    )


def _rows_of_channels(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)


def _stacked(projections: Sequence[Tensor], layers: Sequence[_Layer], dtype: torch.dtype) -> list[Tensor]:
    """r [K, C] of each layer."""
    flat = torch.cat([projections[p].reshape(-1) for layer in layers for p in layer.pairs]).to(dtype)
    return [r.view(layer.K, layer.C) for r, layer in zip(flat.split([x.K * x.C for x in layers]), layers, strict=True)]


def _matrix(feature: Tensor) -> Tensor:
    """[B HW, C]."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def _feature(matrix: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """[B, C, H, W] of [B HW, C], laid out in memory as `like`."""
    B, C, H, W = shape
    feature = matrix.view(B, H, W, C).permute(0, 3, 1, 2)
    strides = torch.empty_like(like)
    return feature if feature.stride() == strides.stride() else strides.copy_(feature)


@cache  # for good: CUDA graphs hold the tables' addresses
def _table(shapes: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> Tensor:
    """[blocks, 8] int32: pair, channel of the source, first column of the pair, C_s, h, w."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the matching operators meet these shapes for the first time while a CUDA graph is captured: run them once "
            "before, with the same arguments."
        )
    rows, first = [], 0
    for i, (C_s, h, w) in enumerate(shapes):
        rows += [(i, s, first, C_s, h, w, 0, 0) for s in range(0, C_s, block)]
        first += C_s
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _block(channels: Sequence[int], most: int) -> int:
    """BS: the largest power of two that pads the source channels by less than a fourth."""
    candidates = [most >> i for i in range(most.bit_length()) if most >> i >= 16]
    padded = {block: sum(-(-C_s // block) * block for C_s in channels) for block in candidates}
    return next((block for block in candidates if padded[block] < 1.25 * sum(channels)), candidates[-1])


@dataclass(frozen=True)
class _Direction:
    targets: list[Tensor]
    r: list[Tensor]
    bias: Tensor


def _passes(
    point: _Point, u: _Direction | None, products: bool, sums: Tensor | None
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Goes through the layers in slices of samples: (index of the layer, samples, G, sums of its positions [K]).

    sums [B, columns]: gets Σ_ij of d² or d H, if given.
    """
    dtype = point.targets[0].dtype
    precision = _precision(dtype)
    arithmetic = "bf16" if dtype == torch.bfloat16 else precision
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    chosen = BLOCKS[u is not None, arithmetic]
    for index, layer in enumerate(point.layers):
        T = point.targets[layer.n]
        B, C, H, W = T.shape
        S = [point.sources[point.source_of[p]] for p in layer.pairs]
        shapes = tuple((x.shape[1], x.shape[2], x.shape[3]) for x in S)
        block = _block([C_s for C_s, _, _ in shapes], chosen.channels)
        table = _table(shapes, block, T.device)
        width = (2 if u is not None else 1) * layer.K
        whole = layer.area >= chosen.positions
        samples = min(B, max(1, SLICE // (layer.area * width * dtype.itemsize))) if products else B
        samples = math.ceil(B / math.ceil(B / samples))
        for b in range(0, B, samples):
            part = slice(b, min(b + samples, B))
            count = part.stop - part.start
            rows = count * layer.area
            tiles = count * -(-layer.area // chosen.positions) if whole else -(-rows // chosen.positions)
            G = T.new_empty((rows, width) if products else (1, 1))
            tile_sums = T.new_empty((tiles, layer.K) if products else (1, 1), dtype=accumulated)
            terms = T.new_empty((tiles if whole else rows, layer.K) if sums is not None else (1, 1), dtype=accumulated)
            d = u or _Direction(point.targets, point.r, point.bias)  # without u never read
            arguments = {
                "T": T[part],
                "u_T": d.targets[layer.n][part],
                "sources": tuple(x[part] for x in S),
                "r": point.r[index],
                "u_r": d.r[index],
                "bias": point.bias[layer.first :],
                "u_bias": d.bias[layer.first :],
                "a": point.a[part, layer.first :],
                "G": G,
                "tile_sums": tile_sums,
                "sums": terms,
                "blocks": table,
                "batch": count,
                "C": C,
                "H": H,
                "W": W,
                "K": layer.K,
                "columns": point.a.shape[-1],
                "BP": chosen.positions,
                "BS": block,
                "STEP": chosen.step,
                "EVEN": C % chosen.step == 0,
                "WHOLE": whole,
                "ADJOINT": u is not None,
                "PRODUCTS": products,
                "SUMS": sums is not None,
                "PRECISION": precision,
                "ALIGN": math.gcd(16, *(C_s for C_s, _, _ in shapes)),
                "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
            }
            launch.launch(difference_kernel, (len(table), tiles), arguments, T, chosen.warps, chosen.stages)
            if sums is not None:
                torch.sum(terms.view(count, -1, layer.K), 1, out=sums[part, layer.first : layer.first + layer.K])
            yield index, part, G, tile_sums


def _precision(dtype: torch.dtype) -> str:
    """Of a product in fp32, as for PyTorch's own: torch.set_float32_matmul_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _add_product(into: Tensor, x: Tensor, y: Tensor, new: bool) -> None:
    """into = x y, or += unless `new`; sums of bfloat16 factors are float32."""
    if x.dtype == into.dtype:
        torch.mm(x, y, out=into) if new else torch.addmm(into, x, y, out=into)
    elif x.is_cuda:
        dtype = into.dtype
        torch.mm(x, y, out_dtype=dtype, out=into) if new else torch.addmm(into, x, y, out_dtype=dtype, out=into)
    else:
        _add_product(into, x.to(into.dtype), y.to(into.dtype), new)


def _of_pairs(columns: Tensor, point: _Point, dim: int, sizes: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """What stands side by side in columns, one tensor of its own a pair, in the dtype and shape of `like`."""
    outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    parts = columns.split(sizes, dim)
    ordered = [outputs[p].view(part.shape) for p, part in zip(point.order, parts, strict=True)]
    torch._foreach_copy_(ordered, list(parts))
    return outputs


def _results(
    point: _Point, flat: Tensor, bias: Tensor, projections: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(g_r, g_bias) of pairs, from those of the layers one after the other."""
    r = _of_pairs(flat, point, 0, [projections[p].numel() for p in point.order], projections)
    return r, _of_pairs(bias, point, 0, [biases[p].numel() for p in point.order], biases)


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
    point = _with_a(point, targets[0])
    E = _new_sums(point)
    for _ in _passes(point, None, False, E):
        pass
    like = [r.new_empty(targets[0].shape[0], r.shape[0]) for r in projections]
    return _of_pairs(_per_position(E, point), point, 1, [like[p].shape[1] for p in point.order], like)


def _with_a(point: _Point, like: Tensor) -> _Point:
    """E does not depend on a."""
    return _Point(
        point.layers,
        point.targets,
        point.sources,
        point.r,
        point.bias,
        point.bias.expand(like.shape[0], -1),
        point.order,
        point.source_of,
    )


def _new_sums(point: _Point) -> Tensor:
    T = point.targets[0]
    dtype = torch.float64 if T.dtype == torch.float64 else torch.float32
    return T.new_empty(T.shape[0], len(point.bias), dtype=dtype)


def _per_position(sums: Tensor, point: _Point, factor: float = 1.0) -> Tensor:
    """Each layer's sums over HW, times `factor`."""
    for layer in point.layers:
        sums[:, layer.first : layer.first + layer.K].mul_(factor / layer.area)
    return sums


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
    g_T, g_r, g_bias = _products(point, None, sums, targets, projections, biases)
    if sums is None:
        return [], g_T, g_r, g_bias
    sizes = [coefficients[p].shape[1] for p in point.order]
    return _of_pairs(_per_position(sums, point), point, 1, sizes, coefficients), g_T, g_r, g_bias


def _products(
    point: _Point,
    u: _Direction | None,
    sums: Tensor | None,
    targets: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(g_T, g_r, g_bias), or in the direction u (v_T, v_r, v_bias)."""
    accumulated = projections[0].dtype
    sizes = [layer.K * layer.C for layer in point.layers]
    flat = point.bias.new_empty(sum(sizes), dtype=accumulated)
    of_layers = [x.view(layer.K, layer.C) for x, layer in zip(flat.split(sizes), point.layers, strict=True)]
    bias = point.bias.new_empty(len(point.bias), dtype=torch.promote_types(accumulated, torch.float32))
    matrices = [T.new_empty(T.shape[0] * T.shape[2] * T.shape[3], T.shape[1]) for T in point.targets]
    stacked = point.r if u is None else [torch.cat(two) for two in zip(point.r, u.r, strict=True)]  # [K or 2 K, C]
    for index, part, G, tile_sums in _passes(point, u, True, sums):
        layer = point.layers[index]
        new = part.start == 0
        rows = slice(part.start * layer.area, part.stop * layer.area)
        torch.mm(G, stacked[index], out=matrices[layer.n][rows])
        T = _matrix(point.targets[layer.n])[rows]
        if u is None:
            _add_product(of_layers[index], G.T, T, new)
        else:
            _add_product(of_layers[index], G[:, : layer.K].T, T, new)
            _add_product(of_layers[index], G[:, layer.K :].T, _matrix(u.targets[layer.n])[rows], False)
        column = bias[layer.first : layer.first + layer.K]
        column.copy_(tile_sums.sum(0)) if new else column.add_(tile_sums.sum(0))
    paired = {layer.n for layer in point.layers}
    g_T = [
        _feature(matrix, T.shape, T) if n in paired else torch.zeros_like(T)
        for n, (matrix, T) in enumerate(zip(matrices, targets, strict=True))
    ]
    return g_T, *_results(point, flat, bias, projections, biases)


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
    u = _Direction(
        [_rows_of_channels(x) for x in u_targets],
        _stacked(u_projections, point.layers, targets[0].dtype),
        torch.cat([u_biases[p] for p in point.order]),
    )
    sums = _new_sums(point)
    found: tuple[list[Tensor], ...] = ([], [], [])
    if primal:
        found = _products(point, u, sums, targets, projections, biases)
    else:
        for _ in _passes(point, u, False, sums):
            pass
    sizes = [coefficients[p].shape[1] for p in point.order]
    v_a = _of_pairs(_per_position(sums, point, 2.0), point, 1, sizes, coefficients)
    return found[0], found[1], found[2], v_a
