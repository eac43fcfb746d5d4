"""Device functions that the Triton kernels of several operators share."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def pick(pointers, i, FIRST: tl.constexpr, LAST: tl.constexpr):
    """pointers[i], FIRST <= i < LAST."""
    pointer = pointers[FIRST]
    for k in tl.static_range(FIRST + 1, LAST):
        pointer = tl.where(i == k, pointers[k], pointer)
    return pointer
