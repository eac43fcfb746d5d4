"""The gradient that one inner step takes, as a function of θ.

θ is a dictionary: the target's trainable parameters ("target.NAME"), the projections r ("projections.I.weight",
"projections.I.bias") and the parameters of terms ("terms.I.NAME"). Everything here can be differentiated again by plain
autograd; on traced networks it can be compiled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.errors import L2TError, first_line
from l2t_fast.kernels.beside import joined
from l2t_fast.kernels.layers.autograd import constant_primals, differentiated_once, zeros_left_out
from l2t_fast.kernels.matching import ops
from l2t_fast.learner.attributes import apart, read_attributes, set_attributes
from l2t_fast.learner.hooks import act_on_gradients
from l2t_fast.learner.learner import L2T, Networks
from l2t_fast.learner.network import Outputs, Runs
from l2t_fast.learner.places import buffers_of
from l2t_fast.learner.reach import nodes_of

Theta = dict[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]  # (outputs [B, ...], labels [B, ...]) -> scalar

_TARGET, _TERMS = "target.", "terms."


class StepInput(NamedTuple):
    """Images, labels, and what neither θ nor the step changes: source features and coefficients."""

    x: Tensor  # [B, C, H, W]; bfloat16 beside float32 parameters: computed in bfloat16
    y: Tensor  # [B], or what else the loss takes
    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]  # of each pair
    a: list[Tensor]  # [B, C_s] of each pair
    kept: Sequence[list[Tensor]] = ()  # what each term keeps of the sources
    weight: Tensor | None = None  # ω of a part of a batch (`shards.py`), a scalar; a has it already


class Gradient(NamedTuple):
    """∇θ of L_org, of L_wfm or of their sum, and what came with it."""

    theta: Theta  # without the parameters that the losses do not reach; in the dtype that was computed with
    loss: Tensor  # L_org, scalar
    logits: Tensor  # [B, classes], or what else the target returns
    distances: list[Tensor]  # E [B, C_s] of each pair, where asked for
    terms: list[Tensor]  # value of each term, scalars, where it entered
    buffers: dict[str, Tensor]  # what the forward pass left in the places of the buffers that were given to it


# (losses and T, (L_org, logits, terms, buffers)); named, since Dynamo cannot build such an annotation.
_Forward = tuple[list[Tensor], tuple[Tensor, Tensor, list[Tensor], Theta]]


def parameters(learner: L2T) -> Theta:
    """θ: the parameters that are trained, the target's, those of the projections and of the terms."""
    return {
        **{f"{_TARGET}{name}": p for name, p in learner.target.named_parameters() if p.requires_grad},
        **{f"projections.{name}": p for name, p in learner.projections.named_parameters() if p.requires_grad},
        **{f"{_TERMS}{name}": p for name, p in learner.terms.named_parameters() if p.requires_grad},
    }


