"""The hooks of the user's network: which there are, and that backward hooks act on a step's gradient, not its adjoint.

A backward hook changes what a training step descends on. The meta-gradient differentiates that changed gradient, and
the forward pass as it is: where its sweep passes a module again, the hook must not act once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_sweeping = False  # for the whole process: on CUDA autograd runs hooks in threads of its own


def hooks_of(network: nn.Module) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(name of the module or parameter, what it has: "forward hook", "hook" of a parameter, the hook itself)."""
    for name, module in network.named_modules():
        for hooks in MODULE_HOOKS:
            kind = hooks.strip("_").removesuffix("_hooks").replace("_", "-")
            for hook in getattr(module, hooks).values():
                yield name or type(module).__name__, f"{kind} hook", hook
    for name, p in network.named_parameters():
        for hook in (p._backward_hooks or {}).values():
            yield name, "hook", hook


@contextmanager
def sweeping() -> Iterator[None]:
    """Inside, the hooks of modules that ran under `gated_backward_hooks` do nothing."""
    global _sweeping
    before, _sweeping = _sweeping, True
    try:
        yield
    finally:
        _sweeping = before


@contextmanager
def gated_backward_hooks(network: nn.Module) -> Iterator[None]:
    """The backward hooks that a forward pass inside sets up can be silenced by `sweeping`."""
    held = [hooks for m in network.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks) if hooks]
    saved = [dict(hooks) for hooks in held]
    for hooks in held:
        for key, hook in hooks.items():
            hooks[key] = _gated(hook)
    try:
        yield
    finally:
        for hooks, own in zip(held, saved, strict=True):
            hooks.update({key: hook for key, hook in own.items() if key in hooks})  # some remove themselves


def _gated(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: None if _sweeping else hook(*arguments)
