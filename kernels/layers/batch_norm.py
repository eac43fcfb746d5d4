"""BatchNorm with its second order written out: exact, and cheaper than PyTorch's own some thirty passes over memory.

In the formulas u is the cotangent of a gradient g_•, v_• what its adjoint gives. On CUDA they are Triton's
(`batch_norm_triton.py`), but not under a compiler.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.layers.autograd import Last, derivatives_wanted, mark_zero_sums

_aten = torch.ops.aten

# Dynamo, tracing a Function inside torch.func.vjp by itself, silently loses the second order; AOTAutograd does not.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, C, H, W], mean [C], 1/σ [C]) with the batch statistics of x [B, C, H, W]."""
    return BatchNorm.apply(x, gamma, beta, eps)  # type: ignore[no-any-return]


class BatchNorm(torch.autograd.Function):
    """(x [B, C, H, W], γ [C], β [C], ε) -> (y, mean [C], 1/σ [C]), with batch statistics.

    y = γ x̂ + β,  x̂ = (x − μ)/σ,  σ² = var(x) + ε.  Only y is differentiable.
    """

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = _aten._native_batch_norm_legit.no_stats(x, gamma, beta, True, 0.0, eps)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gamma, _, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # two zeros a call
        ctx.save_for_backward(x, gamma, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        g_x, g_gamma, g_beta = BatchNormBackward.apply(g, *ctx.saved_tensors)
        mark_zero_sums(g_x)
        return g_x, g_gamma, g_beta, None


class BatchNormBackward(torch.autograd.Function):
    """(g, x [B, C, H, W], γ, μ, 1/σ [C]) -> (g_x, g_γ = Σ g x̂, g_β = Σ g); μ and σ count as functions of x."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _normalize_backward(g, x, gamma, mean, rstd, [True, True, True])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.wanted = derivatives_wanted(ctx.needs_input_grad[:3])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> Any:
        return *Last.apply(_adjoint, *u, *ctx.saved_tensors, ctx.wanted), None, None


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
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(v_g, v_x, v_γ) of `BatchNormBackward` in the direction (u, u_γ, u_β), None where not needed; in ATen.

    With means over the N elements of a channel (ū, ḡ), m_u = mean(u x̂), m_g = mean(g x̂), s = γ/σ:

    Q = Σ (u − ū − x̂ m_u) g,   q = u_γ − s m_u,   r = q g − s m_g u
    v_g = s (u − ū) + q x̂ + u_β,   v_γ = Q/σ,   v_x = (r − r̄ − x̂ mean(r x̂) − x̂ s Q/N)/σ
    """
    need_g, need_x, need_gamma = needs
    count = x.numel() // x.shape[1]
    _, sum_ux, sum_u = _normalize_backward(u, x, gamma, mean, rstd, [False, True, True])
    m_u, u_mean = sum_ux / count, sum_u / count
    s = gamma * rstd
    q = u_gamma - s * m_u
    v_g = v_x = v_gamma = None
    if need_g:
        slope = q * rstd
        v_g = _combine([(x, slope), (u, s)], u_beta - s * u_mean - slope * mean)
    if need_x or need_gamma:
        m_g, g_mean = g_gamma / count, g_beta / count
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        _, sum_ug, _ = _normalize_backward(u, g, gamma, zero, one, [False, True, False])  # one fused reduction
        Q = sum_ug - sum_u * g_mean - sum_ux * m_g
        v_gamma = rstd * Q
    if need_x:
        p = -s * m_g
        r_mean, m_r = p * u_mean + q * g_mean, p * m_u + q * m_g
        slope = -rstd.square() * (m_r + s * Q / count)
        v_x = _combine([(x, slope), (u, p * rstd), (g, q * rstd)], -rstd * r_mean - slope * mean)
    return v_g, v_x, v_gamma


def fused(x: Tensor) -> bool:
    """Whether Triton computes: on CUDA, but not where a compiler traces, which fuses the formulas by itself."""
    return launch.TRITON and x.is_cuda and type(x) is Tensor and launch.is_dense(x) and x.numel() < 2**31


def _adjoint(*arguments: Any) -> tuple[Tensor | None, ...]:
    """`adjoint`, by Triton where it computes."""
    if not fused(arguments[4]):
        return adjoint(*arguments)
    from l2t_fast.kernels.layers import batch_norm_triton

    *tensors, (_, need_x, need_gamma) = arguments
    return batch_norm_triton.adjoint(*(*tensors, need_x or need_gamma))


def _normalize_backward(
    g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x, Σ g x̂, Σ g) where the mask asks for them. ε is given as 0: it is inside 1/σ already."""
    return _aten.native_batch_norm_backward(g, x, gamma, None, None, mean, rstd, True, 0.0, mask)  # type: ignore[no-any-return]


def _combine(terms: Sequence[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """Σ coefficient_c term_c + constant_c, channel by channel, in one pass over memory a term: [B, C, H, W]."""
    (first, coefficient), *rest = terms
    total = torch.addcmul(constant[:, None, None], first, coefficient[:, None, None])  # in the dtype of the statistics
    for term, coefficient in rest:
        total.addcmul_(term, coefficient[:, None, None])
    return total.to(first.dtype)