def gradient(
    learner: L2T,
    theta: Theta,
    batch: StepInput,
    *,
    task: bool,
    matching: bool,
    simulated: bool = True,
    buffers: Mapping[str, Tensor] | None = None,
    networks: Networks | None = None,
    loss_function: LossFunction = F.cross_entropy,
) -> Gradient:
    """∇θ of L_org (`task`) and of L_wfm (`matching`), with what the target's modes and hooks make of it.

    Both together are L_total, which has the terms too. L_wfm enters by its gradient alone; only where the step is not
    `simulated` its value is wanted, and the distances are returned. `buffers` of the target are copied, and the copies
    stand in their places; without any, the pass changes the target's own.
    """
    networks = networks or learner.networks
    pairs = range(len(learner.pairs))
    total = task and matching
    matching = matching and len(pairs) > 0

    def forward(target: Theta, heads: Theta) -> _Forward:
        copies = _copies(buffers)
        outputs, loss, logits = _outputs(networks.target, target, copies, batch.x, batch.y, loss_function, simulated)
        if not networks.traced:
            joined(batch.x)  # what follows reads what the source pass made
        values = _terms(learner, networks.target, target, copies, heads, batch, outputs) if total else []
        T = learner.paired(outputs) if matching else []
        return [*([sum(values, loss)] if task else []), *T], (loss, logits, values, copies)

    heads = {name.removeprefix(_TERMS): p for name, p in theta.items() if name.startswith(_TERMS)} if total else {}
    of_target = _of_target(networks.target, theta, batch.x.dtype)
    constant = not any(p.requires_grad for p in theta.values())
    pull: Any
    if networks.traced:
        outputs, pull, auxiliary = torch.func.vjp(forward, of_target, heads, has_aux=True)  # type: ignore[misc]
    else:
        with nullcontext() if torch.is_grad_enabled() else differentiated_once():
            pull = _PullBack(forward, of_target, heads, constant)
        outputs, auxiliary = pull.outputs, pull.auxiliary
    loss, logits, values, after = auxiliary
    weight = batch.weight
    cotangents = [torch.ones_like(loss) if weight is None else weight.to(loss.dtype)] if task else []
    T = outputs[len(cotangents) :]
    E: list[Tensor] = []
    grads: Theta = {}
    if matching:
        r, bias = ([_of_projection(learner, theta, i, part) for i in pairs] for part in ("weight", "bias"))
        # Where θ is a constant, so is T to whoever differentiates this.
        points = [t.detach() for t in T] if constant and not networks.traced else T
        E, g_T, g_r, g_bias = ops.matching_gradient(
            points, batch.S, r, bias, batch.a, batch.source_of, learner.target_of, not simulated
        )
        cotangents = cotangents + g_T
        grads = {
            **{f"projections.{i}.weight": g_r[i] for i in pairs},
            **{f"projections.{i}.bias": g_bias[i] for i in pairs},
        }
        grads = {name: g for name, g in grads.items() if name in theta}
    hooks = not networks.traced and act_on_gradients(learner.target)
    with _seen_by_hooks(learner, theta, of_target, after) if hooks else nullcontext():
        g_target, g_heads = pull(cotangents)
        # The frozen parameters that are computed with in bfloat16 come along, but are no part of θ.
        grads |= {f"{_TARGET}{name}": g for name, g in g_target.items() if f"{_TARGET}{name}" in theta}
        grads |= {f"{_TERMS}{name}": g for name, g in g_heads.items()}
        if not networks.traced and constant and task and torch.is_grad_enabled():
            # What cross entropy alone reaches depends on no a.
            of_T = {f"{_TARGET}{name}" for name in _upstream(T, pull.target)}
            of_matching = of_T | {name for name in grads if name.startswith("projections.")}
            grads = {name: g if name in of_matching else g.detach() for name, g in grads.items()}
        if hooks:
            grads = {name: _hooked(learner, name, g) for name, g in grads.items()}
            _check_hooks(learner, grads)
    if not networks.traced:
        loss, logits, values = loss.detach(), logits.detach(), [value.detach() for value in values]
        after = {name: buffer.detach() for name, buffer in after.items()}
    return Gradient(grads, loss, logits, E, values, after)


def task_loss(
    learner: L2T,
    theta: Theta,
    x: Tensor,
    y: Tensor,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    networks: Networks | None = None,
    loss_function: LossFunction = F.cross_entropy,
) -> Tensor:
    """L_org of (x, y) at θ, differentiable in θ once; `buffers` of the target are copied for it."""
    networks = networks or learner.networks
    target = _of_target(networks.target, theta, x.dtype)
    with nullcontext() if networks.traced else differentiated_once():
        return _outputs(networks.target, target, _copies(buffers), x, y, loss_function, simulated=True)[1]


def _copies(buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in (buffers or {}).items()}


def _outputs(
    network: Runs,
    target: Theta,
    buffers: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    loss_function: LossFunction,
    simulated: bool,
) -> tuple[Outputs, Tensor, Tensor]:
    """(the target's outputs, L_org, the logits)."""
    outputs = network.run(x, target, buffers, simulated=simulated)
    assert outputs.logits is not None
    logits = outputs.logits.float() if outputs.logits.dtype == torch.bfloat16 else outputs.logits
    return outputs, loss_function(logits, y), logits


def _terms(
    learner: L2T,
    network: Runs,
    target: Theta,
    buffers: Mapping[str, Tensor],
    heads: Theta,
    batch: StepInput,
    outputs: Outputs,
) -> list[Tensor]:
    """The value of each term."""

    def run(x: Tensor) -> Outputs:
        """Leaves buffers and attributes as the first pass left them."""
        if network is not learner.target_network:
            return network.run(x, target, _copies(buffers), simulated=True)
        own = {**buffers_of(learner.target, learner.target_network.leaves_alone), **buffers}
        attributes = read_attributes(learner.target)
        set_attributes(apart(attributes))
        try:
            return network.run(x, target, _copies(own), simulated=True)
        finally:
            set_attributes(attributes)

    values: list[Tensor] = []
    for i, (term, kept) in enumerate(zip(learner.terms, batch.kept, strict=True)):
        own = {name.removeprefix(f"{i}."): p for name, p in heads.items() if name.startswith(f"{i}.")}
        values.append(torch.func.functional_call(term, own, (kept, batch.x, outputs, run)))
    return values


