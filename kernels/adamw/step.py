"""The AdamW step (`rule.py`) of all parameters at once, and its adjoint: ATen's multi-tensor operations.

A parameter whose gradient is None has ∇ = 0: its moments fade and weight decay reaches it all the same. α and t are
tensors, so that they change under a captured CUDA graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l2t_fast.kernels.adamw.rule import AdamW


class Moments(NamedTuple):
    """m and s of each parameter."""

    m: list[Tensor]
    s: list[Tensor]


def adamw_step(
    theta: Sequence[Tensor], moments: Moments, g: Sequence[Tensor | None], t: Tensor, lr: Tensor, rule: AdamW
) -> tuple[list[Tensor], Moments]:
    """(θ', m' and s'). t: t', the number of this step from one; lr: α; scalar tensors on the device of θ."""
    beta1, beta2 = rule.betas
    grads = full(g, theta)
    step, rho, keep = _scalars(theta, t, lr, rule)
    m, s = torch._foreach_mul(moments.m, beta1), torch._foreach_mul(moments.s, beta2)
    torch._foreach_add_(m, grads, alpha=1 - beta1)
    torch._foreach_addcmul_(s, grads, grads, 1 - beta2)
    _, D = _denominators(s, rho, rule)
    update = torch._foreach_div(m, D)
    torch._foreach_mul_(update, step)
    new_theta = torch._foreach_mul(list(theta), keep)
    torch._foreach_sub_(new_theta, update)
    return list(new_theta), Moments(list(m), list(s))


def adamw_adjoint_(
    u_theta: Sequence[Tensor],
    u: Moments | None,
    after: Moments,
    g: Sequence[Tensor | None],
    t: Tensor,
    lr: Tensor,
    rule: AdamW,
) -> tuple[list[Tensor], Moments]:
    """The adjoint of `adamw_step` in the direction (u_θ, u_m, u_s): (ḡ, m̄ and s̄); u_θ becomes θ̄ in place.

        w = α̂ u_θ / D,   p = u_m − w,   q = u_s + w (m' / D) ρ / (2 √s'),
        ḡ = (1 − β₁) p + 2 (1 − β₂) ∇ q,   m̄ = β₁ p,   s̄ = β₂ q,   θ̄ = (1 − α wd) u_θ

    u: None is zero (nothing reads the last step's moments). after: m' and s'. Where s' is zero so are m' and ∇, and the
    second term of q, whose limit is zero.
    """
    beta1, beta2 = rule.betas
    grads = full(g, u_theta)
    step, rho, keep = _scalars(u_theta, t, lr, rule)
    root, D = _denominators(after.s, rho, rule)
    w = torch._foreach_div(list(u_theta), D)
    torch._foreach_mul_(w, step)
    p = torch._foreach_neg(w) if u is None else torch._foreach_sub(u.m, w)
    q = torch._foreach_mul(w, after.m)
    torch._foreach_div_(q, D)
    torch._foreach_mul_(q, 0.5 * rho)
    torch._foreach_clamp_min_(root, torch.finfo(root[0].dtype).tiny ** 0.5)
    torch._foreach_div_(q, root)
    if u is not None:
        torch._foreach_add_(q, u.s)
    g_bar = torch._foreach_mul(p, 1 - beta1)
    torch._foreach_addcmul_(g_bar, grads, q, 2 * (1 - beta2))
    torch._foreach_mul_(list(u_theta), keep)
    torch._foreach_mul_(p, beta1)
    torch._foreach_mul_(q, beta2)
    return list(g_bar), Moments(list(p), list(q))


def full(g: Sequence[Tensor | None], theta: Sequence[Tensor]) -> list[Tensor]:
    """∇ in the precision of θ, zeros where there is none."""
    return [torch.zeros_like(p) if x is None else x.to(p.dtype) for p, x in zip(theta, g, strict=True)]


def _scalars(theta: Sequence[Tensor], t: Tensor, lr: Tensor, rule: AdamW) -> tuple[Tensor, Tensor, Tensor]:
    """(α̂, ρ, 1 − α wd), computed in double, as θ is."""
    beta1, beta2 = rule.betas
    t = t.double()
    scalars = lr / (1 - beta1**t), (1 - beta2**t).rsqrt(), 1 - lr * rule.weight_decay
    dtype = theta[0].dtype if len({p.dtype for p in theta}) == 1 else torch.float64
    return tuple(x.to(dtype) for x in scalars)  # type: ignore[return-value]


def _denominators(s: Sequence[Tensor], rho: Tensor, rule: AdamW) -> tuple[list[Tensor], list[Tensor]]:
    """(√s, D)."""
    root = torch._foreach_sqrt(list(s))
    D = torch._foreach_mul(root, rho)
    torch._foreach_add_(D, rule.eps)
    return list(root), list(D)
