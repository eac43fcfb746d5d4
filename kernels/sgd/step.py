"""The SGD step (`rule.py`) of all parameters at once, in place or as a function, and its adjoint.

A parameter whose gradient is None has ∇ = 0: momentum and weight decay reach it all the same. α is a tensor, so that a
schedule changes it under a captured CUDA graph. On CUDA each is one Triton launch for up to `triton_kernels.LIMIT`
parameters of a kind, and one pass over memory; elsewhere ATen's multi-tensor operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.sgd.rule import SGD


def sgd_step(
    theta: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor | None], lr: Tensor, rule: SGD
) -> tuple[list[Tensor], list[Tensor]]:
    """(θ', v'). lr: α, a scalar tensor on the device of θ. ∇ may be of lower precision than θ."""
    if fused(theta):
        from l2t_fast.kernels.sgd import triton_kernels

        return triton_kernels.step(theta, v, g, lr, rule)
    grads = [torch.zeros_like(p) if x is None else x for p, x in zip(theta, g, strict=True)]
    update = torch._foreach_add(grads, list(theta), alpha=rule.weight_decay)
    if rule.nesterov:
        new_v = torch._foreach_add(update, list(v), alpha=rule.momentum)
        torch._foreach_add_(update, new_v, alpha=rule.momentum)
    else:
        new_v = update
        torch._foreach_add_(new_v, list(v), alpha=rule.momentum)
    return _minus(theta, update, lr), list(new_v)


def sgd_step_(theta: Sequence[Tensor], v: Sequence[Tensor], g: Sequence[Tensor | None], lr: Tensor, rule: SGD) -> None:
    """The same in place: θ and v become θ' and v'."""
    if fused(theta):
        from l2t_fast.kernels.sgd import triton_kernels

        triton_kernels.step(theta, v, g, lr, rule, in_place=True)
        return
    new_theta, new_v = sgd_step(theta, v, g, lr, rule)
    torch._foreach_copy_(list(theta), new_theta)
    torch._foreach_copy_(list(v), new_v)


def sgd_adjoint_(
    u_theta: Sequence[Tensor],
    u_v: Sequence[Tensor] | None,
    dtypes: Sequence[torch.dtype | None],
    lr: Tensor,
    rule: SGD,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The adjoint of `sgd_step` in the direction (u_θ, u_v): (ḡ, v̄); u_θ becomes θ̄ in place, and u_v is used up.

        q = u_v − α u_θ (Nesterov: u_v − α μ u_θ),  ḡ = q (Nesterov: q − α u_θ),  θ̄ = u_θ + wd ḡ,  v̄ = μ q

    u_v: None is zero (nothing reads the last step's momentum); else like u_θ in memory.
    dtypes: those of ∇, and so of ḡ; None where there is none.
    """
    if fused(u_theta):
        from l2t_fast.kernels.sgd import triton_kernels

        return triton_kernels.adjoint(u_theta, u_v, dtypes, lr, rule)
    scaled = lr * rule.momentum if rule.nesterov else lr
    q = torch._foreach_mul(list(u_theta), -scaled) if u_v is None else _minus_(u_v, u_theta, scaled)
    total = _minus(q, u_theta, lr) if rule.nesterov else q
    torch._foreach_add_(list(u_theta), total, alpha=rule.weight_decay)
    g_bar = [None if dtype is None else p.to(dtype) for p, dtype in zip(total, dtypes, strict=True)]
    return g_bar, list(torch._foreach_mul(q, rule.momentum))


def _minus(x: Sequence[Tensor], y: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """x − scale y; on a CPU in one pass over memory, without reading the scale here, which captures may not."""
    if scale.device.type == "cpu":
        return list(torch._foreach_addcmul(list(x), list(y), [scale] * len(x), value=-1))
    return list(torch._foreach_sub(list(x), torch._foreach_mul(list(y), scale)))


def _minus_(x: Sequence[Tensor], y: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The same, as x."""
    if scale.device.type == "cpu":
        torch._foreach_addcmul_(list(x), list(y), [scale] * len(x), value=-1)
    else:
        torch._foreach_sub_(list(x), torch._foreach_mul(list(y), scale))
    return list(x)


def fused(tensors: Sequence[Tensor]) -> bool:
    """Whether Triton computes."""
    return launch.TRITON and bool(tensors) and tensors[0].is_cuda and all(map(launch.is_dense, tensors))
