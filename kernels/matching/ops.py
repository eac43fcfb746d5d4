"""The matching operators, registered as `torch.ops.l2t.*`, over ALL candidate pairs at once.

Lists: `targets` holds one feature [B, C_t, H, W] a target layer, `sources` one feature [B, C_s, h, w] a source
layer (all source networks in one list). Pair p joins sources[source_of[p]] with targets[target_of[p]] and has a
projection r = projections[p] [C_s, C_t, 1, 1] with biases[p] [C_s], and coefficients a = coefficients[p] [B, C_s] of
its squared distances. With

    E_bc = (1/HW) Σ_ij (r T + bias − R(S))²      (R: bilinear resize to the target's H x W)

the matching loss of the paper (eq. 3) is L_wfm = Σ_p Σ_bc a_bc E_bc with a = (β/B) λ_b w_bc. The operators take
a, not (λ, w): a is the same in all simulated steps, so one product, and one VJP through it, serve them all.

Features share one dtype; projections, biases and a have it too, or are float32 beside bfloat16 features: results have
the dtype of what they are the gradient of.

`matching_gradient` gives ∂(Σ a E) and, on request, E; `matching_adjoint` is its reverse-mode derivative, registered
as its backward. `matching_distances` is the differentiable E; its gradient is `matching_gradient` again, so it can
be differentiated twice. The adjoint itself is not differentiable (no third order).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten

Grads = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def implementation(feature: Tensor) -> ModuleType:
    """The module that computes: Triton where CUDA has tensor cores for it, in bfloat16 and TF32; ATen elsewhere.

    Without tensor cores Triton's products keep so little in registers that d would be formed many times over; cuBLAS's
    are the better ones. Float64 is there to check with.
    """
    if not launch.TRITON or not feature.is_cuda or not feature.numel():
        return aten
    tf32 = feature.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if feature.dtype == torch.bfloat16 or tf32:
        from l2t_fast.kernels.matching import triton_launch

        return triton_launch
    return aten


def reads_resized(feature: Tensor) -> bool:
    """Whether R(S), made once, serves features like this one better than S: where it is no part of the kernels."""
    return implementation(feature) is aten


@torch.library.custom_op("l2t::matching_gradient", mutates_args=())
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
    """Gradient of Σ_p Σ_bc a_bc E_bc with respect to the target features and the projections.

    Returns (E, g_T, g_r, g_bias): E a [B, C_s] for each pair (an empty list unless `distances`), g_T like `targets`,
    g_r like `projections`, g_bias like `biases`. Differentiable once, in everything but `sources`.
    """
    grads: Grads = implementation(targets[0]).matching_gradient(
        targets, sources, projections, biases, coefficients, source_of, target_of, distances
    )
    return grads


@matching_gradient.register_fake
def _(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
    distances: bool,
) -> Grads:
    E = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in coefficients] if distances else []
    return E, *_like_primal(targets, projections, biases)


@torch.library.custom_op("l2t::matching_adjoint", mutates_args=())
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
    """Derivative of <u_T, g_T> + <u_r, g_r> + <u_bias, g_bias>, all from `matching_gradient`.

    Returns (v_T, v_r, v_bias, v_a), v_a a [B, C_s] for each pair; the first three are empty lists unless `primal`
    (the first simulated step needs v_a alone).
    """
    grads: Grads = implementation(targets[0]).matching_adjoint(
        targets,
        sources,
        projections,
        biases,
        coefficients,
        u_targets,
        u_projections,
        u_biases,
        source_of,
        target_of,
        primal,
    )
    return grads


@matching_adjoint.register_fake
def _(
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
) -> Grads:
    v_a = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in coefficients]
    if not primal:
        return [], [], [], v_a
    return *_like_primal(targets, projections, biases), v_a


@torch.library.custom_op("l2t::matching_distances", mutates_args=())
def matching_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E, a [B, C_s] for each pair. Twice differentiable, in everything but `sources`."""
    E: list[Tensor] = implementation(targets[0]).matching_distances(
        targets, sources, projections, biases, source_of, target_of
    )
    return E


@matching_distances.register_fake
def _(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    batch = targets[0].shape[0]
    return [r.new_empty(batch, r.shape[0]) for r in projections]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps the tensor lists (all but the trailing pair indices and flag) of an operator's inputs."""
    lists = [arg for arg in inputs if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.indices = [arg for arg in inputs if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], int)]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _saved(ctx: Any) -> list[list[Tensor]]:
    tensors = iter(ctx.saved_tensors)
    return [[next(tensors) for _ in range(length)] for length in ctx.lengths]


def _distances_backward(ctx: Any, u_E: list[Tensor]) -> tuple[Any, ...]:
    targets, sources, projections, biases = _saved(ctx)
    _, g_T, g_r, g_bias = matching_gradient(targets, sources, projections, biases, u_E, *ctx.indices, False)
    return g_T, [None] * len(sources), g_r, g_bias, None, None


def _gradient_backward(ctx: Any, u_E: list[Tensor], *u: list[Tensor]) -> tuple[Any, ...]:
    targets, sources, projections, biases, a = _saved(ctx)
    primal = any(any(ctx.needs_input_grad[i]) for i in (0, 2, 3))
    v_T, v_r, v_bias, v_a = matching_adjoint(targets, sources, projections, biases, a, *u, *ctx.indices, primal)
    if not primal:
        return (
            [None] * len(targets),
            [None] * len(sources),
            [None] * len(a),
            [None] * len(a),
            v_a,
            None,
            None,
            None,
        )
    if u_E:
        _, g_T, g_r, g_bias = matching_gradient(targets, sources, projections, biases, u_E, *ctx.indices, False)
        v_T, v_r, v_bias = (
            [v + g for v, g in zip(vs, gs, strict=True)] for vs, gs in ((v_T, g_T), (v_r, g_r), (v_bias, g_bias))
        )
    return v_T, [None] * len(sources), v_r, v_bias, v_a, None, None, None


matching_distances.register_autograd(_distances_backward, setup_context=_save)
matching_gradient.register_autograd(_gradient_backward, setup_context=_save)


def _unit(targets: Sequence[Tensor], projections: Sequence[Tensor], target_of: Sequence[int]) -> int:
    """FLOPs of one product r T for all pairs."""
    areas = [t.shape[0] * t.shape[2] * t.shape[3] for t in targets]
    return sum(2 * r.numel() * areas[n] for r, n in zip(projections, target_of, strict=True))


# For torch.utils.flop_counter, which does not look inside an operator.


@register_flop_formula(torch.ops.l2t.matching_distances, get_raw=True)
def _(targets: Any, sources: Any, projections: Any, biases: Any, source_of: Any, target_of: Any, **_: Any) -> int:
    return _unit(targets, projections, target_of)


@register_flop_formula(torch.ops.l2t.matching_gradient, get_raw=True)
def _(targets: Any, sources: Any, projections: Any, *rest: Any, **_: Any) -> int:
    target_of, _distances = rest[-2:]
    return 3 * _unit(targets, projections, target_of)


@register_flop_formula(torch.ops.l2t.matching_adjoint, get_raw=True)
def _(targets: Any, sources: Any, projections: Any, *rest: Any, **_: Any) -> int:
    target_of, primal = rest[-2:]
    return (7 if primal else 3) * _unit(targets, projections, target_of)


def _like_primal(
    targets: Sequence[Tensor], projections: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    contiguous = torch.contiguous_format
    return (
        [torch.empty_like(t) for t in targets],
        [torch.empty_like(r, memory_format=contiguous) for r in projections],
        [torch.empty_like(b, memory_format=contiguous) for b in biases],
    )
