"""How the reference runs the user's networks: untouched, with what they hold.

Attention runs on PyTorch's math backend, hardsigmoid as a line through PyTorch's value and slope, normalize as x / ε
where x is zero, weight_norm and embeddings as written below, since PyTorch cannot differentiate what it has for them
twice, or does so wrongly.

Backward hooks of parameters and of modules belong to the rule by which a step gets its gradient, g = h(∇L): they act in
real, simulated and replayed steps, and their derivative is taken. They do not act a second time when that derivative,
or the one of L_meta, passes the same parameters and modules on its way back. (A custom `autograd.Function`, or a hook
that a forward pass registers on a tensor in between, defines what a derivative is: it acts wherever autograd passes.)
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torchs
from torch.overrides import TorchFunctionMode

from l2t_fast.errors import L2TError

Maps = Mapping[str, Callable[[Any], Tensor]]


class Generators(NamedTuple):
    """States of the random generators of torch, on the CPU and on the device, of Python and of numpy."""

    cpu: Tensor
    cuda: tuple[torch.device, Tensor] | None
    python: Any
    numpy: Any

    @classmethod
    def get(cls, device: torch.device) -> "Generators":
        """Their present states."""
        cuda = (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
        numpy = np.random.get_state()  # noqa: NPY002  the one that modules use
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy)

    def set(self) -> None:
        """Puts them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda[1], self.cuda[0])
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """h(x₀) + h'(x₀) (x − x₀) at x₀ = x: PyTorch's own value and slope, and no curvature."""
    with torch.enable_grad():
        x0 = input.detach().clone().requires_grad_()
        h0 = F.hardsigmoid(x0)
        (slope,) = torch.autograd.grad(h0.sum(), x0)
    h = h0.detach() + slope * (input - x0.detach())
    return input.copy_(h) if inplace else h


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """x / max(|x|, ε), with no norm of a zero vector in the graph."""
    zero = input.norm(p, dim, keepdim=True).detach() == 0
    return torch.where(zero, input / eps, F.normalize(input.masked_fill(zero, 1.0), p, dim, eps))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, whose second derivative PyTorch gets wrong."""
    others = [i for i in range(v.dim()) if dim == -1 or i != dim]
    return g * v / v.square().sum(others, keepdim=True).sqrt()


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Likewise, where the gradient of a row is divided by how often it is read."""
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, sparse=sparse)
    counts = (input.flatten()[:, None] == input.flatten()).sum(1).view(input.shape)
    share = 1 / counts.to(rows.dtype)[..., None] if scale_grad_by_freq else torch.ones_like(rows)
    return rows * share + (rows * (1 - share)).detach()


class Replaced(TorchFunctionMode):
    """Puts these in the places of PyTorch's; `met` says whether it had to."""

    met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        table: dict[Any, Any] = {F.hardsigmoid: _hardsigmoid, F.normalize: _normalize}
        table |= {torch._weight_norm: _weight_norm, F.embedding: _embedding}
        self.met |= func in table
        return table.get(func, func)(*args, **(kwargs or {}))


def split(layer: str) -> tuple[str, int | None]:
    """("stage2", 1) of "stage2[1]", and ("stage2", None) of "stage2"."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", layer)
    return (match[1], int(match[2])) if match else (layer, None)


def forward_with_features(
    model: nn.Module, layers: Sequence[str], x: Tensor, maps: Maps | None = None
) -> tuple[Any, list[Tensor]]:
    """The output of `model` on `x` and the features [B, C, H, W] of `layers`, in that order.

    A layer is named as in `named_modules()`; "stage2[1]" is the second tensor of a list or tuple that "stage2" returns.
    `maps` turn what some layers give into [B, C, H, W], by their names in `layers`.

    Raises L2TError where a feature was overwritten in place after its layer returned it.
    """
    maps = maps or {}
    taps: dict[str, tuple[Tensor, int]] = {}

    def record(name: str, index: int | None) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            feature = output if index is None else output[index]
            taps[name] = feature, feature._version

        return hook

    handles = []
    for name in layers:
        module, index = split(name)
        handles.append(model.get_submodule(module).register_forward_hook(record(name, index)))
    try:
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    for name, (feature, version) in taps.items():
        if feature._version != version:
            raise L2TError(f"The output of layer {name!r} is overwritten in place; name the layer after it.")
    return output, [maps[name](taps[name][0]) if name in maps else taps[name][0] for name in layers]


def select(output: Any, logits: int | str | None) -> Tensor:
    """The logits among the outputs of a network, by position, key or attribute; a tensor alone is the logits."""
    if isinstance(output, Tensor) or logits is None:
        return cast(Tensor, output)
    by_name = isinstance(logits, str) and not isinstance(output, Mapping)
    return cast(Tensor, getattr(output, str(logits)) if by_name else output[logits])


@contextmanager
def twice_differentiable(replaced: bool) -> Iterator[None]:
    """Attention as a formula, and what is `Replaced` where it was met."""
    with sdpa_kernel(SDPBackend.MATH), Replaced() if replaced else nullcontext():
        yield


@contextmanager
def switched_hooks(network: nn.Module) -> Iterator[list[str]]:
    """Backward hooks of modules and parameters, which let gradients pass once the list given is not empty.

    For graphs made inside, while inside.
    """
    off: list[str] = []

    def switched(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: None if off else hook(*args)

    owners = [*network.modules(), *network.parameters()]
    names = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    tables = [table for owner in owners for name in names if (table := getattr(owner, name, None))]
    tables += [torchs._global_backward_hooks, torchs._global_backward_pre_hooks]  # of all modules
    saved = [dict(table) for table in tables]
    for table in tables:
        table.update({key: switched(hook) for key, hook in table.items()})
    try:
        yield off
    finally:
        for table, hooks in zip(tables, saved, strict=True):
            table.update(hooks)
