"""The random generators that a forward pass may draw from: PyTorch's, Python's and NumPy's."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Generators(NamedTuple):
    """Their states: PyTorch's on the CPU and, where the network is on CUDA, on its device; Python's; NumPy's."""

    cpu: Tensor
    cuda: Tensor | None
    python: Any
    numpy: Any


def read_generators(device: torch.device) -> Generators:
    """The states now."""
    states = read_torch(device)
    return Generators(states["cpu"], states.get("cuda"), random.getstate(), np.random.get_state())  # noqa: NPY002


def set_generators(states: Generators, device: torch.device) -> None:
    """Puts back what `read_generators` gave."""
    set_torch({"cpu": states.cpu, **({} if states.cuda is None else {"cuda": states.cuda})}, device)
    random.setstate(states.python)
    np.random.set_state(states.numpy)  # noqa: NPY002


def read_torch(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's alone, as checkpoints hold them: "cpu" and, on CUDA, "cuda"."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_torch(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `read_torch` gave, as far as it belongs to this device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, outside it is as if nothing had been."""
    states = read_generators(device)
    try:
        yield
    finally:
        set_generators(states, device)


def host_drew(before: Generators, after: Generators) -> bool:
    """Whether the host drew between the two, from any of its generators."""
    numpy_moved = any(
        not np.array_equal(one, other) for one, other in zip(before.numpy[1:], after.numpy[1:], strict=True)
    )
    return not torch.equal(before.cpu, after.cpu) or before.python != after.python or numpy_moved


def device_drew(before: Generators, after: Generators) -> bool:
    """Whether the network's own device drew; for one on the CPU that is the host's generator of PyTorch."""
    if before.cuda is None or after.cuda is None:
        return not torch.equal(before.cpu, after.cpu)
    return not torch.equal(before.cuda, after.cuda)


def seed_generators(seed: int) -> None:
    """All of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
