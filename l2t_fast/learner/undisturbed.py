"""A network that is run to look at it is afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from l2t_fast.kernels.layers.sync_batch_norm import by_itself
from l2t_fast.learner.attributes import apart, read_attributes, read_hooks, set_attributes
from l2t_fast.learner.generators import generators_kept


@contextmanager
def undisturbed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts parameters, buffers, modes, hooks, attributes and the random generators back to where they were."""
    attributes = read_attributes(network)
    kept = [t for m in network.modules() for t in (m._buffers, m._parameters, m._modules)]
    tables = [(t, dict(t)) for t in kept if isinstance(t, dict)]  # not those of scripted modules
    tables += read_hooks(network)
    tensors = [t for t in (*network.parameters(), *network.buffers()) if not isinstance(t, FakeTensor)]
    held = [(t, t.data, t.detach().clone()) for t in tensors]
    try:
        set_attributes(apart(attributes))
        with modes_kept(network), generators_kept(device), by_itself(network):
            yield
    finally:
        set_attributes(attributes)
        set_attributes(tables)
        for tensor, data, value in held:
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Each module's own mode, training or evaluation, is put back: some may be in another than the network."""
    modes = [(m, m.training) for m in network.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
