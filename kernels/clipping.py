"""Clipping of a gradient by its global norm, as `torch.nn.utils.clip_grad_norm_`, and its adjoint.

c = min(1, C / (n + 10⁻⁶)) with n the norm over all parameters,   ∇' = c ∇
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-6


def clip(g: Sequence[Tensor | None], max_norm: float) -> tuple[list[Tensor | None], Tensor]:
    """(∇', n); None stays None. All of one device."""
    given = [x for x in g if x is not None]
    if not given:
        return list(g), torch.zeros(())
    n = torch.stack(torch._foreach_norm(given)).norm()
    return clipped(g, n, max_norm), n


def clipped(g: Sequence[Tensor | None], n: Tensor, max_norm: float) -> list[Tensor | None]:
    """∇' where n is known."""
    given = [x for x in g if x is not None]
    scaled = iter(torch._foreach_mul(given, (max_norm / (n + _EPSILON)).clamp_max(1)) if given else ())
    return [None if x is None else next(scaled) for x in g]


def clip_adjoint(
    u: Sequence[Tensor | None], g: Sequence[Tensor | None], n: Tensor, max_norm: float
) -> list[Tensor | None]:
    """The adjoint of `clip` in the direction u, at ∇ with norm n.

    ∇̄ = c u − (c / (n + 10⁻⁶)) ⟨∇, u⟩ ∇ / n   where it clips, else u
    """
    pairs = [(a, x) for a, x in zip(u, g, strict=True) if a is not None and x is not None]
    if not pairs:
        return list(u)
    us, xs = map(list, zip(*pairs, strict=True))
    c = max_norm / (n + _EPSILON)
    inner = torch.stack([(a * x).sum() for a, x in pairs]).sum()
    along = (c * inner / ((n + _EPSILON) * n)).masked_fill(c >= 1, 0.0)
    bar = torch._foreach_mul(us, c.clamp_max(1))
    torch._foreach_sub_(bar, torch._foreach_mul(xs, along))
    found = iter(bar)
    return [None if a is None or x is None else next(found) for a, x in zip(u, g, strict=True)]
