"""Whether a network reads its parameters from their places, and nothing but what can be put back decides what it gives.

A simulated step puts other tensors in the places of the parameters. A network that reaches one by another way (a
closure, a tuple, a graph made before) would compute with the wrong value there, or lose its gradient, without a sign of
it. So it runs once with stand-ins of the same values, and once more while the parameters themselves are NaN.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l2t_fast.errors import L2TError, first_line
from l2t_fast.learner.alike import alike, unordered
from l2t_fast.learner.attributes import read_attributes
from l2t_fast.learner.hooks import act_on_gradients, sweeping
from l2t_fast.learner.network import Network
from l2t_fast.learner.places import buffers_of
from l2t_fast.learner.undisturbed import undisturbed

_SCALE = 100.0  # of parameters that show a forward pass that clips them
_ROUNDED = 1e-2  # relative: BatchNorms of few values magnify a last bit; poison shows as NaN


def check_reach(network: Network, x: Tensor, *, again: bool) -> None:
    """Runs the network on images x [B, C, H, W], of which only the shape matters; finds `statistics_matter`.

    again: whether passes are to be repeated, so that two from one state must give the same.

    Raises:
        L2TError: a parameter that requires a gradient is reached by another way than through its module, or written to
            in the forward pass; two passes from one state differ.
    """
    names = [name for name, p in network.parameters.items() if p.requires_grad]
    found = _pass(network, x, names)
    _check_unwritten(network, x, names)
    network.statistics_matter = False
    network.statistics_matter = act_on_gradients(network.module) or _statistics_matter(network, x, found)
    _check_buffers(network, x, names, found)
    if _same(found, _pass_or_none(network, x, names, names)):
        return
    if not _same(found, _pass_or_none(network, x, names, [])):
        if not again:
            return
        raise L2TError(
            f"the {network.role} computes something else each time, even from one state: keep what its forward pass "
            "changes or draws from in buffers or attributes of its modules, so that it can be put back."
        )
    for name in names:
        if not _same(found, _pass_or_none(network, x, names, [name])):
            raise _around(name, network.role)


def _check_buffers(network: Network, x: Tensor, names: Sequence[str], found: Sequence[Tensor]) -> None:
    """Raises L2TError where a buffer is read by another way than through its module.

    Those of BatchNorms that leave theirs alone are `_statistics_matter`'s.
    """
    own = [name for name, b in buffers_of(network.module, network.leaves_alone).items() if b.is_floating_point()]
    if not own or _same(found, _pass_or_none(network, x, names, own)):
        return
    if not _same(found, _pass_or_none(network, x, names, [])):
        return  # it differs each time, which is said elsewhere
    for name in own:
        if not _same(found, _pass_or_none(network, x, names, [name])):
            raise _beside(name, network.role)


def _beside(name: str, role: str) -> L2TError:
    return L2TError(
        f"buffer '{name}' of the {role} is reached past its module (by a list, a view, an object that holds it): read "
        "and write it through its module."
    )


def _around(name: str, role: str) -> L2TError:
    return L2TError(
        f"parameter '{name}' of the {role} is reached past its module (by a closure, a tuple, an object that holds "
        "it or a tensor made of it before): read it from its module in each forward pass."
    )


def _pass(network: Network, x: Tensor, names: Sequence[str], poisoned: Sequence[str] = ()) -> list[Tensor]:
    """Outputs, buffers and gradients with stand-ins for the parameters `names` and for all buffers.

    poisoned: parameters and buffers of the network's own that are NaN meanwhile.
    """
    attributes = read_attributes(network.module)
    with undisturbed(network.module, x.device), torch.enable_grad():
        for now, then in attributes:  # with the graphs that some may have
            now |= {
                key: value for key, value in then.items() if isinstance(value, Tensor) and value.grad_fn is not None
            }
        stand_ins = {name: network.parameters[name].detach().clone().requires_grad_() for name in names}
        buffers = {name: buffer.clone() for name, buffer in network.module.named_buffers()}
        own = buffers_of(network.module, network.leaves_alone)
        for name in poisoned:
            (own[name] if name in own else network.parameters[name]).data.fill_(torch.nan)
        versions = {name: buffer._version for name, buffer in own.items()}
        places = {name: p.data_ptr() for name, p in stand_ins.items()}
        frozen = _frozen(network)
        outputs = network.run(x, stand_ins, buffers)
        if made := dict(network.module.named_parameters()).keys() - network.parameters.keys():
            raise L2TError(
                f"parameter '{min(made)}' of the {network.role} is made in its forward pass: run the network on one "
                "batch of images first."
            )
        if moved := network.places.replaced():
            raise L2TError(
                f"parameter '{moved}' of the {network.role} changes its place in the forward pass: let that choose "
                "among its children, not register others in their places."
            )
        for name, buffer in own.items():
            if buffer._version != versions[name]:
                raise _beside(name, network.role)
        values = [*outputs.features, *([] if outputs.logits is None else [outputs.logits])]
        ends = [y for y in values if y.requires_grad]
        if not poisoned:
            _check_graph(network, ends)
        for name, p in stand_ins.items():
            if p.data_ptr() != places[name]:
                raise _written(name, network.role)
        _check_frozen(frozen, network.role)
        squares = [y.abs().square().mean() for y in ends]
        try:
            with sweeping():  # hooks may have consequences of their own
                grads = torch.autograd.grad(squares, list(stand_ins.values()), allow_unused=True) if ends else []
        except RuntimeError as error:
            line = first_line(error)
            raise L2TError(f"the {network.role} cannot be differentiated: {line}") from error
        for name, g in zip(stand_ins, grads, strict=False):
            if g is not None and g.layout != torch.strided:
                raise L2TError(f"the gradient of parameter '{name}' of the {network.role} is sparse: set sparse=False.")
        return [t.detach().clone() for t in (*values, *buffers.values(), *(g for g in grads if g is not None))]


def _pass_or_none(network: Network, x: Tensor, names: Sequence[str], poisoned: Sequence[str]) -> list[Tensor] | None:
    try:
        return _pass(network, x, names, poisoned)
    except Exception:  # whatever a network may raise on NaN
        return None


def _same(one: Sequence[Tensor], other: Sequence[Tensor] | None) -> bool:
    if other is None or len(one) != len(other):
        return False
    if unordered(one):
        return alike(one, other, _ROUNDED)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _check_graph(network: Network, ends: Sequence[Tensor]) -> None:
    """Raises L2TError where autograd would lead to a parameter itself."""
    names = {id(p): name for name, p in network.parameters.items() if p.requires_grad}
    for node in nodes_of(ends):
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            raise _around(name, network.role)


def nodes_of(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph that leads to these, once; that of a leaf has it as `variable`."""
    waiting: list[Any] = [y.grad_fn for y in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


@torch.no_grad()
def _statistics_matter(network: Network, x: Tensor, found: Sequence[Tensor]) -> bool:
    """See `Network`: whether running statistics that are NaN show, or do not stay what they were.

    They show in a later pass where a BatchNorm changes its mode.
    """
    modes = [m.training for m in network.module.modules()]
    layers = [m for m in network.module.modules() if m.training and network.leaves_alone(m)]
    with undisturbed(network.module, x.device):
        poisoned = [b for m in layers for b in m.buffers() if b.is_floating_point()]
        for buffer in poisoned:
            buffer.fill_(torch.nan)
        kept = [(m._buffers, dict(m._buffers), [b._version for b in m.buffers()]) for m in layers]
        try:
            outputs = network.run(x, simulated=True)
        except Exception:  # whatever a network may raise on NaN
            return True
        values = [*outputs.features, *([] if outputs.logits is None else [outputs.logits])]
        if not _same(found[: len(values)], values) or modes != [m.training for m in network.module.modules()]:
            return True
        return any(
            any(now.get(key) is not b for key, b in then.items())
            or versions != [b._version for b in then.values() if b is not None]
            for now, then, versions in kept
        )


def _check_unwritten(network: Network, x: Tensor, names: Sequence[str]) -> None:
    """Raises L2TError where the forward pass writes to large parameters."""
    with undisturbed(network.module, x.device), torch.enable_grad():
        large: Mapping[str, Tensor] = {name: _SCALE * network.parameters[name].detach() for name in names}
        stand_ins = {name: p.clone().requires_grad_() for name, p in large.items()}
        buffers = {name: buffer.clone() for name, buffer in network.module.named_buffers()}
        frozen = _frozen(network)
        try:
            network.run(x, stand_ins, buffers)
        except Exception:  # whatever a network may raise on such values
            return
        _check_frozen(frozen, network.role)
        for name, p in stand_ins.items():
            if not torch.equal(p.detach(), large[name]):
                raise _written(name, network.role)


_Frozen = dict[str, tuple[Tensor, int, Tensor]]  # by name: the parameter, where its data lie, a copy


def _frozen(network: Network) -> _Frozen:
    frozen = {name: p for name, p in network.parameters.items() if not p.requires_grad}
    return {name: (p, p.data_ptr(), p.detach().clone()) for name, p in frozen.items()}


def _check_frozen(frozen: _Frozen, role: str) -> None:
    """Raises L2TError for a parameter that the forward pass has written to: its simulated values would stay."""
    for name, (p, data, value) in frozen.items():
        if p.data_ptr() != data or not torch.equal(p, value):
            raise L2TError(
                f"parameter '{name}' of the {role} is frozen, but written to in its forward pass: make it a buffer."
            )


def _written(name: str, role: str) -> L2TError:
    return L2TError(
        f"parameter '{name}' of the {role} is written to in its forward pass: do that after a step, or by a "
        "parametrization (where its first pass initialises it: run the network on one batch of images first)."
    )
