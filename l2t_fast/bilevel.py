"""The two schemes, and the exact derivative of L_meta through their simulated steps."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from l2t_fast import inner
from l2t_fast.inner import SGD, Batch, Theta
from l2t_fast.transfer import L2T

Scheme = Literal["transfer", "simulation"]
Memory = Literal["save", "recompute"]

Weights = list[Tensor]  # the weights a of all batches, one flat list
Step = Callable[[Theta, Theta, Weights], tuple[Theta, Theta]]
Outer = Callable[[Theta], Tensor]


def unroll(
    learner: L2T, scheme: Scheme, batches: Sequence[Batch], inner_steps: int, lr: float, rule: SGD
) -> list[Step]:
    """The simulated steps of one iteration (paper, algorithm 1).

    - "transfer": T steps on L_wfm ("knowledge transfer"), one on L_org ("one-step adaptation"), all on batches[0].
    - "simulation": T steps on L_org + L_wfm, the ordinary bilevel scheme, over the batches in turn.
    """
    if scheme == "transfer":
        kinds = [(0, False, True)] * inner_steps + [(0, True, False)]
    else:
        kinds = [(t % len(batches), True, True) for t in range(inner_steps)]
    pairs = len(learner.pairs)

    def step_of(index: int, task: bool, matching: bool) -> Step:
        def step(theta: Theta, momentum: Theta, a: Weights) -> tuple[Theta, Theta]:
            batch = batches[index]._replace(a=a[index * pairs : (index + 1) * pairs])
            grads = inner.gradient(learner, theta, batch, task=task, matching=matching).theta
            return inner.sgd_step(theta, momentum, grads, lr, rule)

        return step

    return [step_of(*kind) for kind in kinds]


def meta_gradient(
    steps: Sequence[Step], outer: Outer, theta: Theta, momentum: Theta, a: Weights, memory: Memory
) -> tuple[Tensor, Weights]:
    """(L_meta, dL_meta/da), exact to second order through all `steps`; θ and momentum stay as they are.

    The first step's θ is a constant, so that no Hessian product with respect to it is ever formed.
    """
    theta = {name: p.detach() for name, p in theta.items()}
    a = [a_p.detach().requires_grad_() for a_p in a]
    sweep = _keep_graph if memory == "save" else _recompute
    loss, grads = sweep(steps, outer, theta, momentum, a)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(a, grads, strict=True)]


def _keep_graph(
    steps: Sequence[Step], outer: Outer, theta: Theta, momentum: Theta, a: Weights
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Reverse over reverse, the activations of all steps kept."""
    with torch.enable_grad():
        for step in steps:
            theta, momentum = step(theta, momentum, a)
        loss = outer(theta)
    return loss, _grad([loss], a, [torch.ones_like(loss)])


def _recompute(
    steps: Sequence[Step], outer: Outer, theta: Theta, momentum: Theta, a: Weights
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The same with one step's activations at a time: each step is run again, from its saved start, when swept."""
    starts = []
    with torch.no_grad():
        for step in steps:
            starts.append((theta, momentum, _random_state(theta)))
            theta, momentum = step(theta, momentum, a)
    theta = _leaves(theta)
    with torch.enable_grad():
        loss = outer(theta)
    end = _random_state(theta)

    # u: cotangents of (θ, momentum) where the step ends.
    u = [*_grad([loss], list(theta.values()), [torch.ones_like(loss)]), *([None] * len(momentum))]
    total: list[Tensor | None] = [None] * len(a)
    for t, (theta, momentum, random) in reversed(list(enumerate(starts))):
        if t > 0:
            theta, momentum = _leaves(theta), _leaves(momentum)
        _set_random_state(random, theta)
        with torch.enable_grad():
            ends = steps[t](theta, momentum, a)
        outputs = [value for end_of in ends for value in end_of.values()]
        v = _grad(outputs, [*a, *([*theta.values(), *momentum.values()] if t > 0 else [])], u)
        total = [_plus(x, y) for x, y in zip(total, v[: len(a)], strict=True)]
        u = list(v[len(a) :])
    _set_random_state(end, theta)
    return loss, total


def _leaves(tensors: Theta) -> Theta:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _random_state(theta: Theta) -> list[Tensor]:
    """State of the generators that a forward pass may draw from (dropout), so that a replay draws the same."""
    device = next(iter(theta.values())).device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], theta: Theta) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], next(iter(theta.values())).device)


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad`, where outputs that depend on no input, or that nothing depends on, count for nothing."""
    used = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad and cotangent is not None
    ]
    if not used or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


def _plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x if y is None else y if x is None else x + y
