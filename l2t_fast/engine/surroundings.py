"""What a forward pass of the target reads and changes beside θ: buffers, Python attributes, random generators."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.learner.attributes import Attributes, apart, cut_graphs, read_attributes, read_hooks, set_attributes
from l2t_fast.learner.generators import read_generators, set_generators
from l2t_fast.learner.network import Network
from l2t_fast.learner.places import buffers_of


class Buffers:
    """A network's buffers as they are now, to be put back."""

    def __init__(
        self, network: nn.Module, left_out: Callable[[nn.Module], bool] = lambda module: False, copied: bool = True
    ) -> None:
        """copied: False where their values are never put back."""
        self._network = network
        self._tables = _tables(network, left_out)
        held = [(t, key, b) for t, buffers in self._tables for key, b in buffers.items() if b is not None]
        buffers = [buffer for *_, buffer in held]
        values = _clones(buffers) if copied else buffers
        self._held = [(*place, value) for place, value in zip(held, values, strict=True)]

    @torch.no_grad()
    def put_back(self) -> None:
        """As they were."""
        set_attributes(self._tables)
        for _, _, buffer, value in self._held:
            if value is not buffer:  # its version does not tell: batch_norm writes without a word
                buffer.copy_(value)

    @torch.no_grad()
    def settle(self, given: Mapping[str, Tensor]) -> None:
        """What a forward pass has put in the place of a buffer goes into the buffer itself; so do those `given`."""
        for buffers, key, buffer, _ in self._held:
            now = buffers.get(key)
            if now is None or now is buffer:
                continue
            if (now.shape, now.dtype) == (buffer.shape, buffer.dtype):
                buffer.copy_(now)
                buffers[key] = buffer
            else:
                buffers[key] = now.detach()
        own = dict(self._network.named_buffers()) if given else {}
        for dtype in {buffer.dtype for buffer in given.values()}:
            names = [name for name, buffer in given.items() if buffer.dtype == dtype]
            torch._foreach_copy_([own[name] for name in names], [given[name] for name in names])


@torch.no_grad()
def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies; those of plain tensors of a dtype in one launch."""
    plain = [type(x) is Tensor and x.layout == torch.strided for x in tensors]
    clones = [torch.empty_like(x) if one else x.clone() for x, one in zip(tensors, plain, strict=True)]
    pairs = [two for *two, one in zip(clones, tensors, plain, strict=True) if one]
    for dtype in dict.fromkeys(x.dtype for x, _ in pairs):
        of_dtype = [two for two in pairs if two[0].dtype == dtype]
        torch._foreach_copy_([x for x, _ in of_dtype], [x for _, x in of_dtype])
    return clones


class RealSurroundings:
    """Buffers, attributes and hooks of a network as they are now, for a real step: to be put back where it fails."""

    def __init__(self, network: nn.Module, left_out: Callable[[nn.Module], bool] = lambda module: False) -> None:
        # While a graph is being captured nothing happens that could be put back.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._network, self._buffers = network, Buffers(network, left_out, copied=not capturing)
        self._attributes, self._hooks = apart(read_attributes(network)), read_hooks(network)

    def put_back(self) -> None:
        set_attributes(self._attributes)
        set_attributes(self._hooks)
        self._buffers.put_back()

    def settle(self, given: Mapping[str, Tensor]) -> None:
        """See `Buffers`."""
        self._buffers.settle(given)
        cut_graphs(self._network)


@contextmanager
def surroundings_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Puts back what passes of the networks inside have changed of these."""
    kept = [RealSurroundings(network, _is_frozen_norm) for network in networks]
    try:
        yield
    finally:
        for surroundings in kept:
            surroundings.put_back()


class SimulatedSurroundings:
    """The surroundings of the simulated steps of an iteration (`bilevel.Surroundings`).

    Each pass starts from the `buffers` and attributes that the one before left, and writes into copies; the target's
    own are read by the first alone. Not among them are buffers of modules that leave theirs alone (`Network`).

    several: the passes of other parts of the batch come in between, each with attributes of its own.
    """

    def __init__(self, network: Network, device: torch.device, draws: bool, *, several: bool = False) -> None:
        self._target, self._left_out = network.module, network.leaves_alone
        self._device, self._draws = device, draws
        target = self._target
        self.buffers = buffers_of(target, self._left_out)
        self._own = Buffers(target, self._left_out)
        self._attributes = read_attributes(target)
        self._tables = _tables(target, self._left_out)
        self._hooks = read_hooks(target)
        self._left = self._attributes if several else None

    def begin(self) -> None:
        """To be called before each pass."""
        set_attributes(apart(self._attributes_now()))
        if any(key not in then or then[key] is None for now, then in self._tables for key in now):
            self.buffers = {**buffers_of(self._target, self._left_out), **self.buffers}  # some pass may have made some

    def end(self) -> None:
        """To be called after it."""
        if self._left is not None:
            self._left = read_attributes(self._target)

    def _attributes_now(self) -> Attributes:
        return read_attributes(self._target) if self._left is None else self._left

    def read(self) -> Any:
        generators = read_generators(self._device) if self._draws else None
        tables = _tables(self._target, self._left_out)
        hooks = [(table, dict(table)) for table, _ in self._hooks]
        return dict(self.buffers), self._attributes_now(), tables, hooks, generators

    def put_back(self, state: Any) -> None:
        buffers, attributes, tables, hooks, generators = state
        self.buffers = dict(buffers)
        for held in (attributes, tables, hooks):
            set_attributes(held)
        self.end()
        if generators is not None:
            set_generators(generators, self._device)

    def leave(self) -> None:
        """The target as it was before, but for the random generators."""
        set_attributes(self._attributes)
        set_attributes(self._hooks)
        self._own.put_back()


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation that only reads its buffers."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and not module.training


def _tables(network: nn.Module, left_out: Callable[[nn.Module], bool]) -> Attributes:
    """Where the modules keep their buffers; a forward pass may make one."""
    kept = [m._buffers for m in network.modules() if not left_out(m)]
    return [(buffers, dict(buffers)) for buffers in kept if isinstance(buffers, dict)]  # not those of scripted modules
