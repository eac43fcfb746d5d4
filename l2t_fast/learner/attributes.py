"""What modules keep as Python attributes that a forward pass may set or write into: counters, tensors, queues."""

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2t_fast.learner.hooks import MODULE_HOOKS

Attributes = list[tuple[dict[str, Any], dict[str, Any]]]  # of a module: its __dict__, and a copy of it

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.ndarray)
_SIMPLE = frozenset((bool, int, float, str, type(None), tuple, torch.Size))
_PLAIN = (bool, int, float, str, type(None))
MODULE_OWN = frozenset(vars(nn.Module()))  # attributes that every module has: its tensors, modules, hooks, mode


def read_attributes(network: nn.Module) -> Attributes:
    """What the modules keep; what is written into it later is not put back, unless `apart` comes between.

    Of PyTorch's own modules only those with hooks are asked: no forward pass of theirs sets any.
    """
    return [
        (module.__dict__, dict(module.__dict__))
        for module in network.modules()
        if module._forward_hooks or module._forward_pre_hooks or not type(module).__module__.startswith("torch.nn.")
    ]


def set_attributes(attributes: Attributes) -> None:
    """Puts back what `read_attributes` gave."""
    for now, then in attributes:
        if now.keys() != then.keys() or any(now[key] is not value for key, value in then.items()):
            for key in now.keys() - then.keys():
                del now[key]
            now.update(then)


def apart(attributes: Attributes) -> Attributes:
    """The same with copies of all that can be written into, so that whoever writes into these leaves those alone.

    Tensors are cut from their graphs. Parameters, buffers and views of these, modules and objects of the user's own
    classes are not copied.
    """
    buffers = [b for _, then in attributes for b in then["_buffers"].values() if b is not None]
    copies: dict[int, Any] = {id(b): b for b in buffers}
    places = {b.untyped_storage()._cdata for b in buffers}
    for _, then in attributes:
        copies |= {id(v): v for v in then.values() if isinstance(v, Tensor) and v.untyped_storage()._cdata in places}
    return [
        (now, {k: v if k in MODULE_OWN else _copied(v, copies) for k, v in then.items()}) for now, then in attributes
    ]


def settings_of(network: nn.Module) -> list[Any]:
    """What a captured or compiled iteration has frozen of a network: classes, modes, attributes, hooks, addresses.

    Two that differ mean that it must be made anew.
    """
    found: list[Any] = []
    for module in network.modules():
        found += (type(module), module.training)
        found += _settings(module)
        found += [tuple(hooks) for kind in MODULE_HOOKS if (hooks := getattr(module, kind))]
        held = (*module._parameters.values(), *module._buffers.values())
        found += [t.data_ptr() for t in held if t is not None]
    found += [tuple(p._backward_hooks) for p in network.parameters() if p._backward_hooks]
    return found


def _settings(module: nn.Module) -> Iterator[Any]:
    """Simple attributes; of a user's module also the identities of tensors, callables and what is in containers."""
    users = not type(module).__module__.startswith("torch.nn.")
    for key, value in vars(module).items():
        if key in MODULE_OWN:
            continue
        if type(value) in _SIMPLE:
            yield value
        elif users and isinstance(value, (list, dict, set, deque)):
            yield from map(id, value.values() if isinstance(value, dict) else value)
        elif users:
            yield id(value)


def versions_of(network: nn.Module) -> list[int]:
    """Of the tensors among the attributes: a write counts one up."""
    own = (value for now, then in read_attributes(network) for key, value in then.items() if key not in MODULE_OWN)
    return [value._version for value in own if isinstance(value, Tensor) and not value.is_inference()]


def read_hooks(network: nn.Module) -> Attributes:
    """The tables of hooks of modules and parameters that hold any, for `set_attributes`: some remove themselves."""
    tables = [getattr(module, kind) for module in network.modules() for kind in MODULE_HOOKS]
    tables += [p._backward_hooks for p in network.parameters()]
    return [(table, dict(table)) for table in tables if table]


def cut_graphs(network: nn.Module) -> None:
    """Cuts tensors that a forward pass left as attributes from its graph, whose memory they would keep."""
    for now, then in read_attributes(network):
        for key, value in then.items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                now[key] = value.detach()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    if type(value) in _PLAIN:
        return value
    if id(value) in copies:  # of several names of one thing
        return copies[id(value)]
    made: Any
    if isinstance(value, Tensor):
        made = value if isinstance(value, nn.Parameter) else value.detach().clone()
    elif isinstance(value, torch.Generator):
        made = value.clone_state()
    elif isinstance(value, _GENERATORS):
        made = copy.deepcopy(value)
    elif type(value) in _CONTAINERS and not any(isinstance(item, nn.Parameter) for item in _items(value)):
        made = copy.copy(value)
        copies[id(value)] = made
        _fill(made, copies)
        return made
    else:
        return value
    copies[id(value)] = made
    return made


def _items(container: Any) -> Iterator[Any]:
    return iter(list(container.values()) if isinstance(container, dict) else list(container))


def _fill(container: Any, copies: dict[int, Any]) -> None:
    """Puts copies in the places of what a container holds."""
    if isinstance(container, dict):
        for key, item in container.items():
            container[key] = _copied(item, copies)
    elif not isinstance(container, set):
        for i, item in enumerate(container):
            container[i] = _copied(item, copies)
