"""The operators in Triton: every pair of a model in at most three launches; see `triton_kernels.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.matching.plan import (
    REDUCED,
    Feature,
    Launch,
    Signature,
    accumulator,
    channel_launch,
    position_launch,
)
from l2t_fast.kernels.matching.triton_kernels import channel_kernel, position_kernel, reduction_kernel


@dataclass(frozen=True)
class _Primal:
    """The inputs of an operator as the kernels take them: pairs grouped by target layer, dense features."""

    signature: Signature
    order: list[int]  # of the pairs
    targets: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    projections: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Direction:
    """The cotangents (u_T, u_r, u_bias) of an adjoint, likewise."""

    targets: tuple[Tensor, ...]
    projections: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def _primal(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> _Primal:
    order = sorted(range(len(projections)), key=lambda p: target_of[p])
    targets, sources = tuple(map(_dense, targets)), tuple(map(_dense, sources))
    T = targets[0]
    signature = Signature(
        T.shape[0],
        tuple(map(_feature, targets)),
        tuple(map(_feature, sources)),
        tuple((source_of[p], target_of[p]) for p in order),
        T.dtype,
        _precision(T.dtype),
        T.device,
        *launch.device_properties(T.device),
    )
    parameters = (_contiguous(tensors, order) for tensors in (projections, biases, coefficients))
    return _Primal(signature, order, targets, sources, *parameters)


def _direction(
    primal: _Primal, u_targets: Sequence[Tensor], u_projections: Sequence[Tensor], u_biases: Sequence[Tensor]
) -> _Direction:
    u_T = (
        u.contiguous(memory_format=torch.channels_last if T.channels_last else torch.contiguous_format)
        for u, T in zip(u_targets, primal.signature.targets, strict=True)
    )
    return _Direction(tuple(u_T), _contiguous(u_projections, primal.order), _contiguous(u_biases, primal.order))


def _sum_pairs(primal: _Primal, u: _Direction | None, outputs: Sequence[Tensor]) -> None:
    """g_T, or v_T in the direction u, into `outputs`."""
    planned = position_launch(primal.signature, u is not None)
    dense = tuple(
        out if launch.is_dense(out) and _feature(out) == T else torch.empty_like(feature)
        for out, feature, T in zip(outputs, primal.targets, primal.signature.targets, strict=True)
    )
    arguments = _arguments(primal, u, planned) | {"outputs": dense, "batch": primal.signature.batch}
    _launch(position_kernel, planned.programs, arguments, planned.config.warps, planned.config.stages)
    for out, result in zip(outputs, dense, strict=True):
        if out is not result:
            out.copy_(result)


def _sum_positions(
    primal: _Primal,
    u: _Direction | None,
    sums: Sequence[Tensor],
    r_products: Sequence[Tensor] = (),
    bias_sums: Sequence[Tensor] = (),
) -> None:
    """E, or v_a in the direction u, into `sums`; g_r and g_bias, or v_r and v_bias, into the others; empty ones not."""
    planned = channel_launch(primal.signature, u is not None, bool(r_products))
    workspace = primal.targets[0].new_empty(max(planned.workspace, 1), dtype=accumulator(primal.signature.dtype))
    outputs = {
        # What is not asked for is not written either: any pointer will do.
        name: tuple(tensors[p] for p in primal.order) if tensors else primal.projections[:1]
        for name, tensors in (("sums", sums), ("r_outputs", r_products), ("bias_outputs", bias_sums))
    }
    flags = {"PRODUCTS": bool(r_products), "SUMS": bool(sums)}
    arguments = _arguments(primal, u, planned) | outputs | flags | {"workspace": workspace}
    _launch(channel_kernel, planned.programs, arguments, planned.config.warps, planned.config.stages)
    arguments = {name: outputs[name] for name in ("r_outputs", "bias_outputs")}
    arguments |= {"workspace": workspace, "programs": planned.reduction, "BLOCK": REDUCED}
    _launch(reduction_kernel, planned.reduction, arguments, warps=4, stages=1)


def _arguments(primal: _Primal, u: _Direction | None, planned: Launch) -> dict[str, Any]:
    """What position and channel kernels share."""
    d = u or _Direction(primal.targets, primal.projections[:1], primal.biases[:1])  # without u never read
    return {
        "targets": primal.targets,
        "u_targets": d.targets,
        "sources": primal.sources,
        "projections": primal.projections,
        "u_projections": d.projections,
        "biases": primal.biases,
        "u_biases": d.biases,
        "coefficients": primal.coefficients,
        "programs": planned.programs,
        "pairs": planned.pairs,
        "LAYERS": tuple(map(tuple, planned.layers)),
        "BS": planned.block,
        "STEP": planned.config.step,
        "ADJOINT": u is not None,
        "PRECISION": primal.signature.precision,
        "LAYOUT": planned.source_layout,
        "ALIGN": planned.source_align,
        "DTYPE": tl.float64 if primal.signature.dtype == torch.float64 else tl.float32,
    }


def _launch(kernel: Any, programs: Tensor, arguments: dict[str, Any], warps: int, stages: int) -> None:
    """One program for each row of `programs`; nothing where there is none."""
    if len(programs):
        launch.launch(kernel, (len(programs),), arguments, programs, warps, stages)


def _dense(feature: Tensor) -> Tensor:
    return feature if launch.is_dense(feature) else feature.contiguous()


def _feature(x: Tensor) -> Feature:
    return Feature(x.shape[1], x.shape[2], x.shape[3], x.is_contiguous(memory_format=torch.channels_last))


def _contiguous(tensors: Sequence[Tensor], order: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(tensors[p].contiguous() for p in order)


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _precision(dtype: torch.dtype) -> str:
    """Of a product in fp32, as for PyTorch's own: torch.set_float32_matmul_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def matching_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E; see `matching.ops.matching_distances`. One launch."""
    E = [r.new_empty(targets[0].shape[0], r.shape[0]) for r in projections]
    a = biases  # stands in: E does not depend on a
    _sum_positions(_primal(targets, sources, projections, biases, a, source_of, target_of), None, E)
    return E


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
    """(E, g_T, g_r, g_bias); see `matching.ops.matching_gradient`. Three launches."""
    primal = _primal(targets, sources, projections, biases, coefficients, source_of, target_of)
    E = _like(coefficients) if distances else []
    g_T, g_r, g_bias = [torch.empty_like(T) for T in targets], _like(projections), _like(biases)
    _sum_pairs(primal, None, g_T)
    _sum_positions(primal, None, E, g_r, g_bias)
    return E, g_T, g_r, g_bias


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
    """(v_T, v_r, v_bias, v_a); see `matching.ops.matching_adjoint`. Three launches, or one for v_a alone."""
    point = _primal(targets, sources, projections, biases, coefficients, source_of, target_of)
    u = _direction(point, u_targets, u_projections, u_biases)
    v_a = _like(coefficients)
    if not primal:
        _sum_positions(point, u, v_a)
        return [], [], [], v_a
    v_T, v_r, v_bias = [torch.empty_like(T) for T in targets], _like(projections), _like(biases)
    _sum_pairs(point, u, v_T)
    _sum_positions(point, u, v_a, v_r, v_bias)
    return v_T, v_r, v_bias, v_a
