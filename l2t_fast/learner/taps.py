"""Tapped layers: which call of which module a name means, found out by running the network once."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2t_fast.bounds import shown
from l2t_fast.errors import L2TError, first_line, ran_out
from l2t_fast.learner.layout import FeatureMap, find_layout, parse_layer, pick
from l2t_fast.learner.pairs import Shape
from l2t_fast.learner.trail import AxisTrail
from l2t_fast.learner.undisturbed import undisturbed


@dataclass(frozen=True)
class Tap:
    """A layer, called for the (`call` + 1)-th time in a forward pass, and how its feature becomes a map."""

    name: str
    module: nn.Module
    call: int
    role: str
    map: FeatureMap
    tokens: int  # of the feature, where it has such

    def pick(self, output: Any) -> Tensor:
        """The feature in what the layer returned."""
        return pick(output, self.name, self.role)

    def as_map(self, feature: Tensor) -> Tensor:
        """[B, C, H, W]."""
        if self.map.layout == "tokens" and feature.shape[1] != self.tokens:
            raise L2TError(
                f"layer '{self.name}' of the {self.role} gives {feature.shape[1]} tokens, not {self.tokens} as for the "
                "example: give images of the example's size."
            )
        return self.map.to_map(feature)


class Found(NamedTuple):
    """What one forward pass tells of a network."""

    taps: list[Tap]
    shapes: tuple[Shape, ...]
    output_shape: tuple[int, ...]  # without the batch
    hidden: int
    last_linear: nn.Module | None  # whose output is the network's


def unwrapped(module: nn.Module, role: str) -> nn.Module:
    """The user's own module, out of `torch.compile`, DataParallel and DistributedDataParallel.

    Raises:
        L2TError: no module; a scripted or exported one, which has no Python to run.
    """
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        elif isinstance(module, torch.jit.ScriptModule):
            raise L2TError(f"the {role} is a scripted module: give the Python module that it was made of.")
        elif not isinstance(module, nn.Module):
            raise L2TError(f"the {role} must be a torch.nn.Module, not {type(module).__name__}.")
        else:
            return module


def check_module(module: nn.Module, role: str) -> None:
    """Raises L2TError for a network whose parameters are not there yet, or beyond the reach of Python."""
    for name, inner in module.named_modules() if role == "target" else ():
        if isinstance(inner, torch.jit.ScriptModule):
            raise L2TError(f"'{name}' of the {role} is a scripted module: put the Python module that it was made of.")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise L2TError(
                f"'{name}' of the {role} has no shape yet (a lazy layer): run the network on one batch of images first."
            )
        if role == "target" and tensor.is_inference():
            raise L2TError(
                f"'{name}' of the {role} was made in inference mode, so it cannot be trained: make it outside."
            )


def cannot_run(role: str, x: Tensor, error: Exception) -> L2TError:
    """What is raised where a network raised `error` on images x."""
    line = first_line(error).rstrip(".!")
    return L2TError(
        f"the {role} cannot run on images {list(x.shape)}: {line}; give images of the size and depth that it takes, or "
        "another network."
    )


def are_names(layers: object) -> bool:
    """Whether it is a list or another sequence of names."""
    return (
        isinstance(layers, Sequence)
        and not isinstance(layers, str | bytes)
        and all(isinstance(layer, str) for layer in layers)
    )


def check_names(layers: object, role: str) -> None:
    """Raises L2TError where they are no names."""
    if not are_names(layers):
        raise L2TError(f"the layers of the {role} must be a list of names, not {shown(layers)}.")


def find_taps(
    module: nn.Module,
    layers: Sequence[str],
    example: Tensor,
    *,
    role: str,
    output: bool,
    logits: int | str | None,
    layout: Mapping[str, str],
) -> Found:
    """Taps `layers` of `module`, named as in `named_modules()`; `relu_1` is the second call of `relu`, `stage2[1]` the
    second of several features.

    The module runs once, in the modes that it is in, on images like `example` [B, C, H, W]; everything is put back.
    Without `output` the features alone are wanted. `role` ("target", "source 0") names the module in errors.

    Raises:
        L2TError: an unknown layer (the nearest names are listed), a layer that is never called or called several
            times, a feature that is no map, a feature that is overwritten in place later in the forward pass, a
            network that cannot run on such images or does not return logits [B, classes].
    """
    check_names(layers, role)
    modules = dict(module.named_modules())
    watched = {layer: _module_of(layer, modules) for layer in layers}
    with undisturbed(module, example.device), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(2, *example.shape[1:]).to(example)  # two, since BatchNorm cannot train on one image
        trial = Trial({m for found in watched.values() if found for m in [found[0]]}, AxisTrail(x))
        before = None if x.is_inference() else x._version
        result = trial.run(module, x, role)
    if before is not None and x._version != before:
        raise L2TError(f"the {role} writes into the images that it is given: let it work on a copy, x.clone().")
    taps: list[Tap] = []
    features: list[Tensor] = []
    for layer in layers:
        tapped, call, feature = _feature(layer, watched[layer], modules, trial, role)
        if output and feature is result:
            raise L2TError(f"layer '{layer}' is the output of the {role}, not a feature: tap an earlier layer.")
        same = next((taps[i].name for i, other in enumerate(features) if other is feature), None)
        if same is not None:
            raise L2TError(f"layers '{layer}' and '{same}' of the {role} are the same feature: give it once.")
        _check_feature(feature, x, layer, role)
        as_map = find_layout(feature, trial.trail, layer, role, layout.get(layer))
        taps.append(Tap(layer, tapped, call, role, as_map, feature.shape[1]))
        features.append(feature)
    trial.check_overwritten(taps, role, to_the_end=output)
    shapes = tuple(tap.map.shape for tap in taps)
    if not output:
        return Found(taps, shapes, (), 0, None)
    outputs = logits_of(result, logits, role)
    if outputs.shape[:1] != x.shape[:1]:
        raise L2TError(f"the {role} returns {list(outputs.shape)} for {len(x)} images: wrap it to return [B, ...].")
    linear, hidden = trial.last_linear(result)
    return Found(taps, shapes, tuple(outputs.shape[1:]), hidden, linear)


def _check_feature(feature: Tensor, x: Tensor, layer: str, role: str) -> None:
    """Raises L2TError for a feature that holds no real numbers, none at all, or not a map for each image."""
    told = f"layer '{layer}' of the {role} gives {str(feature.dtype).removeprefix('torch.')} {list(feature.shape)}"
    if not feature.is_floating_point() or feature.layout != torch.strided:
        what = "which are no real numbers" if feature.layout == torch.strided else f"laid out as {feature.layout}"
        raise L2TError(f"{told}, {what}: tap another layer.")
    if not feature.numel() or (feature.dim() and len(feature) != len(x)):
        raise L2TError(f"{told} for {len(x)} images: tap a layer that gives a map for each.")


def logits_of(result: Any, key: int | str | None, role: str) -> Tensor:
    """The logits [B, classes] in what a network returned; of a target any outputs [B, ...], which its loss is of.

    Raises:
        L2TError: it is not one tensor, and `key` does not say which of them; of a source, not [B, classes].
    """
    found = result
    if key is not None:
        if not isinstance(key, int | str):
            raise L2TError(f"logits={shown(key)} is not to be had: give a place in what the {role} returns.")
        try:
            found = getattr(result, key) if isinstance(key, str) and hasattr(result, key) else result[key]
        except (KeyError, IndexError, TypeError) as error:
            raise L2TError(f"the {role} returns {_what(result)}, which has no logits={key!r}: name another.") from error
    if not isinstance(found, Tensor):
        raise L2TError(
            f"the {role} returns {_what(found)}, not one tensor of logits: say which by logits=, or wrap it to do so; "
            "a loss on its other outputs is not taken."
        )
    if found.dim() != 2 and (role != "target" or not found.dim()):
        raise L2TError(f"the {role} returns {list(found.shape)}, not logits [B, classes]: wrap it to do so.")
    return found


def _what(result: Any) -> str:
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with {', '.join(map(repr, result))}"
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return f"{type(result).__name__} with {', '.join(map(repr, result._fields))}"
    return type(result).__name__ if not isinstance(result, Tensor) else str(list(result.shape))


def _module_of(layer: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, int | None] | None:
    """(the module, which call of it: None where the name does not say) that a name means."""
    name, _ = parse_layer(layer)
    if name in modules and name:
        return modules[name], None
    numbered = re.fullmatch(r"(.+)_(\d+)", name)
    if numbered and numbered[1] in modules:
        return modules[numbered[1]], int(numbered[2])
    return None


def _feature(
    layer: str,
    found: tuple[nn.Module, int | None] | None,
    modules: Mapping[str, nn.Module],
    trial: "Trial",
    role: str,
) -> tuple[nn.Module, int, Tensor]:
    """(the module, which call of it, the feature) that a name means."""
    if found is None:
        names = [name for name in modules if name]
        near = difflib.get_close_matches(layer, names, n=4, cutoff=0.3) or names[:8]
        raise L2TError(f"the {role} has no layer '{layer}'{_listed(': the nearest names are', near)}.")
    module, call = found
    calls = trial.calls.get(module, [])
    if not calls:
        raise L2TError(
            f"layer '{layer}' of the {role} is never called itself in this forward pass: tap a layer inside it or "
            "around it."
        )
    if call is None and len(calls) > 1:
        later = [f"{layer}_{k}" for k in range(1, len(calls))]
        raise L2TError(
            f"layer '{layer}' of the {role} is called {len(calls)} times, so its feature is ambiguous: tap the block "
            f"around it{_listed(', or one of', later)}."
        )
    if (call or 0) >= len(calls):
        raise L2TError(f"layer '{layer}' of the {role} is called {len(calls)} times only, counted from 0.")
    return module, call or 0, pick(calls[call or 0].output, layer, role)


def _listed(lead: str, names: Sequence[str]) -> str:
    return f"{lead} {', '.join(repr(name) for name in names[:6])}" if names else ""


class Call(NamedTuple):
    """One call of a watched module."""

    output: Any
    versions: dict[int, int]  # of the tensors that it returned, then
    number: int  # of calls that had returned before


class Trial(TorchDispatchMode):
    """One forward pass, and what the watched modules return in it."""

    def __init__(self, watched: set[nn.Module], trail: AxisTrail) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched, self.trail = watched, trail
        self.calls: dict[nn.Module, list[Call]] = {}
        self._linear: list[tuple[nn.Module, Any, Any]] = []
        self._writes: list[tuple[int, int, str]] = []  # (storage, how many calls had returned, operation)
        self._count = 0

    def run(self, module: nn.Module, x: Tensor, role: str) -> Any:
        handles = [m.register_forward_hook(self._note) for m in self._watched]
        handles += [m.register_forward_hook(self._note_linear) for m in module.modules() if isinstance(m, nn.Linear)]
        try:
            with self.trail, self:
                return module(x)
        except Exception as error:  # whatever a network may raise
            if isinstance(error, L2TError) or ran_out(error):
                raise
            raise cannot_run(role, x, error) from error
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        leaves = [*tree_leaves(output), *getattr(output, "__dict__", {}).values()]
        tensors = [t for t in leaves if isinstance(t, Tensor) and not t.is_inference()]
        call = Call(output, {id(t): t._version for t in tensors}, self._count)
        self.calls.setdefault(module, []).append(call)
        self._count += 1

    def _note_linear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._linear.append((module, inputs[0], output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._writes.append((args[0].untyped_storage()._cdata, self._count, func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))

    def last_linear(self, result: Any) -> tuple[nn.Module | None, int]:
        """(the Linear whose output is the network's, the channels that it reads)."""
        for module, read, output in reversed(self._linear):
            if output is result and read.dim() == 2:
                return module, read.shape[1]
        return None, 0

    def check_overwritten(self, taps: Sequence[Tap], role: str, to_the_end: bool) -> None:
        """Raises L2TError for a feature that is written to after its layer returned it.

        The version counter of a tensor, shared by its views, counts the writes. Without `to_the_end` the pass will be
        cut off where the last tapped layer has returned.
        """
        calls = [self.calls[tap.module][tap.call] for tap in taps]
        last = max((call.number for call in calls), default=0)
        for tap, call in zip(taps, calls, strict=True):
            feature = tap.pick(call.output)
            if feature.is_inference() or feature._version == call.versions[id(feature)]:
                continue
            storage = feature.untyped_storage()._cdata
            later = [(count, name) for where, count, name in self._writes if where == storage and count > call.number]
            if to_the_end or not later or later[0][0] <= last:
                name = later[0][1] if later else "an operation"
                raise L2TError(
                    f"layer '{tap.name}' of the {role} is overwritten in place by '{name}': tap that one instead, or "
                    "build the network with inplace=False."
                )
