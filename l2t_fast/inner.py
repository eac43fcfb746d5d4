"""One inner step as a pure function: (θ, momentum) -> (θ, momentum).

θ is a flat list: the target's trainable parameters, then the weights of the projections r, then their biases.
Everything here can be differentiated again by plain autograd, and compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels import ops
from l2t_fast.transfer import L2T

Theta = list[Tensor]


@dataclass(frozen=True)
class SGD:
    """The rule of `torch.optim.SGD` (dampening 0); its learning rate is given at each step."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False


class Batch(NamedTuple):
    """Images, labels, and what neither θ nor the step changes: source features S and weights a (see kernels.ops)."""

    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B]
    S: list[Tensor]
    a: list[Tensor]


class Gradient(NamedTuple):
    """∇θ of L_org, of L_wfm or of their sum, and what came with it."""

    theta: Theta
    loss: Tensor  # L_org, scalar
    logits: Tensor  # [B, classes]
    distances: list[Tensor]  # E [B, C_s] of each pair, where asked for
    buffers: dict[str, Tensor]  # those of the target after this forward pass


def parameters(learner: L2T) -> dict[str, Tensor]:
    """θ by name, in the order of the flat list."""
    target = {f"target.{name}": p for name, p in learner.target.named_parameters() if p.requires_grad}
    weights, biases = learner.projection_tensors()
    return {
        **target,
        **{f"projections.{i}.weight": weight for i, weight in enumerate(weights)},
        **{f"projections.{i}.bias": bias for i, bias in enumerate(biases)},
    }


def gradient(
    learner: L2T, theta: Theta, batch: Batch, *, task: bool, matching: bool, distances: bool = False
) -> Gradient:
    """∇θ of L_org (`task`) and of L_wfm (`matching`), with batch statistics; no buffer of the target is touched.

    L_wfm enters by its gradient alone (design: only the real step and the log want its value).
    """
    pairs = len(learner.pairs)
    names = [name for name, p in learner.target.named_parameters() if p.requires_grad]
    target = dict(zip(names, theta[: len(names)], strict=True))
    r, bias = theta[len(names) : len(names) + pairs], theta[len(names) + pairs :]
    matching = matching and pairs > 0

    def forward(target: dict[str, Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
        buffers = {name: buffer.clone() for name, buffer in learner.target.named_buffers()}
        state = {**target, **buffers}
        logits, T = learner.target_outputs(batch.x, state)
        loss = F.cross_entropy(logits, batch.y)
        wanted = [*([loss] if task else []), *(T if matching else [])]
        return wanted, (loss, logits, {name: state[name] for name in buffers})

    outputs, pull, (loss, logits, buffers) = torch.func.vjp(forward, target, has_aux=True)  # type: ignore[misc]
    cotangents = [torch.ones_like(loss)] if task else []
    E: list[Tensor] = []
    if matching:
        T = outputs[len(cotangents) :]
        E, g_T, g_r, g_bias = ops.matching_gradient(
            T, batch.S, r, bias, batch.a, learner.source_of, learner.target_of, distances
        )
        cotangents = cotangents + g_T
    else:
        g_r, g_bias = [torch.zeros_like(w) for w in r], [torch.zeros_like(b) for b in bias]
    (g_target,) = pull(cotangents)
    return Gradient([*g_target.values(), *g_r, *g_bias], loss, logits, E, buffers)


def sgd_step(theta: Theta, momentum: Theta, grads: Theta, lr: float, rule: SGD) -> tuple[Theta, Theta]:
    """g = ∇ + wd θ;  v' = μ v + g;  θ' = θ − α v'  (Nesterov: θ' = θ − α (g + μ v')), for every parameter."""
    g = torch._foreach_add(grads, theta, alpha=rule.weight_decay) if rule.weight_decay else tuple(grads)
    v = torch._foreach_add(g, momentum, alpha=rule.momentum) if rule.momentum else g
    update = torch._foreach_add(g, v, alpha=rule.momentum) if rule.nesterov else v
    return list(torch._foreach_add(theta, update, alpha=-lr)), list(v)


def task_loss(learner: L2T, theta: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """L_org of (x, y) at θ with batch statistics, differentiable in θ; no buffer of the target is touched."""
    names = [name for name, p in learner.target.named_parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.target.named_buffers()}
    logits, _ = learner.target_outputs(x, {**dict(zip(names, theta[: len(names)], strict=True)), **buffers})
    return F.cross_entropy(logits, y)
