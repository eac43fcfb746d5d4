"""The steps of the reference's θ: PyTorch's own optimizers, and the adjoint of one such step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = list[list[Tensor]]  # v of each parameter, for SGD; m and s of each, for AdamW


def take_step(optimizer: torch.optim.Optimizer, theta: Sequence[Tensor], max_norm: float | None) -> None:
    """With the gradients that are there; momentum, moments and weight decay reach the other parameters too."""
    for p in theta:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(theta, max_norm)
    optimizer.step()


def adjoint(
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor | None],
    p: Sequence[Tensor],
    q: State | None,
) -> tuple[list[Tensor], list[Tensor], State]:
    """Of the step that the optimizer takes next with `gradient`; p = dL_meta/dθ', q = dL_meta/d(its state after).

    Returns:
        dL_meta/d(gradient), dL_meta/dθ but for what goes through the gradient, dL_meta/d(its state).
    """
    options = {id(x): group for group in optimizer.param_groups for x in group["params"]}
    of_each = [options[id(x)] for x in theta]
    g = [torch.zeros_like(x) if y is None else y.detach() for x, y in zip(theta, gradient, strict=True)]
    if isinstance(optimizer, torch.optim.SGD):
        g_bar, p_bar, q_bar = _sgd_adjoint(of_each, p, q[0] if q else [torch.zeros_like(x) for x in p])
    else:
        clipped = g if max_norm is None else _clipped(g, max_norm)
        g_bar, p_bar, q_bar = _adamw_adjoint(optimizer, of_each, theta, clipped, p, q)
    if max_norm is not None:
        leaves = [x.requires_grad_() for x in g]
        with torch.enable_grad():
            g_bar = list(torch.autograd.grad(_clipped(leaves, max_norm), leaves, g_bar))
    return g_bar, p_bar, q_bar


def _sgd_adjoint(
    options: Sequence[dict[str, Any]], p: Sequence[Tensor], q: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], State]:
    # A step is g = ∇L(θ) + wd θ; v' = μ v + g; θ' = θ − α v' (Nesterov: θ' = θ − α (g + μ v')).
    # With p = dL_meta/dθ', q = dL_meta/dv', its adjoint is
    #   q̄ = q − α p               (Nesterov: q − α μ p), all that reaches v'
    #   ḡ = q̄                     (Nesterov: q̄ − α p), all that reaches g
    #   dL_meta/dv = μ q̄;  dL_meta/dθ = p + wd ḡ + ∂⟨∇L, ḡ⟩/∂θ;  dL_meta/dφ += ∂⟨∇L, ḡ⟩/∂φ
    each = [tuple(o[k] for k in ("lr", "momentum", "weight_decay", "nesterov")) for o in options]
    q = [b - lr * (mu if nesterov else 1) * a for a, b, (lr, mu, _, nesterov) in zip(p, q, each, strict=True)]
    g = [b - lr * a if nesterov else b for a, b, (lr, _, _, nesterov) in zip(p, q, each, strict=True)]
    p = [a + wd * c for a, c, (_, _, wd, _) in zip(p, g, each, strict=True)]
    return g, list(p), [[mu * b for b, (_, mu, _, _) in zip(q, each, strict=True)]]


def _adamw_adjoint(
    optimizer: torch.optim.Optimizer,
    options: Sequence[dict[str, Any]],
    theta: Sequence[Tensor],
    g: Sequence[Tensor],
    p: Sequence[Tensor],
    q: State | None,
) -> tuple[list[Tensor], list[Tensor], State]:
    """By autograd through the step of each parameter, written out."""
    bars: State = [[], [], [], []]
    for i, x in enumerate(theta):
        state = optimizer.state.get(x, {})
        before = [x, state.get("exp_avg", torch.zeros_like(x)), state.get("exp_avg_sq", torch.zeros_like(x)), g[i]]
        leaves = [y.detach().clone().requires_grad_() for y in before]
        with torch.enable_grad():
            after = _adamw(leaves, float(state.get("step", 0)) + 1, options[i])
        u = [p[i], *(torch.zeros_like(x) if q is None else part[i] for part in (q or [[], []]))]
        for bar, found in zip(bars, torch.autograd.grad(after, leaves, u), strict=True):
            bar.append(found)
    return bars[3], bars[0], bars[1:3]


def _adamw(leaves: Sequence[Tensor], t: float, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    p, m, s, g = leaves
    beta1, beta2 = options["betas"]
    m = beta1 * m + (1 - beta1) * g
    s = beta2 * s + (1 - beta2) * g**2
    root = torch.where(s == 0, 0.0, torch.where(s == 0, 1.0, s).sqrt())  # of a gradient that was never there
    denominator = root / (1 - beta2**t) ** 0.5 + options["eps"]
    lr = options["lr"]
    return p - lr * options["weight_decay"] * p - lr / (1 - beta1**t) * m / denominator, m, s


def _clipped(g: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    norm = torch.stack([x.square().sum() for x in g]).sum().sqrt()
    return [x * (max_norm / (norm + 1e-6)).clamp(max=1.0) for x in g]
