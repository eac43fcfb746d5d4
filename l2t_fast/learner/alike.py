"""Whether two passes gave the same, where a GPU may add up in another order each time."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest norm: a gradient that is zero but for rounding (of a bias before a BatchNorm) has no digits.
_FLOOR = 1e-6


def unordered(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels that made these may round otherwise when they run again."""
    return any(t.is_cuda for t in tensors)


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether the tensors are the same but for rounding: by norms, and NaN and infinities at the same places."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    pairs = [_finite(one, other) for one, other in zip(ours, theirs, strict=True)]
    largest = max((other.norm() for (_, other), t in zip(pairs, theirs, strict=True) if not _whole(t)), default=0.0)
    return all(_same_rest(one, other) for one, other in zip(ours, theirs, strict=True)) and all(
        bool((one - other).norm() <= (0.0 if _whole(t) else tolerance * other.norm() + _FLOOR * largest))
        for (one, other), t in zip(pairs, theirs, strict=True)
    )


def _whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _finite(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """What is finite in both, in double precision."""
    both = one.isfinite() & other.isfinite()
    return tuple(t[both].to(torch.promote_types(t.dtype, torch.float64)) for t in (one, other))  # type: ignore[return-value]


def _same_rest(one: Tensor, other: Tensor) -> bool:
    rest = ~(one.isfinite() & other.isfinite())
    return torch.allclose(one[rest], other[rest], equal_nan=True)
