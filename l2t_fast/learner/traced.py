"""A network as a graph, for compilers: by torch.fx, and only where the graph has proved equal.

What torch.fx keeps is less than Python does: context managers, backward passes of the user's, results written in place,
hooks and random choices are lost. So a graph is used for nothing until outputs, features, gradients, buffers and random
generators have come out as the module's own several times, at randomised parameters, in the modes that it is in: the
only ones that it is used in.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

from l2t_fast.errors import L2TError, first_line
from l2t_fast.kernels.layers.twins import replace_layers, running_buffers, without_statistics
from l2t_fast.learner.alike import alike, unordered
from l2t_fast.learner.attributes import settings_of, versions_of
from l2t_fast.learner.generators import Generators, device_drew, host_drew, read_generators, seed_generators
from l2t_fast.learner.hooks import hooks_of
from l2t_fast.learner.network import Network, Outputs, Runs
from l2t_fast.learner.undisturbed import undisturbed

_OUTPUT, _READ = "output", "read"
_DRAWS = 3  # of parameters, images and generators that the proof compares
_EXACT, _ROUNDED = 1e-9, 1e-3  # relative, in float64 and below


class TracedNetwork:
    """As `Network`, its module replayed as a graph whose layers are twins for good."""

    def __init__(self, network: Network, graph: nn.Module) -> None:
        self.half = network.half
        self._network, self._graph = network, graph
        self.parameters = dict(graph.named_parameters())
        # It shares every parameter and buffer with the graph.
        self._simulated = without_statistics(graph)
        self._buffers = [{name for name, _ in running_buffers(g)} for g in (graph, self._simulated)]

    def run(
        self,
        x: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
        *,
        simulated: bool = False,
    ) -> Outputs:
        """See `Network.run`; `buffers` are written in place."""
        graph, known = (self._simulated, self._buffers[1]) if simulated else (self._graph, self._buffers[0])
        state = {name: p for name, p in (parameters or {}).items() if name in self.parameters}
        state |= {name: b for name, b in (buffers or {}).items() if name in known}
        found = torch.func.functional_call(graph, state, (x,)) if state else graph(x)
        features = [found[f"tap{i}"] for i in range(len(self._network.taps))]
        logits = self._network.logits_of(found[_OUTPUT]) if _OUTPUT in found else None
        return Outputs(self._network.as_maps(features), logits, found.get(_READ))

    def in_precision(self, dtype: torch.dtype, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Network.in_precision`."""
        return self._network.in_precision(dtype, given)


def trace(network: Network, example: Tensor) -> TracedNetwork:
    """The graph of a network, which computes what its module does on images like `example` [B, C, H, W].

    Raises:
        L2TError: torch.fx cannot trace it, or the graph computes something else.
    """
    module = network.module
    if any(True for _ in hooks_of(module)):
        raise _refused(network, "it has hooks, which a graph would lose")
    modes = {name: m.training for name, m in module.named_modules()}
    with undisturbed(module, example.device):  # a traced pass may leave symbols in attributes and buffers
        nodes = _resolve(network)
    with undisturbed(module, example.device):
        try:
            graph = create_feature_extractor(module, return_nodes=nodes, suppress_diff_warning=True)
        except Exception as error:  # the modes that the network is not in are traced as well
            raise _untraceable(network, error) from error
        graph.train(module.training)
        for name, m in graph.named_modules():  # all in one mode while they were traced
            m.training = modes.get(name, m.training)
        replace_layers(graph)
        traced = TracedNetwork(network, graph)
        _prove(network, traced, example)
    return traced


def _refused(network: Network, why: str) -> L2TError:
    name = type(network.module).__name__
    return L2TError(f"the {network.role} ({name}) cannot be compiled: {why}; use mode='graph' or 'eager'.")


def _untraceable(network: Network, error: Exception) -> L2TError:
    line = first_line(error)
    return _refused(network, f"torch.fx cannot trace it ({line})")


