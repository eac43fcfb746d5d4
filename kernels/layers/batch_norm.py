"""BatchNorm with its second order written out: exact, and cheaper than PyTorch's own some thirty passes over memory.

A sum and a ReLU that follow can be part of it, in all three orders (`pending.py` finds them in a network).

In the formulas u is the cotangent of a gradient g_•, v_• what its adjoint gives. On CUDA they are Triton's
(`batch_norm_triton.py`), but not under a compiler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.layers.autograd import Last, derivatives_wanted, mark_again, mark_zero_sums

_aten = torch.ops.aten

# (β [C], y [B, C, H, W] or None): where ReLU let pass, by y if it is there, else where γ x̂ + β is positive.
Mask = tuple[Tensor, Tensor | None]

# Dynamo, tracing a Function inside torch.func.vjp by itself, silently loses the second order; AOTAutograd does not.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, C, H, W], mean [C], 1/σ [C]) with the batch statistics of x [B, C, H, W]."""
    return BatchNorm.apply(x, gamma, beta, eps)[:3]  # type: ignore[no-any-return]


class BatchNorm(torch.autograd.Function):
    """(x [B, C, H, W], γ [C], β [C], ε) -> (y, mean [C], 1/σ [C], x, γ and y again), with batch statistics.

    y = γ x̂ + β,  x̂ = (x − μ)/σ,  σ² = var(x) + ε;  with an `addend`, y = γ x̂ + β + addend; with `relu`, max(y, 0).
    statistics: (μ, 1/σ), where they are known. make: what y is made by, where not as it stands there.

    Where Triton computes, x and γ again are what the gradient reads as these: so what they are due as that reaches
    `backward` together with the cotangent of y, and is added in the same pass over memory. y again is for a convolution
    to read likewise (`autograd.mark_again`). None elsewhere.
    """

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        addend: Tensor | None = None,
        relu: bool = False,
        statistics: tuple[Tensor, Tensor] | None = None,
        make: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if fused(x):
            mean, rstd = statistics or batch_statistics(x, eps)
            y = (make or normalised)(x, gamma, beta, mean, rstd, addend, relu)
            return y, mean, rstd, x.detach(), gamma.detach(), y.detach() if relu else None
        y, mean, rstd = _aten._native_batch_norm_legit.no_stats(x, gamma, beta, True, 0.0, eps)
        y = y if addend is None else y.add_(addend)
        return y.relu_() if relu else y, mean, rstd, None, None, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gamma, beta, _, addend, ctx.relu, *_ = inputs
        y, mean, rstd, again, gamma_again, _ = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # zeros a call
        read = ctx.relu and (addend is not None or again is None)
        of_x = (x if again is None else again, gamma if gamma_again is None else gamma_again, mean, rstd)
        ctx.save_for_backward(*of_x, beta if ctx.relu else None, y if read else None)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *others: Tensor | None) -> Any:
        *_, plus, plus_gamma, also = others
        g, also = (also, None) if g is None else (g, also)
        if g is None:
            return plus, plus_gamma, *[None] * 6
        x, gamma, mean, rstd, beta, y = ctx.saved_tensors
        mask = (beta.detach(), None if y is None else y.detach()) if ctx.relu else None
        twice = torch.is_grad_enabled()
        if twice:  # what is added stays in the graph
            g = g if also is None else g + also
            inside: tuple[Tensor | None, ...] = (None, None, None)
        else:
            inside = (plus, plus_gamma, also)
        g_x, g_gamma, g_beta, g_passed, again = BatchNormBackward.apply(
            g, x, gamma, mean, rstd, mask, ctx.needs_input_grad[4], twice, *inside
        )
        if twice and plus is None:
            mark_again(g_x, again)
        elif twice:
            g_x = g_x + plus
        g_gamma = g_gamma + plus_gamma if twice and plus_gamma is not None else g_gamma
        mark_zero_sums(g_x)  # `plus` has, too: the gradient does not change where x is moved by a constant
        return g_x, g_gamma, g_beta, None, g_passed, None, None, None


