"""What a forward pass of the target reads and changes beside θ: buffers, Python attributes, random generators."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.kernels.layers.twins import BatchNorm2d, twin_of
from l2t_fast.learner.generators import read_generators, set_generators
from l2t_fast.learner.places import buffers_of, read_attributes, set_attributes


class Buffers:
    """A network's buffers as they are now, to be put back."""

    def __init__(self, network: nn.Module, left_out: Callable[[nn.Module], bool] = lambda module: False) -> None:
        self._network = network
        self._held = [
            (module._buffers, key, buffer, buffer.clone(), buffer._version)
            for module in network.modules()
            if not left_out(module)
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Where they are no longer what they were."""
        for buffers, key, buffer, value, version in self._held:
            buffers[key] = buffer
            if buffer._version != version:
                buffer.copy_(value)

    @torch.no_grad()
    def settle(self, given: Mapping[str, Tensor]) -> None:
        """What a forward pass has put in the place of a buffer goes into the buffer itself; so do those `given`."""
        for buffers, key, buffer, _, _ in self._held:
            now = buffers.get(key)
            if now is not None and now is not buffer and now.shape == buffer.shape:
                buffer.copy_(now)
                buffers[key] = buffer
        own = dict(self._network.named_buffers()) if given else {}
        for dtype in {buffer.dtype for buffer in given.values()}:
            names = [name for name, buffer in given.items() if buffer.dtype == dtype]
            torch._foreach_copy_([own[name] for name in names], [given[name] for name in names])


class Simulated:
    """The surroundings of the simulated steps of an iteration (`bilevel.Surroundings`).

    Each pass starts from the `buffers` that the one before left; the target's own are read by the first alone. Buffers
    of BatchNorms with twins are not among them: those leave them alone.
    """

    def __init__(self, target: nn.Module, device: torch.device, draws: bool) -> None:
        self._target, self._device, self._draws = target, device, draws
        self.buffers = buffers_of(target, _leaves_alone)
        self._own = Buffers(target, _leaves_alone)
        self._attributes = read_attributes(target)

    def read(self) -> Any:
        generators = read_generators(self._device) if self._draws else None
        return dict(self.buffers), read_attributes(self._target), generators

    def put_back(self, state: Any) -> None:
        self.buffers, attributes, generators = dict(state[0]), state[1], state[2]
        set_attributes(attributes)
        if generators is not None:
            set_generators(generators, self._device)

    def leave(self) -> None:
        """The target as it was before, but for the random generators."""
        set_attributes(self._attributes)
        self._own.put_back()


def _leaves_alone(module: nn.Module) -> bool:
    return twin_of(module) is BatchNorm2d
