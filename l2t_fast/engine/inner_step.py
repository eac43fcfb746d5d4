"""The gradient that one inner step takes, as a pure function of θ.

θ is a dictionary: the target's trainable parameters ("target.NAME"), the projections r ("projections.I.weight",
"projections.I.bias") and the parameters of terms ("terms.I.NAME"). Everything here can be differentiated again by plain
autograd, and compiled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels.layers.autograd import cast
from l2t_fast.kernels.matching import ops
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.taps import Outputs

Theta = dict[str, Tensor]

_TARGET, _TERMS = "target.", "terms."


class Batch(NamedTuple):
    """Images, labels, and what neither θ nor the step changes: source features and weights (kernels.ops)."""

    x: Tensor  # [B, C, H, W]; bfloat16 beside float32 parameters: computed in bfloat16
    y: Tensor  # [B]
    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]  # of each pair
    a: list[Tensor]  # [B, C_s] of each pair
    given: Sequence[list[Tensor]] = ()  # what each term keeps of the sources


class Gradient(NamedTuple):
    """∇θ of L_org, of L_wfm or of their sum, and what came with it."""

    theta: Theta  # without the parameters that the losses do not reach; in the dtype that was computed with
    loss: Tensor  # L_org, scalar
    logits: Tensor  # [B, classes]
    distances: list[Tensor]  # E [B, C_s] of each pair, where asked for
    terms: list[Tensor]  # value of each term, scalars, where it entered
    buffers: dict[str, Tensor]  # those of the target after this forward pass


# (losses and T, (L_org, logits, terms, buffers)); named, since Dynamo cannot build such an annotation.
_Forward = tuple[list[Tensor], tuple[Tensor, Tensor, list[Tensor], Theta]]


def parameters(learner: L2T) -> Theta:
    """θ: the parameters that are trained, the target's, those of the projections and of the terms."""
    return {
        **{f"{_TARGET}{name}": p for name, p in learner.target.named_parameters() if p.requires_grad},
        **{f"projections.{name}": p for name, p in learner.projections.named_parameters()},
        **{f"{_TERMS}{name}": p for name, p in learner.terms.named_parameters()},
    }


def gradient(
    learner: L2T, theta: Theta, batch: Batch, *, task: bool, matching: bool, simulated: bool = True
) -> Gradient:
    """∇θ of L_org (`task`) and of L_wfm (`matching`), with batch statistics; no buffer of the target is touched.

    Both together are L_total, which has the terms too. L_wfm enters by its gradient alone; only where the step is not
    `simulated` its value is wanted: the distances are returned then, and the buffers as the forward pass leaves them.
    """
    pairs = range(len(learner.pairs))
    total = task and matching
    matching = matching and len(pairs) > 0

    def forward(target: Theta, heads: Theta) -> _Forward:
        loss, outputs, buffers = _outputs(learner, target, batch.x, batch.y, simulated)
        values = _terms(learner, target, heads, batch, outputs) if total else []
        T = learner.paired(outputs) if matching else []
        assert outputs.logits is not None
        return [*([sum(values, loss)] if task else []), *T], (loss, outputs.logits, values, buffers)

    heads = {name.removeprefix(_TERMS): p for name, p in theta.items() if name.startswith(_TERMS)} if total else {}
    outputs, pull, (loss, logits, values, buffers) = torch.func.vjp(  # type: ignore[misc]
        forward, _of_target(learner, theta, batch.x.dtype), heads, has_aux=True
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
    g_target, g_heads = pull(cotangents)
    # The frozen parameters that are computed with in bfloat16 come along, but are no part of θ.
    grads |= {f"{_TARGET}{name}": g for name, g in g_target.items() if f"{_TARGET}{name}" in theta}
    grads |= {f"{_TERMS}{name}": g for name, g in g_heads.items()}
    return Gradient(grads, loss, logits, E, values, buffers)


def task_loss(learner: L2T, theta: Theta, x: Tensor, y: Tensor) -> Tensor:
    """L_org of (x, y) at θ with batch statistics, differentiable in θ; no buffer of the target is touched."""
    return _outputs(learner, _of_target(learner, theta, x.dtype), x, y, simulated=True)[0]


def _outputs(learner: L2T, target: Theta, x: Tensor, y: Tensor, simulated: bool) -> tuple[Tensor, Outputs, Theta]:
    """(L_org, the target's outputs, the buffers after this pass, which were copied for it)."""
    outputs, buffers = _run(learner, target, x, simulated)
    assert outputs.logits is not None
    return F.cross_entropy(outputs.logits, y), outputs, buffers


def _run(learner: L2T, target: Theta, x: Tensor, simulated: bool) -> tuple[Outputs, Theta]:
    buffers = {name: buffer.clone() for name, buffer in learner.running_buffers(simulated=simulated).items()}
    state = {**target, **buffers}
    outputs = learner.all_target_outputs(x, state, simulated=simulated)
    if outputs.logits is not None and outputs.logits.dtype == torch.bfloat16:
        outputs = outputs._replace(logits=outputs.logits.float())
    return outputs, {name: state[name] for name in buffers}


def _terms(learner: L2T, target: Theta, heads: Theta, batch: Batch, outputs: Outputs) -> list[Tensor]:
    """The value of each term."""
    values: list[Tensor] = []
    for i, (term, given) in enumerate(zip(learner.terms, batch.given, strict=True)):
        own = {name.removeprefix(f"{i}."): p for name, p in heads.items() if name.startswith(f"{i}.")}
        arguments = (given, batch.x, outputs, lambda x: _run(learner, target, x, simulated=True)[0])
        values.append(torch.func.functional_call(term, own, arguments))
    return values


def _of_target(learner: L2T, theta: Theta, dtype: torch.dtype) -> dict[str, Tensor]:
    """The target's part of θ, by the target's own names, as it is computed with on images of `dtype`."""
    target = {name.removeprefix(_TARGET): p for name, p in theta.items() if name.startswith(_TARGET)}
    if dtype == torch.bfloat16 and learner.half_target:
        wide = [target[name] if name in target else learner.target.get_parameter(name) for name in learner.half_target]
        target |= zip(learner.half_target, cast(dtype, *wide), strict=True)
    return target
