"""Where a network looks up its parameters and buffers, so that other tensors can stand there for one pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l2t_fast.kernels.layers.autograd import may_lack

Slot = tuple[Any, Any]  # a dictionary or list, and the key or index in it


class Places:
    """The places of a network's parameters, all of each: tied ones have several.

    Unlike for `torch.func.functional_call`, lists and dictionaries that a module keeps beside its registered tensors
    (`nn.LSTM` does) are places too, and they are looked up once, so that a pass costs a dictionary entry a tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.parameters: dict[str, Tensor] = dict(network.named_parameters())
        names = {id(p): name for name, p in self.parameters.items()}
        self._slots: dict[str, list[Slot]] = {name: [] for name in self.parameters}
        self._holders: list[Slot] = []  # those lists and dictionaries beside the registered tensors
        for module in network.modules():
            for attribute, value in list(module.__dict__.items()):
                if isinstance(value, (list, dict)):
                    found = [
                        (names[id(p)], key)
                        for key, p in (value.items() if isinstance(value, dict) else enumerate(value))
                        if isinstance(p, Tensor) and id(p) in names
                    ]
                    for name, key in found:
                        self._slots[name].append((value, key))
                    if found and attribute != "_parameters":
                        self._holders.append((module.__dict__, attribute))

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> Iterator[None]:
        """With these in the places of the parameters and buffers of those names; the rest stay the network's own.

        On return `buffers` has what the pass left in their places.
        """
        # `nn.LSTM` makes its list anew of what stands in the places.
        before: list[tuple[Any, Any, Any]] = [(holder, key, holder[key]) for holder, key in self._holders]
        placed = self._buffer_slots(buffers)
        try:
            for name, tensor in parameters.items():
                tensor._is_param = True  # `isinstance(w, nn.Parameter)` holds, as for the one that it stands in for
                may_lack(tensor, not self.parameters[name]._backward_hooks)
            for tensors, slots in ((parameters, self._slots), (buffers, placed)):
                for name, tensor in tensors.items():
                    for holder, key in slots[name]:
                        before.append((holder, key, holder[key]))
                        holder[key] = tensor
            yield
            for name, slots_of in placed.items():
                now = [holder.get(key) for holder, key in slots_of]
                buffers[name] = next((t for t in now if t is not None and t is not buffers[name]), buffers[name])
        finally:
            for holder, key, value in reversed(before):
                holder[key] = value

    @contextmanager
    def valued(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """With these values in the parameters themselves, for whoever holds one of them (a hook does)."""
        before = [(self.parameters[name], self.parameters[name].data) for name in parameters]
        try:
            for (p, _), tensor in zip(before, parameters.values(), strict=True):
                p.data = tensor.detach()
            yield
        finally:
            for p, data in before:
                p.data = data

    def _buffer_slots(self, buffers: Mapping[str, Tensor]) -> dict[str, list[Slot]]:
        """Looked up anew each time: a module may replace its buffer."""
        if not buffers:
            return {}
        slots: dict[int, list[Slot]] = {}
        ids: dict[str, int] = {}
        for prefix, module in self._network.named_modules():
            for key, b in module._buffers.items():
                if b is not None:
                    slots.setdefault(id(b), []).append((module._buffers, key))
                    ids[f"{prefix}.{key}" if prefix else key] = id(b)
        return {name: slots[ids[name]] for name in buffers}

    def replaced(self) -> str | None:
        """The name of a parameter that is no longer the one that it was; None where all are."""
        now = dict(self._network.named_parameters())
        if now.keys() != self.parameters.keys():
            return next(iter(now.keys() ^ self.parameters.keys()))
        return next((name for name, p in now.items() if p is not self.parameters[name]), None)


def buffers_of(network: nn.Module, left_out: Callable[[nn.Module], bool]) -> dict[str, Tensor]:
    """The buffers by name, each once, but for those of modules that `left_out` names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in network.named_modules():
        if left_out(module):
            continue
        for key, b in module._buffers.items():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                found[f"{prefix}.{key}" if prefix else key] = b
    return found
