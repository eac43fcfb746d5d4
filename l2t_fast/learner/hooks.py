"""The hooks of the user's network: which there are, and that backward hooks act on a step's gradient, not its adjoint.

A backward hook changes what a training step descends on. The meta-gradient differentiates that changed gradient, and
the forward pass as it is: where its sweep passes a module again, the hook must not act once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torchs

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_GRADIENTS = MODULE_HOOKS[2:]
_sweeping = False  # for the whole process: on CUDA autograd runs hooks in threads of its own


def hooks_of(network: nn.Module) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(name of the module or parameter, what it has: "forward hook", "hook" of a parameter, the hook itself)."""
    for name, module in network.named_modules():
        for hooks in MODULE_HOOKS:
            kind = hooks.strip("_").removesuffix("_hooks").replace("_", "-")
            for hook in getattr(module, hooks).values():
                yield name or type(module).__name__, f"{kind} hook", hook
    for hooks in MODULE_HOOKS:
        for hook in _of_all_modules(hooks).values():
            yield "all modules", f"{hooks.strip('_').removesuffix('_hooks').replace('_', '-')} hook", hook
    for name, p in network.named_parameters():
        for hook in (p._backward_hooks or {}).values():
            yield name, "hook", hook


def _of_all_modules(hooks: str) -> dict[int, Callable[..., Any]]:
    """Those of `register_module_forward_hook` and its kind."""
    found: dict[int, Callable[..., Any]] = getattr(torchs, f"_global{hooks}")
    return found


def act_on_gradients(network: nn.Module) -> bool:
    """Whether there are hooks that run in the backward pass of a step."""
    tables = [getattr(m, hooks) for m in network.modules() for hooks in _OF_GRADIENTS]
    tables += [_of_all_modules(hooks) for hooks in _OF_GRADIENTS]
    return any(tables) or any(p._backward_hooks for p in network.parameters())


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
    tables = [getattr(m, hooks) for m in network.modules() for hooks in _OF_GRADIENTS]
    held = [hooks for hooks in (*tables, *map(_of_all_modules, _OF_GRADIENTS)) if hooks]
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
