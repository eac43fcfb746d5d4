"""Features of named layers of any module, by torchvision's feature extractor (torch.fx)."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.learner.pairs import Shape

_OUTPUT, _HIDDEN = "output", "hidden"


class Outputs(NamedTuple):
    """What one forward pass of a tapped network gives."""

    features: list[Tensor]  # [B, C, H, W] of each tapped layer
    logits: Tensor | None  # [B, classes], if the output was asked for
    hidden: Tensor | None  # [B, C], what the last Linear reads, if the output comes from one


@dataclass(frozen=True)
class Taps:
    """A network that returns its features: `network(x)` is a dictionary, `split` puts it in order.

    `network` shares parameters and submodules with the module it was made of; parameters and layers that neither the
    tapped layers nor the output need are left out.
    """

    network: nn.Module
    nodes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    classes: int  # logits of the output, 0 without
    hidden: int  # channels of what the last Linear reads; 0 without the output, or where it comes from something else

    def split(self, outputs: dict[str, Tensor]) -> Outputs:
        """The dictionary in order."""
        return Outputs([outputs[node] for node in self.nodes], outputs.get(_OUTPUT), outputs.get(_HIDDEN))


def tap(module: nn.Module, layers: Sequence[str], example: Tensor, *, role: str, output: bool) -> Taps:
    """Taps `layers` of `module`, named as in `named_modules()`.

    A layer inside the module may also have torchvision's node name (`layer1.0.relu_1`: the second call of a module
    that is called twice). `example` [B, C, H, W] tells the shape of an image. With `output` the
    whole module's output is returned too and both modes are kept, without it the network is for evaluation.
    `role` ("target", "source 0") names the module in errors.

    Raises:
        L2TError: a module that torch.fx cannot trace, an unknown layer (the nearest names are listed), a layer that
            is never called or called several times, a feature that is not [B, C, H, W], a feature that is overwritten
            in place later in the forward pass, a traced module that computes something else.
    """
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        raise L2TError(f"the layers of the {role} must be a list of names, not {layers!r}.")
    keys = tuple(f"tap{i}" for i in range(len(layers)))
    with _undisturbed(module), torch.no_grad():
        torch.manual_seed(0)
        x = torch.randn(2, *example.shape[1:]).to(example)  # two, since BatchNorm cannot train on one image
        nodes = {training: _resolve(module, layers, training, role, output) for training in (True, False)}
        if not all(_HIDDEN in of_mode.values() for of_mode in nodes.values()):
            nodes = {t: {node: key for node, key in n.items() if key != _HIDDEN} for t, n in nodes.items()}
        was_training = module.training
        network = create_feature_extractor(
            module,
            train_return_nodes=nodes[True],
            eval_return_nodes=nodes[False],
            suppress_diff_warning=True,
        )
        for training in (False, True) if output else (False,):
            outputs = _checked_run(module.train(training), network.train(training), layers, x, role)
        network.train(was_training and output)
    features = [outputs[key] for key in keys]
    for layer, feature in zip(layers, features, strict=True):
        if not isinstance(feature, Tensor) or feature.dim() != 4:
            shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise L2TError(
                f"layer '{layer}' of the {role} gives {shape}, but only features [B, C, H, W] can be matched."
            )
    if output and outputs[_OUTPUT].dim() != 2:
        raise L2TError(f"the {role} returns {list(outputs[_OUTPUT].shape)}, not logits [B, classes]: wrap it to do so.")
    shapes = tuple((f.shape[1], f.shape[2], f.shape[3]) for f in features)
    hidden = outputs[_HIDDEN].shape[1] if _HIDDEN in outputs else 0
    return Taps(network, keys, shapes, outputs[_OUTPUT].shape[1] if output else 0, hidden)


class _ModuleTracer(NodePathTracer):  # type: ignore[misc]
    """Notes which graph node each call of each module returned."""

    def __init__(self) -> None:
        # As create_feature_extractor does: the names of the nodes depend on it.
        operators = [c for _, c in inspect.getmembers(torchvision.ops, inspect.isclass) if issubclass(c, nn.Module)]
        super().__init__(autowrap_modules=(math, torchvision.ops), leaf_modules=operators)
        self.results: dict[str, list[Any]] = {}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        self.results.setdefault(self.path_of_module(m), []).append(result)
        return result


def _resolve(module: nn.Module, layers: Sequence[str], training: bool, role: str, output: bool) -> dict[str, str]:
    """{name of a graph node: key in the extractor's dictionary}, for one mode of the module."""
    tracer = _ModuleTracer()
    try:
        graph = tracer.trace(module.train(training))
    except Exception as error:  # whatever a forward pass may raise on a symbolic input
        raise L2TError(
            f"torch.fx cannot trace the {role} ({type(module).__name__}): {_first_line(error)} Rewrite the "
            "data-dependent part of its forward pass, or mark it with torch.fx.wrap."
        ) from error
    names: dict[fx.Node, str] = tracer.node_to_qualname
    nodes: dict[str, str] = {}
    if output:
        (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
        if not isinstance(result, fx.Node) or result not in names:  # a named tuple has a node, but no name
            raise L2TError(f"the {role} returns {type(result).__name__}, not one tensor of logits: wrap it to do so.")
        nodes[names[result]] = _OUTPUT
    for i, layer in enumerate(layers):
        node = _node_of(module, layer, tracer, role)
        if nodes.get(node) == _OUTPUT:
            raise L2TError(f"layer '{layer}' is the output of the {role}, not a feature: tap an earlier layer.")
        nodes.setdefault(node, f"tap{i}")
        if nodes[node] != f"tap{i}":
            other = layers[int(nodes[node].removeprefix("tap"))]
            raise L2TError(f"layers '{layer}' and '{other}' of the {role} are the same feature: give it once.")
    if output and result.op == "call_module" and isinstance(module.get_submodule(str(result.target)), nn.Linear):
        read = result.args[0]
        if isinstance(read, fx.Node) and read in names:
            nodes.setdefault(names[read], _HIDDEN)
    return nodes


def _node_of(module: nn.Module, layer: str, tracer: _ModuleTracer, role: str) -> str:
    names: dict[fx.Node, str] = tracer.node_to_qualname
    modules = [name for name, _ in module.named_modules() if name]
    calls = tracer.results.get(layer, [])
    if len(calls) > 1:
        inside = sorted({n for n in names.values() if n == layer or n.startswith((f"{layer}_", f"{layer}."))})
        raise L2TError(
            f"layer '{layer}' of the {role} is called {len(calls)} times, so its feature is ambiguous: tap the block "
            f"around it{_listed(', or one of', [n for n in inside if n != layer])}."
        )
    if len(calls) == 1:
        if not isinstance(calls[0], fx.Proxy):
            raise L2TError(f"layer '{layer}' of the {role} returns {type(calls[0]).__name__}, not one tensor.")
        return names[calls[0].node]
    if layer in names.values():
        return layer
    if layer in modules:
        raise L2TError(
            f"layer '{layer}' of the {role} is never called itself, or only inside a module that is not traced: tap a "
            "layer inside it or around it."
        )
    near = difflib.get_close_matches(layer, modules, n=4, cutoff=0.3) or modules[:8]
    raise L2TError(f"the {role} has no layer '{layer}'{_listed(': the nearest names are', near)}.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(lead: str, names: Sequence[str]) -> str:
    return f"{lead} {', '.join(repr(name) for name in names[:6])}" if names else ""


class _Recorder(fx.Interpreter):
    """Runs a feature extractor once and finds taps that a later operation overwrites in place.

    The version counter of a tensor, shared by its views, counts the writes to it.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        (returned,) = (node.args[0] for node in network.graph.nodes if node.op == "output")
        self.keys = {node: key for key, node in returned.items()}
        self.versions: dict[str, tuple[Tensor, int]] = {}
        self.overwritten: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for key, (tensor, version) in self.versions.items():
            if tensor._version > version:
                self.overwritten.setdefault(key, getattr(n.target, "__name__", str(n.target)))
        if n in self.keys and isinstance(result, Tensor):
            self.versions[self.keys[n]] = (result, result._version)
        return result


def _checked_run(
    module: nn.Module, network: fx.GraphModule, layers: Sequence[str], x: Tensor, role: str
) -> dict[str, Any]:
    """network(x), where it and the module compute the same output and features, and no feature is overwritten."""
    theirs: dict[str, Any] = {}

    def record(key: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            theirs[key] = output.clone() if isinstance(output, Tensor) else output  # before it may be overwritten

        return hook

    modules = dict(module.named_modules())
    handles = [
        modules[layer].register_forward_hook(record(f"tap{i}")) for i, layer in enumerate(layers) if layer in modules
    ]
    torch.manual_seed(0)  # both draw the same (dropout)
    try:
        theirs[_OUTPUT] = module(x)
    except Exception as error:  # whatever a network may raise
        raise L2TError(f"the {role} cannot run on images {list(x.shape)}: {_first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    torch.manual_seed(0)
    recorder = _Recorder(network)
    outputs: dict[str, Any] = recorder.run(x)
    for i, layer in enumerate(layers):
        if f"tap{i}" in recorder.overwritten:
            raise L2TError(
                f"layer '{layer}' of the {role} is overwritten in place by '{recorder.overwritten[f'tap{i}']}': tap "
                "that one instead, or build the network with inplace=False."
            )
    for key in outputs.keys() & theirs.keys():
        # On a GPU two runs may differ in the last bits.
        if isinstance(theirs[key], Tensor) and (outputs[key] - theirs[key]).norm() > 1e-3 * theirs[key].norm():
            raise L2TError(
                f"the {role} ({type(module).__name__}) computes something else once torch.fx has traced it: use the "
                "result of every in-place operation of its forward pass, and no condition on values."
            )
    return outputs


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts buffers, modes and the random state back to where they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    modes = [(m, m.training) for m in module.modules()]
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for m, training in modes:
            m.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