class BatchNormBackward(torch.autograd.Function):
    """(g, x [B, C, H, W], γ, μ, 1/σ [C]) -> (g_x, g_γ = Σ g x̂, g_β = Σ g, g, g_x again).

    μ and σ count as functions of x. With a mask, of all of g only what ReLU let pass counts, and that is what is handed
    back where `passed`. By Triton, where `twice`, g_x is returned again (`autograd.mark_again`), and else `plus`,
    `plus_gamma` and `also` are added to g_x, g_γ and g, in the same pass.
    """

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        gamma: Tensor,
        mean: Tensor,
        rstd: Tensor,
        mask: Mask | None = None,
        passed: bool = False,
        twice: bool = False,
        plus: Tensor | None = None,
        plus_gamma: Tensor | None = None,
        also: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        if fused(x):
            from l2t_fast.kernels.layers import batch_norm_triton

            found = batch_norm_triton.gradient(g, x, gamma, mean, rstd, mask, plus, passed, plus_gamma, also)
            return *found, found[0].detach() if twice else None
        g = _let_pass(g, mask)
        g_x, g_gamma, g_beta = _normalize_backward(g, x, gamma, mean, rstd, [True, True, True])
        return g_x, g_gamma, g_beta, g.clone() if passed else None, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.mask = inputs[:5], inputs[5]
        ctx.wanted = derivatives_wanted(ctx.needs_input_grad[:3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:3])

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, u_gamma: Tensor | None, u_beta: Tensor | None, *others: Any) -> Any:
        _, x, gamma, *_ = ctx.saved_tensors
        u_passed, also = others
        u, also = (also, None) if u is None else (u, also)
        us = [torch.zeros_like(like) if t is None else t for t, like in ((u, x), (u_gamma, gamma), (u_beta, gamma))]
        v = Last.apply(_adjoint, *us, *ctx.saved_tensors, ctx.wanted, ctx.mask, u_passed, also)
        return *v, *[None] * 8


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


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(μ, 1/σ) [C] of x [B, C, H, W], in float32 for bfloat16."""
    if x.is_cuda:
        return torch.batch_norm_stats(x, eps)
    _, mean, rstd = _aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.0, eps)
    return mean, rstd


def normalised(x: Tensor, *others: Any) -> Tensor:
    """y, where Triton computes; see `batch_norm_triton.forward`."""
    from l2t_fast.kernels.layers import batch_norm_triton

    return batch_norm_triton.forward(x, *others)


def track_(
    x: Tensor, mean: Tensor, rstd: Tensor, eps: float, running: Sequence[Tensor], momentum: float | None
) -> None:
    """Moves the running mean and variance towards those of x, and the number of batches up by one, in place.

    momentum: None for the mean over all batches.
    """
    running_mean, running_var, tracked = running
    alike = all(t.is_contiguous() and (t.dtype, t.device) == (mean.dtype, x.device) for t in running[:2])
    alike = alike and (tracked.dtype, tracked.device) == (torch.int64, x.device)
    if momentum is not None and alike and untraced() and fused(x):
        from l2t_fast.kernels.layers import batch_norm_triton

        batch_norm_triton.track(x, mean, rstd, eps, running_mean, running_var, tracked, momentum)
        torch.autograd.graph.increment_version(running)  # as every operation in place does
        return
    # float32 already, but for compiled bfloat16 on a CPU
    mean, rstd = mean.to(running_mean.dtype), rstd.to(running_var.dtype)
    count = x.numel() // x.shape[1]
    variance = (rstd.pow(-2) - eps) * (count / (count - 1))  # unbiased
    tracked.add_(1)
    weight = tracked.to(mean.dtype).reciprocal() if momentum is None else momentum
    running_mean.lerp_(mean, weight)
    running_var.lerp_(variance, weight)


def fused(x: Tensor) -> bool:
    """Whether Triton computes: on CUDA, but not where a compiler traces, which fuses the formulas by itself."""
    return launch.TRITON and x.is_cuda and type(x) is Tensor and launch.is_dense(x) and x.numel() < 2**31


def untraced() -> bool:
    """Whether tensors are what they seem: no compiler and no torch.func is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _adjoint(*arguments: Any) -> tuple[Tensor | None, ...]:
    """`adjoint`, with a mask and the cotangent of what was passed; by Triton, u may have another summand."""
    *tensors, needs, mask, u_passed, also = arguments
    if fused(tensors[4]):
        from l2t_fast.kernels.layers import batch_norm_triton

        return batch_norm_triton.adjoint(*(*tensors, needs[1] or needs[2], mask, u_passed, also))
    tensors[3] = _let_pass(tensors[3], mask)
    v_g, v_x, v_gamma = adjoint(*(*tensors, needs))
    if v_g is not None:
        v_g = _let_pass(v_g if u_passed is None else v_g + u_passed, mask)
    return v_g, v_x, v_gamma


def _let_pass(g: Tensor, mask: Mask | None) -> Tensor:
    """What ReLU let pass of g; in ATen the mask has y."""
    return g if mask is None else _aten.threshold_backward(g, mask[1], 0)


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
