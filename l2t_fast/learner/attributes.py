"""What modules keep as Python attributes that a forward pass may set or write into: counters, tensors, queues."""

import copy
import enum
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2t_fast.learner.hooks import MODULE_HOOKS, hooks_of

Attributes = list[tuple[dict[str, Any], dict[str, Any]]]  # of a module or an object: its __dict__, and a copy of it

_CONTAINERS = (list, dict, set, deque, bytearray)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.ndarray)
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
_LIBRARIES = (sys.stdlib_module_names | {"torch", "numpy", "l2t_fast"}) - {"types"}
MODULE_OWN = frozenset(vars(nn.Module()))  # attributes that every module has: its tensors, modules, hooks, mode


def read_attributes(network: nn.Module) -> Attributes:
    """What the modules keep, their children among it, and what the objects do that they hold.

    What is written into a value later (a list, a tensor) is not put back, unless `apart` comes between.
    """
    found: Attributes = []
    users: list[dict[str, Any]] = []
    for module in network.modules():
        found.append((module.__dict__, dict(module.__dict__)))
        if isinstance(module._modules, dict):  # not that of a scripted module
            found.append((module._modules, dict(module._modules)))
        if not type(module).__module__.startswith("torch.nn."):
            users.append(module.__dict__)
    return found + [(held, dict(held)) for held in _objects(users)]


def set_attributes(attributes: Attributes) -> None:
    """Puts back what `read_attributes` gave."""
    for now, then in attributes:
        if now.keys() != then.keys() or not all(map(operator.is_, now.values(), then.values())):
            for key in now.keys() - then.keys():
                del now[key]
            now.update(then)


def apart(attributes: Attributes) -> Attributes:
    """The same with copies of all that can be written into, so that whoever writes into these leaves those alone.

    Tensors are cut from their graphs. Parameters, buffers and views of these, modules, and what stands in the
    attributes itself (objects of the user's own classes) are not copied.
    """
    buffers = [b for _, then in attributes for b in then.get("_buffers", {}).values() if isinstance(b, Tensor)]
    copies: dict[int, Any] = {id(b): b for b in buffers}
    places = {b.untyped_storage()._cdata for b in buffers if b.layout == torch.strided}
    written = [(now, then, _writable(then)) for now, then in attributes]
    for *_, own in written:
        copies |= {id(v): v for v in own.values() if isinstance(v, Tensor) and _lies_in(v, places)}
    return [
        (now, {**then, **{k: _copied(v, copies) for k, v in own.items()}} if own else then)
        for now, then, own in written
    ]


def _writable(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those that not every module has, and that hold something which can be written into."""
    own = ((k, attributes[k]) for k in attributes.keys() - MODULE_OWN)
    return {k: v for k, v in own if type(v) not in _PLAIN and not isinstance(v, nn.Module) and not _is_plain(v)}


def _is_plain(value: Any) -> bool:
    return type(value) is tuple and _PLAIN.issuperset(map(type, value))


def _lies_in(tensor: Tensor, places: set[int]) -> bool:
    return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in places


def _objects(attributes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `__dict__` of each object of a user's class that stands in the attributes or their containers."""
    found: dict[int, dict[str, Any]] = {}
    waiting = [v for held in attributes for v in _writable(held).values()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or type(value) in _PLAIN or isinstance(value, Tensor | nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, (*_CONTAINERS, tuple)):
            waiting += _items(value)
        elif _is_users(type(value)) and isinstance(held := getattr(value, "__dict__", None), dict):
            found[id(held)] = held
    return list(found.values())


def _is_users(kind: type) -> bool:
    """Whether instances are the user's own, with attributes that a forward pass may set."""
    library = kind.__module__.partition(".")[0] in _LIBRARIES and kind is not types.SimpleNamespace
    return not library and not issubclass(kind, type | enum.Enum)


def settings_of(network: nn.Module) -> list[Any]:
    """What a captured or compiled iteration has frozen of a network: classes, modes, attributes, hooks, addresses.

    Two that differ mean that it must be made anew.
    """
    found: list[Any] = []
    for module in network.modules():
        found += (type(module), module.training)
        found += _settings(vars(module))
        found += [tuple(hooks) for kind in MODULE_HOOKS if (hooks := getattr(module, kind))]
        held = (*module._parameters.values(), *module._buffers.values())
        found += [t.data_ptr() for t in held if t is not None]
    for held_by in _objects([vars(module) for module in network.modules()]):
        found += _settings(held_by)
    found += [tuple(p._backward_hooks) for p in network.parameters() if p._backward_hooks]
    found += [id(hook) for _, _, hook in hooks_of(nn.Module())]  # those of all modules
    return found


def _settings(attributes: dict[str, Any]) -> Iterator[Any]:
    """Plain values; of tensors, callables and objects their identities; both of what is in containers."""
    for key, value in attributes.items():
        if key not in MODULE_OWN:
            inside = isinstance(value, (*_CONTAINERS, tuple))
            yield from (v if type(v) in _PLAIN else id(v) for v in (_items(value) if inside else (value,)))


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
    elif isinstance(value, tuple):
        items = [_copied(item, copies) for item in value]
        if all(item is own for item, own in zip(items, value, strict=True)):
            return value
        made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, _CONTAINERS) and not any(isinstance(item, nn.Parameter) for item in _items(value)):
        made = copy.copy(value)
        copies[id(value)] = made
        _fill(made, copies)
        return made
    else:
        return value
    copies[id(value)] = made
    return made


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _fill(container: Any, copies: dict[int, Any]) -> None:
    """Puts copies in the places of what a container holds."""
    if isinstance(container, dict):
        for key, item in container.items():
            container[key] = _copied(item, copies)
    elif isinstance(container, list | deque):
        for i, item in enumerate(container):
            container[i] = _copied(item, copies)
