"""The two schemes, and the exact derivative of L_meta through their simulated steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from l2t_fast.choices import Memory, Scheme
from l2t_fast.engine.inner_step import Theta
from l2t_fast.engine.shards import WHOLE, Part, Shards
from l2t_fast.engine.update import Kept, Update
from l2t_fast.kernels.layers.autograd import zeros_left_out
from l2t_fast.learner.hooks import sweeping

Outer = Callable[[int, Theta], Tensor]  # (part, θ) -> ω L_meta


class Kind(NamedTuple):
    """What a simulated step descends on: L_org (`task`), L_wfm (`matching`) or both, of batches[batch]."""

    batch: int
    task: bool
    matching: bool


# (kind, part, θ, a of the part of the kind's batch) -> ω ∇θ, without the parameters that the losses do not reach.
StepGradient = Callable[[Kind, int, Theta, list[Tensor]], Theta]


def simulated_steps(scheme: Scheme, batches: int, inner_steps: int) -> list[Kind]:
    """The simulated steps of one iteration (paper, algorithm 1).

    - "transfer": T steps on L_wfm ("knowledge transfer"), one on L_org ("one-step adaptation"), all on batch 0.
    - "simulation": T steps on L_org + L_wfm, the ordinary bilevel scheme, over the batches in turn.
    """
    if scheme == "transfer":
        return [Kind(0, task=False, matching=True)] * inner_steps + [Kind(0, task=True, matching=False)]
    return [Kind(t % batches, task=True, matching=True) for t in range(inner_steps)]


class Surroundings(Protocol):
    """What a simulated pass reads and changes beside θ: buffers, Python attributes, random generators."""

    def read(self) -> Any:
        """As they are."""

    def put_back(self, state: Any) -> None:
        """What `read` gave."""


class _Step(NamedTuple):
    """A simulated step, ready to be swept backwards."""

    theta: Theta  # at its start; leaves of autograd, those that depend on a as variables
    dtypes: dict[str, torch.dtype]  # of ∇θ there
    kept: Kept | None  # what the adjoint of the update reads
    # of each part:
    g: list[dict[str, GradientEdge]]  # the ends of the graph of ∇θ, whose values are used up; none when recomputed
    surroundings: list[Any]  # at its start, when recomputed


@torch.no_grad()
def meta_gradient(
    kinds: Sequence[Kind],
    gradient: StepGradient,
    outer: Outer,
    theta: Theta,
    state: list[Tensor],
    a: Sequence[Sequence[Sequence[Tensor]]],
    update: Update,
    memory: Memory,
    surroundings: Sequence[Surroundings] = (),
    shards: Shards = WHOLE,
) -> tuple[Tensor, list[list[list[Tensor]]]]:
    """(L_meta, dL_meta/da), exact to second order through all steps; θ and the optimizer's state stay as they are.

    a: of each part here, of each batch, a [B, C_s] for each pair. Reverse over reverse: each step's gradient is a graph
    of its own from its θ and a, and the update between two of them is stepped and swept by hand, in one pass over
    memory each. The first step's θ is a constant, so that no Hessian product with respect to it is ever formed. With
    "save" the graphs of all steps are kept, with "recompute", and where there are several micro-batches, each is built
    once more when it is swept, in the `surroundings` (of each part) that it had. Of the parts of the joined batch
    (`shards.py`) all ranks sum ∇θ, J^T ḡ and L_meta, and update on the sums; dL_meta/da is that of the parts here.
    """
    names = list(theta)
    coefficients = [[[a_p.detach().requires_grad_() for a_p in of_batch] for of_batch in part] for part in a]
    total: list[list[list[Tensor | None]]] = [[[None] * len(of_batch) for of_batch in part] for part in a]
    keep = memory == "save" and shards.count == 1
    arounds = () if keep else surroundings

    steps, theta = _unroll(kinds, gradient, theta, state, coefficients, update, keep, arounds, shards)
    loss: Tensor | None = None
    u: Part | None = None
    end: list[Any] = []
    for part in range(len(a)):
        with torch.enable_grad():
            of_part = outer(part, theta)
        end = [around.read() for around in arounds]
        ones = {"loss": torch.ones_like(of_part)}
        u = shards.plus(u, _grad(_edges({"loss": of_part}), list(theta.values()), ones), list(theta.values()))
        loss = of_part.detach() if loss is None else loss + of_part.detach()
        del of_part
    assert u is not None
    assert loss is not None
    # u: cotangents of θ and of the optimizer's state where a step ends; both are overwritten as the sweep goes on.
    *u, meta_loss = shards.over_ranks([*u, loss], [*theta.values(), loss])
    u_theta = _owned(u, list(theta.values()))
    u_state: list[Tensor] | None = None
    while steps:
        step = steps.pop()
        kind, theta = kinds[len(steps)], step.theta
        dtypes = [step.dtypes.get(name) for name in names]
        cotangents, u_state = update.adjoint_(u_theta, u_state, dtypes, step.kept)
        g_bar = dict(zip(names, cotangents, strict=True))
        of_theta: Part | None = None
        for part in range(len(a)):
            of_batch, sums = coefficients[part][kind.batch], total[part][kind.batch]
            if keep:
                g = step.g[part]
            else:
                for around in arounds[part : part + 1]:
                    around.put_back(step.surroundings[part])
                with torch.enable_grad():
                    g = _edges(gradient(kind, part, theta, of_batch))
            v = _grad(g, [*of_batch, *theta.values()], g_bar)
            total[part][kind.batch] = _plus(sums, v[: len(sums)])
            of_theta = shards.plus(of_theta, v[len(sums) :], u_theta)
            del g, v
        assert of_theta is not None
        if steps:  # the first step's θ is a constant
            of_theta = shards.over_ranks(of_theta, u_theta)
        v_theta = [(u, x) for u, x in zip(u_theta, of_theta, strict=True) if x is not None]
        if v_theta:
            torch._foreach_add_([u for u, _ in v_theta], [x for _, x in v_theta])
        del step, of_theta, v_theta  # before the next step's are made
    for around, state in zip(arounds, end, strict=True):
        around.put_back(state)
    grads_a = [
        [
            [torch.zeros_like(p) if x is None else x for p, x in zip(of_batch, sums, strict=True)]
            for of_batch, sums in zip(part, sums_of_part, strict=True)
        ]
        for part, sums_of_part in zip(a, total, strict=True)
    ]
    assert meta_loss is not None
    return meta_loss, grads_a


def _unroll(
    kinds: Sequence[Kind],
    gradient: StepGradient,
    theta: Theta,
    state: list[Tensor],
    coefficients: Sequence[Sequence[list[Tensor]]],
    update: Update,
    keep: bool,
    arounds: Sequence[Surroundings],
    shards: Shards,
) -> tuple[list[_Step], Theta]:
    """(the steps, θ after them as leaves of autograd); the graphs of the steps are built, and kept if `keep`."""
    theta = {name: p.detach() for name, p in theta.items()}
    steps: list[_Step] = []
    reached: set[str] = set()  # parameters that depend on a by now; none in the first step
    like = list(theta.values())
    for kind in kinds:
        start = {name: p.requires_grad_(name in reached) for name, p in theta.items()}
        edges: list[dict[str, GradientEdge]] = []
        surroundings: list[Any] = []
        dtypes: dict[str, torch.dtype] = {}
        found: set[str] = set()
        total: Part | None = None
        for part, of_part in enumerate(coefficients):
            surroundings.extend(around.read() for around in arounds[part : part + 1])
            with torch.enable_grad():
                g = gradient(kind, part, start, of_part[kind.batch])
            dtypes.update((name, x.dtype) for name, x in g.items())
            edges.append(_edges(g) if keep else {})
            found.update(name for name, x in g.items() if x.requires_grad)
            total = shards.plus(total, [g.get(name) for name in theta], like)
            del g  # and with it, unless it is kept, the graph
        assert total is not None
        total = shards.over_ranks(total, like)
        if shards.group is not None:  # other ranks' gradients may have reached what none here did
            dtypes = {name: dtypes.get(name, p.dtype) for name, p in theta.items()}
        reached |= set(theta) if shards.group is not None or (found and update.mixes) else found
        moved, state, kept = update.step(list(theta.values()), state, total)
        steps.append(_Step(start, dtypes, kept, edges, surroundings))
        del total
        theta = dict(zip(theta, moved, strict=True))
    return steps, {name: p.requires_grad_(name in reached) for name, p in theta.items()}


def _edges(tensors: Mapping[str, Tensor]) -> dict[str, GradientEdge]:
    """Where the graphs of those end that are no constants."""
    return {name: get_gradient_edge(x) for name, x in tensors.items() if x.requires_grad}


def _grad(
    outputs: Mapping[str, GradientEdge], inputs: Sequence[Tensor], cotangents: Mapping[str, Tensor | None]
) -> list[Tensor | None]:
    """`torch.autograd.grad` without the hooks of modules; None for a constant, or what no output depends on."""
    variables = [x for x in inputs if x.requires_grad]
    if not outputs or not variables:
        return [None] * len(inputs)
    with sweeping(), zeros_left_out():
        ends, us = list(outputs.values()), [cotangents[name] for name in outputs]
        grads = iter(torch.autograd.grad(ends, variables, us, allow_unused=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


def _owned(cotangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The cotangents as tensors that may be overwritten, laid out in memory as `like`; zeros where there is none."""
    owned: list[Tensor] = []
    storages: set[int] = set()
    for u, p in zip(cotangents, like, strict=True):
        mine = u is not None and u.stride() == p.stride() and u.untyped_storage()._cdata not in storages
        owned.append(u if u is not None and mine else torch.empty_like(p))
        storages.add(owned[-1].untyped_storage()._cdata)
    none = [x for x, u in zip(owned, cotangents, strict=True) if u is None]
    if none:
        torch._foreach_zero_(none)
    for x, u in zip(owned, cotangents, strict=True):
        if u is not None and x is not u:
            x.copy_(u)
    return owned


def _plus(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums, in one launch; None is zero."""
    two = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    sums = iter(torch._foreach_add([x for x, _ in two], [y for _, y in two]) if two else ())
    return [y if x is None else x if y is None else next(sums) for x, y in zip(xs, ys, strict=True)]