class _ModuleTracer(NodePathTracer):  # type: ignore[misc]
    """Notes which graph node each call of each module returned."""

    def __init__(self) -> None:
        # As create_feature_extractor does: the names of the nodes depend on it.
        operators = [c for _, c in inspect.getmembers(torchvision.ops, inspect.isclass) if issubclass(c, nn.Module)]
        super().__init__(autowrap_modules=(math, torchvision.ops), leaf_modules=operators)
        self.results: dict[nn.Module, list[Any]] = {}

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        self.results.setdefault(m, []).append(result)
        return result


def _resolve(network: Network) -> dict[str, str]:
    """{name of a graph node: key in the extractor's dictionary}."""
    tracer = _ModuleTracer()
    try:
        graph = tracer.trace(network.module)
    except Exception as error:  # whatever a forward pass may raise on a symbolic input
        raise _untraceable(network, error) from error
    names: dict[fx.Node, str] = tracer.node_to_qualname
    nodes: dict[str, str] = {}

    def note(found: Any, key: str) -> None:
        if not isinstance(found, fx.Node) or found not in names or names[found] in nodes:
            raise _refused(network, f"torch.fx sees no single tensor for '{key}'")
        nodes[names[found]] = key

    if network.output:
        (result,) = (node.args[0] for node in graph.nodes if node.op == "output")
        note(result, _OUTPUT)
    for i, tap in enumerate(network.taps):
        calls = tracer.results.get(tap.module, [])
        proxy = calls[tap.call] if tap.call < len(calls) else None
        note(proxy.node if isinstance(proxy, fx.Proxy) else None, f"tap{i}")
    if network.output and network.hidden:
        note(result.args[0], _READ) if names.get(result.args[0]) not in nodes else None
    return nodes


@contextmanager
def _randomised(network: nn.Module) -> Iterator[None]:
    """Parameters away from where they are: branches that start at zero hide faults."""
    parameters = list(network.parameters())
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn_like(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def _prove(network: Network, traced: TracedNetwork, example: Tensor) -> None:
    """Raises L2TError where the graph computes anything else than the module."""
    for draw in range(_DRAWS):
        torch.manual_seed(draw)
        x = torch.randn(2, *example.shape[1:]).to(example)  # two, since BatchNorm cannot train on one image
        with _randomised(network.module):
            ours = _observed(traced, network, x, draw)
            before = settings_of(network.module), versions_of(network.module)
            theirs = _observed(network, network, x, draw)
            if draw and (settings_of(network.module), versions_of(network.module)) != before:  # the first may cache
                raise _refused(network, "its forward pass sets attributes, which a graph would not")
        for what, one in theirs.tensors.items():
            if not _same(ours.tensors[what], one):
                raise _refused(network, f"its graph computes other {what}")
        if host_drew(ours.generators, theirs.generators) or device_drew(ours.generators, theirs.generators):
            raise _refused(network, "its graph draws other random numbers")


class _Observed(NamedTuple):
    """What one pass leaves."""

    tensors: dict[str, list[Tensor]]
    generators: Generators


@torch.enable_grad()
def _observed(runs: Runs, network: Network, x: Tensor, seed: int) -> _Observed:
    """Outputs, gradients of all parameters and the images, and buffers, after one pass from the same start."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in network.parameters.items()}
    buffers = {name: b.clone() for name, b in network.module.named_buffers()}
    x = x.clone().requires_grad_()
    seed_generators(seed)
    found = runs.run(x, leaves, buffers)
    generators = read_generators(x.device)
    outputs = [*found.features, *([] if found.logits is None else [found.logits])]
    weighted = [(y * torch.arange(y.numel(), device=y.device).view_as(y).cos()).sum() for y in outputs]
    inputs = [*leaves.values(), x]
    reached = [y for y in weighted if y.requires_grad]
    grads = torch.autograd.grad(reached, inputs, allow_unused=True) if reached else [None] * len(inputs)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads, strict=True)]
    after = [buffer.detach() for buffer in buffers.values()]
    return _Observed({"outputs": outputs, "gradients": gradients, "buffers": after}, generators)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    exact = all(t.dtype in (torch.float64, torch.int64) for t in theirs)
    tolerance = _EXACT if exact else _ROUNDED
    if unordered(theirs):
        return alike(ours, theirs, tolerance)
    pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
    return all((one - other).norm() <= tolerance * other.norm() for one, other in pairs)