def _of_projection(learner: L2T, theta: Theta, i: int, part: str) -> Tensor:
    """A parameter of r: θ's, or where it is frozen the projection's own."""
    name = f"projections.{i}.{part}"
    return theta[name] if name in theta else learner.projections[i].get_parameter(part).detach()


def _of_target(network: Runs, theta: Theta, dtype: torch.dtype) -> Theta:
    """The target's part of θ, by the target's own names, as it is computed with on images of `dtype`."""
    target = {name.removeprefix(_TARGET): p for name, p in theta.items() if name.startswith(_TARGET)}
    return network.in_precision(dtype, target)


class _PullBack:
    """`torch.func.vjp` with auxiliary outputs by plain autograd, under which any Python runs as it always does.

    constant: nobody will differentiate what it gives with respect to θ. Called with the cotangents of `outputs`, it
    leaves out what these do not reach; it is differentiable where gradients are enabled.
    """

    def __init__(
        self, forward: Callable[[Theta, Theta], _Forward], target: Theta, heads: Theta, constant: bool
    ) -> None:
        self._constant = constant
        self.target, self.heads = _variables(target), _variables(heads)
        with torch.enable_grad():
            self.outputs, self.auxiliary = forward(self.target, self.heads)

    def __call__(self, cotangents: list[Tensor]) -> tuple[Theta, Theta]:
        reached = [(y, u) for y, u in zip(self.outputs, cotangents, strict=True) if y.requires_grad]
        inputs = [*self.target.values(), *self.heads.values()]
        found: Sequence[Any] = [None] * len(inputs)
        if reached and inputs:
            ys, us = zip(*reached, strict=True)
            with zeros_left_out(), constant_primals() if self._constant else nullcontext():
                found = torch.autograd.grad(ys, inputs, us, create_graph=torch.is_grad_enabled(), allow_unused=True)
        grads = iter(found)
        ours, theirs = ({name: next(grads) for name in tensors} for tensors in (self.target, self.heads))
        return _given(ours), _given(theirs)


def _variables(tensors: Theta) -> Theta:
    return {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in tensors.items()}


def _upstream(outputs: Sequence[Tensor], leaves: Theta) -> set[str]:
    """The names of the leaves of autograd that the outputs depend on."""
    names = {id(p): name for name, p in leaves.items()}
    reached = {id(getattr(node, "variable", None)) for node in nodes_of(outputs)}
    return {names[leaf] for leaf in names.keys() & reached}


def _given(grads: Mapping[str, Tensor | None]) -> Theta:
    return {name: g for name, g in grads.items() if g is not None}


@contextmanager
def _seen_by_hooks(learner: L2T, theta: Theta, of_target: Theta, buffers: dict[str, Tensor]) -> Iterator[None]:
    """The target as hooks of a step's gradient are to see it: at the step's θ, with the buffers of its forward pass.

    A parameter that has hooks stays in its place, where these may look for themselves.
    """
    places = learner.target_network.places
    values = {name.removeprefix(_TARGET): p for name, p in theta.items() if name.startswith(_TARGET)}
    others = {name: p for name, p in of_target.items() if not places.parameters[name]._backward_hooks}
    with places.valued(values), places.holding(others, buffers):
        yield


def _check_hooks(learner: L2T, grads: Theta) -> None:
    """Raises L2TError where a hook has made a gradient depend on a parameter itself, not on what stands in for it."""
    own = {id(p): name for name, p in learner.target_network.parameters.items()}
    ends = [g for g in grads.values() if g.requires_grad]
    for node in nodes_of(ends):
        if (name := own.get(id(getattr(node, "variable", None)))) is not None:
            raise L2TError(
                f"a hook makes a gradient of parameter '{name}' itself, whose own derivative would be lost: let it use "
                "p.detach()."
            )


def _hooked(learner: L2T, name: str, g: Tensor) -> Tensor:
    """What the hooks of the user's parameter make of its gradient.

    Raises:
        L2TError: a hook that fails, or gives another shape or dtype.
    """
    p = learner.networks.target.parameters.get(name.removeprefix(_TARGET)) if name.startswith(_TARGET) else None
    if p is None or not p._backward_hooks:
        return g
    for hook in list(p._backward_hooks.values()):
        try:
            changed = hook(g)
        except Exception as error:  # whatever a hook may raise
            line = first_line(error)
            raise L2TError(f"a hook of '{name}' fails on its gradient alone ({line}): take it away.") from error
        if changed is not None and (changed.shape, changed.dtype) != (g.shape, g.dtype):
            raise L2TError(
                f"a hook of '{name}' makes {changed.dtype} {list(changed.shape)} of a gradient {g.dtype} "
                f"{list(g.shape)}: keep its shape and dtype."
            )
        g = g if changed is None else changed
    return g
