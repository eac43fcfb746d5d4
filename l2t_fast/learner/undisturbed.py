"""A network that is run to look at it is afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l2t_fast.learner.generators import generators_kept


@contextmanager
def undisturbed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back what forward passes may change: values and places of tensors, attributes, modes, the generators."""
    modules = [*network.modules()]
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
    tensors = [*network.parameters(), *network.buffers()]
    tensors += [value for m in modules for value in vars(m).values() if isinstance(value, Tensor)]
    values = [t.detach().clone() for t in tensors]
    try:
        with generators_kept(device):
            yield
    finally:
        for m, own, buffers in attributes:
            m._buffers.clear()
            m._buffers.update(buffers)
            vars(m).clear()
            vars(m).update(own)
        for t, value in zip(tensors, values, strict=True):
            if not torch.equal(t, value):
                t.data.copy_(value)


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Each module's own mode, training or evaluation, is put back: some may be in another than the network."""
    modes = [(m, m.training) for m in network.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
