"""How an iteration runs: what "auto" picks, and what may be captured."""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l2t_fast.choices import Memory, Mode
from l2t_fast.errors import L2TError
from l2t_fast.learner.attributes import MODULE_OWN
from l2t_fast.learner.hooks import MODULE_HOOKS, hooks_of

_COMPILE_FROM = 50_000  # iterations from which "auto" expects torch.compile to win back its minutes; a guess
_HARMLESS_HOOKS = ("WeightNorm", "SpectralNorm")  # PyTorch's own, which only compute


class Draws(NamedTuple):
    """Whether an iteration draws random numbers on the CPU, and on the device."""

    host: bool
    device: bool


def choose_mode(mode: Mode, device: torch.device, iterations: int | None) -> tuple[Mode, str]:
    """(the mode, why).

    Raises:
        L2TError: graphs without CUDA.
    """
    if mode == "graph" and device.type != "cuda":
        raise L2TError(f"mode='graph' needs a CUDA device, but the target is on {device}: use mode='eager'.")
    if mode != "auto":
        return mode, "as asked for"
    if device.type != "cuda":
        return "eager", f"since on a {device.type} compiling takes minutes and brings nothing"
    if iterations is not None and iterations >= _COMPILE_FROM:
        return "compile", f"since {iterations} iterations are worth minutes of compiling"
    return "graph", "since replaying needs no compiling" + (
        f", which {iterations} iterations would not win back" if iterations is not None else ""
    )


def check_capture(target: nn.Module, draws: Draws | None, memory: Memory) -> None:
    """Raises L2TError where a replay would not do what the target's own forward pass does."""
    if draws is not None and draws.host:
        raise L2TError("the target draws random numbers on the CPU, which a CUDA graph would repeat")
    if draws is not None and draws.device and memory == "recompute":
        raise L2TError("memory='recompute' must draw the target's random numbers twice, which a CUDA graph cannot")
    for name, kind, hook in hooks_of(target):
        if type(hook).__name__ not in _HARMLESS_HOOKS:
            raise L2TError(f"the {kind} of '{name}' is Python, which a CUDA graph would not run again")


def settings_of(target: nn.Module) -> list[Any]:
    """What a captured or compiled iteration has frozen of a network's Python: classes, simple attributes, hooks.

    Two that differ mean that it must be made anew.
    """
    found: list[Any] = []
    for module in target.modules():
        own = vars(module)
        found += (type(module), module.training)
        found += [value for key, value in own.items() if key not in MODULE_OWN and type(value) in _SIMPLE]
        found += [tuple(hooks) for kind in MODULE_HOOKS if (hooks := getattr(module, kind))]
        found += _identities(module)
    found += [tuple(p._backward_hooks) for p in target.parameters() if p._backward_hooks]
    return found


def _identities(module: nn.Module) -> Iterator[int]:
    """Of the tensors, and of what is in the lists and dictionaries, that a user's module keeps as attributes."""
    if type(module).__module__.startswith("torch.nn."):
        return
    for key, value in vars(module).items():
        if isinstance(value, Tensor):
            yield id(value)
        elif key not in MODULE_OWN and isinstance(value, (list, dict, deque)):
            yield from map(id, value.values() if isinstance(value, dict) else value)


_SIMPLE = frozenset((bool, int, float, str, type(None), tuple, torch.Size))
