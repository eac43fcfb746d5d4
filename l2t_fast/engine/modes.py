"""How an iteration runs: what "auto" picks, and what may be captured."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from l2t_fast.choices import Memory, Mode
from l2t_fast.errors import L2TError
from l2t_fast.learner.hooks import hooks_of

_HARMLESS_HOOKS = ("WeightNorm", "SpectralNorm")  # PyTorch's own, which only compute


class Draws(NamedTuple):
    """Whether an iteration draws random numbers on the CPU, and on the device."""

    host: bool
    device: bool


def choose_mode(mode: Mode, device: torch.device) -> tuple[Mode, str]:
    """(the mode, why); "auto" picks what was measured (benchmarks/NOTES.md), which compiling on a GPU was not.

    Raises:
        L2TError: graphs without CUDA.
    """
    if mode == "graph" and device.type != "cuda":
        raise L2TError(f"mode='graph' needs a CUDA device, but the target is on {device}: use mode='eager'.")
    if mode != "auto":
        return mode, "as asked for"
    if device.type != "cuda":
        return "eager", f"since on a {device.type} compiling takes minutes and brings nothing"
    return "graph", "since replaying is fast and needs no compiling"


def check_capture(networks: Sequence[nn.Module], draws: Draws | None, memory: Memory) -> None:
    """Raises L2TError where a replay would not do what the networks' own forward passes do."""
    if draws is not None and draws.host:
        raise L2TError("the target or the loss draws random numbers on the CPU, which a CUDA graph would repeat")
    if draws is not None and draws.device and memory == "recompute":
        raise L2TError("memory='recompute' must draw the target's random numbers twice, which a CUDA graph cannot")
    for name, kind, hook in (found for network in networks for found in hooks_of(network)):
        if type(hook).__name__ not in _HARMLESS_HOOKS:
            raise L2TError(f"the {kind} of '{name}' is Python, which a CUDA graph would not run again")
