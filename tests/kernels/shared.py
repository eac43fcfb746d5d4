"""Inputs of the matching operators, and what users write in their networks, for tests of both."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int]

# (source shapes [C, h, w], target shapes [C, H, W], pairs (m, n))
SMALL_SHAPES: dict[str, tuple[list[Shape], list[Shape], list[tuple[int, int]]]] = {
    "one pair": ([(3, 4, 4)], [(2, 4, 4)], [(0, 0)]),
    "up and down": ([(3, 2, 2), (5, 8, 8)], [(4, 4, 4), (2, 1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "ragged 7/3, not square": ([(3, 3, 2), (1, 7, 5)], [(2, 7, 5), (3, 3, 2)], [(1, 1), (0, 0)]),
    "an unpaired layer": ([(2, 3, 3)], [(2, 3, 3), (3, 2, 2)], [(0, 1)]),
    "a pair twice over": ([(2, 3, 3), (2, 3, 3)], [(2, 3, 3)], [(0, 0), (1, 0), (0, 0)]),
}
# Several sources x several targets, in no order, one pair twice, one target layer unpaired.
MANY = (
    [(3, 2, 2), (5, 8, 8), (2, 4, 4)],
    [(4, 4, 4), (3, 2, 2), (2, 1, 1), (6, 3, 5)],
    [(1, 2), (0, 3), (2, 0), (1, 0), (2, 2), (0, 0), (1, 0), (2, 3)],
)
SHAPES = {
    **SMALL_SHAPES,
    "many pairs": MANY,
    "two source networks": ([(3, 4, 4), (5, 2, 2)] * 2, [(4, 4, 4), (6, 2, 2)], [(0, 0), (1, 1), (2, 0), (3, 1)]),
    "3 channels, up by 2": ([(17, 7, 7)], [(3, 14, 14)], [(0, 0)]),
    "17 channels, down by 2": ([(3, 14, 14)], [(17, 7, 7)], [(0, 0)]),
    "64 channels, up by 7/3": ([(64, 3, 3)], [(64, 7, 7)], [(0, 0)]),
    "65 channels, down by 7/3": ([(17, 7, 7)], [(65, 3, 3)], [(0, 0)]),
    "65 channels, up by 2": ([(65, 1, 1)], [(65, 2, 2)], [(0, 0)]),
    "1 x 1, down by 4": ([(17, 4, 4)], [(64, 1, 1)], [(0, 0)]),
    "one side the same": ([(3, 4, 8), (2, 8, 4)], [(3, 4, 4)], [(0, 0), (1, 0)]),
    "up by 4 and down by 2": ([(3, 2, 8)], [(3, 8, 4)], [(0, 0)]),
}


class Reversal(torch.autograd.Function):
    """A user's own that goes on with the same tensor, and turns its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


def random_inputs(
    sources: Sequence[Shape], targets: Sequence[Shape], pairs: Sequence[tuple[int, int]], batch: int = 3, seed: int = 0
) -> tuple:
    """(targets, sources, projections, biases, a, source_of, target_of), float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return (
        [rand(batch, *shape) for shape in targets],
        [rand(batch, *shape) for shape in sources],
        [rand(sources[m][0], targets[n][0], 1, 1) for m, n in pairs],
        [rand(sources[m][0]) for m, _ in pairs],
        [rand(batch, sources[m][0]) for m, _ in pairs],
        [m for m, _ in pairs],
        [n for _, n in pairs],
    )


def flat(lists: Iterable[Iterable[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(t for tensors in lists for t in tensors)
