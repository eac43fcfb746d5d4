"""One inner step as a pure function: (θ, momentum) -> (θ, momentum).

θ is a dictionary: the target's trainable parameters ("target.NAME") and the projections r ("projections.I.weight",
"projections.I.bias"). Everything here can be differentiated again by plain autograd, and compiled.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels import ops
from l2t_fast.transfer import L2T

Theta = dict[str, Tensor]


@dataclass(frozen=True)
class SGD:
    """The rule of `torch.optim.SGD` (dampening 0); its learning rate is given at each step."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False


class Batch(NamedTuple):
    """Images, labels, and what neither θ nor the step changes: source features and weights (kernels.ops)."""

    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B]
    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]  # of each pair
    a: list[Tensor]  # [B, C_s] of each pair


class Gradient(NamedTuple):
    """∇θ of L_org, of L_wfm or of their sum, and what came with it."""

    theta: Theta
    loss: Tensor  # L_org, scalar
    logits: Tensor  # [B, classes]
    distances: list[Tensor]  # E [B, C_s] of each pair, where asked for
    buffers: dict[str, Tensor]  # those of the target after this forward pass


def parameters(learner: L2T) -> Theta:
    """θ: the parameters that are trained, the target's and those of the projections."""
    return {
        **{f"target.{name}": p for name, p in learner.target.named_parameters() if p.requires_grad},
        **{f"projections.{name}": p for name, p in learner.projections.named_parameters()},
    }


def gradient(
    learner: L2T, theta: Theta, batch: Batch, *, task: bool, matching: bool, distances: bool = False
) -> Gradient:
    """∇θ of L_org (`task`) and of L_wfm (`matching`), with batch statistics; no buffer of the target is touched.

    L_wfm enters by its gradient alone (design: only the real step and the log want its value).
    """
    pairs = range(len(learner.pairs))
    r, bias = [theta[f"projections.{i}.weight"] for i in pairs], [theta[f"projections.{i}.bias"] for i in pairs]
    matching = matching and len(pairs) > 0

    def forward(target: dict[str, Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
        buffers = {name: buffer.clone() for name, buffer in learner.target.named_buffers()}
        state = {**target, **buffers}
        logits, T = learner.target_outputs(batch.x, state)
        loss = F.cross_entropy(logits, batch.y)
        wanted = [*([loss] if task else []), *(T if matching else [])]
        return wanted, (loss, logits, {name: state[name] for name in buffers})

    outputs, pull, (loss, logits, buffers) = torch.func.vjp(  # type: ignore[misc]
        forward, _of_target(theta), has_aux=True
    )
    cotangents = [torch.ones_like(loss)] if task else []
    E: list[Tensor] = []
    if matching:
        T = outputs[len(cotangents) :]
        E, g_T, g_r, g_bias = ops.matching_gradient(
            T, batch.S, r, bias, batch.a, batch.source_of, learner.target_of, distances
        )
        cotangents = cotangents + g_T
    else:
        g_r, g_bias = [torch.zeros_like(w) for w in r], [torch.zeros_like(b) for b in bias]
    (g_target,) = pull(cotangents)
    grads = {
        **{f"target.{name}": g for name, g in g_target.items()},
        **{f"projections.{i}.weight": g_r[i] for i in pairs},
        **{f"projections.{i}.bias": g_bias[i] for i in pairs},
    }
    return Gradient(grads, loss, logits, E, buffers)


def sgd_step(theta: Theta, momentum: Theta, grads: Theta, lr: float, rule: SGD) -> tuple[Theta, Theta]:
    """g = ∇ + wd θ;  v' = μ v + g;  θ' = θ − α v'  (Nesterov: θ' = θ − α (g + μ v')), for every parameter."""
    names = list(theta)
    new = _SGDStep.apply(lr, rule, *theta.values(), *(momentum[n] for n in names), *(grads[n] for n in names))
    return dict(zip(names, new[: len(names)], strict=True)), dict(zip(names, new[len(names) :], strict=True))


class _SGDStep(torch.autograd.Function):
    """(α, rule, *θ, *v, *∇) -> (*θ', *v'), and its adjoint in as few passes over memory as the step itself."""

    @staticmethod
    def forward(lr: float, rule: SGD, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(tensors) // 3
        theta, v, g = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        g = torch._foreach_add(g, theta, alpha=rule.weight_decay)
        v = torch._foreach_add(g, v, alpha=rule.momentum)
        update = torch._foreach_add(g, v, alpha=rule.momentum) if rule.nesterov else v
        return *torch._foreach_add(theta, update, alpha=-lr), *v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.lr, ctx.rule, *tensors = inputs
        ctx.like = tensors[: len(tensors) // 3]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> Any:
        """q = u_v − α u_θ (Nesterov: u_v − α μ u_θ), ḡ = q (Nesterov: q − α u_θ); θ̄ = u_θ + wd ḡ, v̄ = μ q."""
        lr, rule, n = ctx.lr, ctx.rule, len(ctx.like)
        u_theta = [torch.zeros_like(p) if x is None else x for x, p in zip(u[:n], ctx.like, strict=True)]
        alpha = -lr * (rule.momentum if rule.nesterov else 1.0)
        if all(x is None for x in u[n:]):  # the last step: nothing reads its momentum
            q = torch._foreach_mul(u_theta, alpha)
        else:
            u_v = [torch.zeros_like(p) if x is None else x for x, p in zip(u[n:], ctx.like, strict=True)]
            q = torch._foreach_add(u_v, u_theta, alpha=alpha)
        g = torch._foreach_add(q, u_theta, alpha=-lr) if rule.nesterov else q
        if not any(ctx.needs_input_grad[2 : 2 + 2 * n]):  # the first step: its θ and v are constants
            return None, None, *([None] * (2 * n)), *g
        theta, v = torch._foreach_add(u_theta, g, alpha=rule.weight_decay), torch._foreach_mul(q, rule.momentum)
        return None, None, *theta, *v, *g


def task_loss(learner: L2T, theta: Theta, x: Tensor, y: Tensor) -> Tensor:
    """L_org of (x, y) at θ with batch statistics, differentiable in θ; no buffer of the target is touched."""
    buffers = {name: buffer.clone() for name, buffer in learner.target.named_buffers()}
    logits, _ = learner.target_outputs(x, {**_of_target(theta), **buffers})
    return F.cross_entropy(logits, y)


def _of_target(theta: Theta) -> dict[str, Tensor]:
    """The target's part of θ, by the target's own names."""
    prefix = "target."
    return {name.removeprefix(prefix): p for name, p in theta.items() if name.startswith(prefix)}
