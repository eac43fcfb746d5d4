"""The gradient that one inner step takes, as a pure function of θ.

θ is a dictionary: the target's trainable parameters ("target.NAME") and the projections r ("projections.I.weight",
"projections.I.bias"). Everything here can be differentiated again by plain autograd, and compiled.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels import ops
from l2t_fast.kernels.layers import cast
from l2t_fast.transfer import L2T

Theta = dict[str, Tensor]

_TARGET = "target."


class Batch(NamedTuple):
    """Images, labels, and what neither θ nor the step changes: source features and weights (kernels.ops)."""

    x: Tensor  # [B, C, H, W]; bfloat16 beside float32 parameters: computed in bfloat16
    y: Tensor  # [B]
    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]  # of each pair
    a: list[Tensor]  # [B, C_s] of each pair


class Gradient(NamedTuple):
    """∇θ of L_org, of L_wfm or of their sum, and what came with it."""

    theta: Theta  # without the parameters that the losses do not reach; in the dtype that was computed with
    loss: Tensor  # L_org, scalar
    logits: Tensor  # [B, classes]
    distances: list[Tensor]  # E [B, C_s] of each pair, where asked for
    buffers: dict[str, Tensor]  # those of the target after this forward pass


def parameters(learner: L2T) -> Theta:
    """θ: the parameters that are trained, the target's and those of the projections."""
    return {
        **{f"{_TARGET}{name}": p for name, p in learner.target.named_parameters() if p.requires_grad},
        **{f"projections.{name}": p for name, p in learner.projections.named_parameters()},
    }


def gradient(
    learner: L2T, theta: Theta, batch: Batch, *, task: bool, matching: bool, simulated: bool = True
) -> Gradient:
    """∇θ of L_org (`task`) and of L_wfm (`matching`), with batch statistics; no buffer of the target is touched.

    L_wfm enters by its gradient alone; only where the step is not `simulated` its value is wanted: the distances are
    returned then, and the buffers as the forward pass leaves them.
    """
    pairs = range(len(learner.pairs))
    matching = matching and len(pairs) > 0

    def forward(target: dict[str, Tensor]) -> tuple[list[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
        loss, logits, T, buffers = _outputs(learner, target, batch.x, batch.y, simulated)
        return [*([loss] if task else []), *(T if matching else [])], (loss, logits, buffers)

    outputs, pull, (loss, logits, buffers) = torch.func.vjp(  # type: ignore[misc]
        forward, _of_target(learner, theta, batch.x.dtype), has_aux=True
    )
    cotangents = [torch.ones_like(loss)] if task else []
    E: list[Tensor] = []
    grads: Theta = {}
    if matching:
        r, bias = [theta[f"projections.{i}.weight"] for i in pairs], [theta[f"projections.{i}.bias"] for i in pairs]
        E, g_T, g_r, g_bias = ops.matching_gradient(
            outputs[len(cotangents) :], batch.S, r, bias, batch.a, batch.source_of, learner.target_of, not simulated
        )
        cotangents = cotangents + g_T
        grads = {
            **{f"projections.{i}.weight": g_r[i] for i in pairs},
            **{f"projections.{i}.bias": g_bias[i] for i in pairs},
        }
    (g_target,) = pull(cotangents)
    # The frozen parameters that are computed with in bfloat16 come along, but are no part of θ.
    grads |= {f"{_TARGET}{name}": g for name, g in g_target.items() if f"{_TARGET}{name}" in theta}
    return Gradient(grads, loss, logits, E, buffers)


def task_loss(learner: L2T, theta: Theta, x: Tensor, y: Tensor) -> Tensor:
    """L_org of (x, y) at θ with batch statistics, differentiable in θ; no buffer of the target is touched."""
    return _outputs(learner, _of_target(learner, theta, x.dtype), x, y, simulated=True)[0]


def _outputs(
    learner: L2T, target: dict[str, Tensor], x: Tensor, y: Tensor, simulated: bool
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """(L_org, logits, T, the buffers after this pass, which were copied for it)."""
    buffers = {name: buffer.clone() for name, buffer in learner.running_buffers(simulated=simulated).items()}
    state = {**target, **buffers}
    logits, T = learner.target_outputs(x, state, simulated=simulated)
    logits = logits.to(torch.float32) if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits, y), logits, T, {name: state[name] for name in buffers}


def _of_target(learner: L2T, theta: Theta, dtype: torch.dtype) -> dict[str, Tensor]:
    """The target's part of θ, by the target's own names, as it is computed with on images of `dtype`."""
    target = {name.removeprefix(_TARGET): p for name, p in theta.items() if name.startswith(_TARGET)}
    if dtype == torch.bfloat16 and learner.half_target:
        wide = [target[name] if name in target else learner.target.get_parameter(name) for name in learner.half_target]
        target |= zip(learner.half_target, cast(dtype, *wide), strict=True)
    return target
