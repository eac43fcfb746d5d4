"""What and where: the meta-networks f and g, and the weights w (eq. 2) and λ (eq. 3) that they give."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.choices import What, Where
from l2t_fast.errors import L2TError


class _Inward(torch.autograd.Function):
    """relu6; where it holds λ at 0 or 6, a gradient passes if descent moves λ inwards, as a projected gradient does."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return F.relu6(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return g.masked_fill(((z <= 0) & (g > 0)) | ((z >= 6) & (g < 0)), 0)


def _inward(z: Tensor) -> Tensor:
    out: Tensor = _Inward.apply(z)
    return out


_RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "relu6-inward": _inward,
    "relu": F.relu,
    "relu-avg": F.relu,
}


class Constant(nn.Module):
    """The parameter of a pair weight that does not see the image: λ = softplus(10 a)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))


def check_kinds(what: What, where: Where) -> None:
    """Raises L2TError for a kind of weights that there is not."""
    if what not in ("softmax", "uniform"):
        raise L2TError(f"what='{what}' is unknown: use 'softmax' or 'uniform'.")
    if where not in (*_RECTIFIERS, "softplus", "fixed"):
        raise L2TError(f"where='{where}' is unknown: use {', '.join(map(repr, _RECTIFIERS))}, 'softplus' or 'fixed'.")


def what_head(what: What, C_s: int) -> nn.Module | None:
    """f of a pair, which starts at zero, so that w = 1/C_s; none for "uniform"."""
    return _linear(C_s, C_s, weight=0.0, bias=0.0) if what == "softmax" else None


def where_head(where: Where, C_s: int) -> nn.Module | None:
    """g of a pair, whose bias starts at one; none for "fixed"."""
    if where == "fixed":
        return None
    return Constant() if where == "softplus" else _linear(C_s, 1, bias=1.0)


def channel_weights(what: What, heads: nn.ModuleList, group: Sequence[int], pooled: Tensor) -> Tensor:
    """w [P, B, C_s] of the P pairs in `group`, which share a source layer, from its pooled feature [B, C_s]."""
    P, (B, C_s) = len(group), pooled.shape
    if what == "uniform":
        return pooled.new_full((), 1 / C_s).expand(P, B, C_s)
    weight, bias = (torch.stack(tensors) for tensors in _parameters(heads, group, "weight", "bias"))
    # The weights as the first factor, so that their gradients come out laid out in memory as they are.
    logits = torch.baddbmm(bias[:, :, None], weight, pooled.T.expand(P, C_s, B))  # [P, C_s, B]
    return F.softmax(logits, 1).mT  # [P, B, C_s]


def pair_weights(where: Where, heads: nn.ModuleList, group: Sequence[int], pooled: Tensor) -> Tensor:
    """λ [P, B] of the P pairs in `group`, likewise."""
    P, (B, C_s) = len(group), pooled.shape
    if where == "fixed":
        return pooled.new_ones(()).expand(P, B)
    if where == "softplus":
        (a,) = _parameters(heads, group, "a")
        return F.softplus(10 * torch.stack(a))[:, None].expand(P, B)
    weight, bias = (torch.cat(tensors) for tensors in _parameters(heads, group, "weight", "bias"))
    scaled = pooled / C_s if where == "relu-avg" else pooled
    return _RECTIFIERS[where](torch.addmm(bias[:, None], weight, scaled.T))


def _parameters(heads: nn.ModuleList, group: Sequence[int], *names: str) -> list[list[Tensor]]:
    """Of each name, the parameters of the heads in `group`."""
    return [[getattr(heads[p], name) for p in group] for name in names]


def _linear(inputs: int, outputs: int, *, bias: float, weight: float | None = None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.constant_(layer.bias, bias)
    if weight is not None:
        nn.init.constant_(layer.weight, weight)
    return layer
