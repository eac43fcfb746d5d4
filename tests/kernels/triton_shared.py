"""Problems for the Triton operators, on a GPU or in Triton's interpreter, and how they are checked against ATen's."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from l2t_fast.kernels.matching import aten, triton_launch
from tests.kernels.shared import flat, random_inputs

INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32  # on a GPU float64 goes to ATen
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}[EXACT]  # of the largest element

# The same numbers in other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced channels last": lambda x: LAYOUTS["channels last"](torch.cat([x, x], 3))[..., : x.shape[3]],
}


def problem(
    shapes: tuple, batch: int = 3, seed: int = 0, features: torch.dtype = EXACT, parameters: torch.dtype | None = None
) -> tuple[list, list]:
    """(inputs, u): features of one dtype, all else of another; u = (u_T, u_r, u_bias) is a second draw of the same."""
    dtypes = [features, features, *[parameters or features] * 3]

    def draw(seed: int) -> list:
        *lists, source_of, target_of = random_inputs(*shapes, batch, seed)
        cast = [[x.to(DEVICE, dtype) for x in tensors] for tensors, dtype in zip(lists, dtypes, strict=True)]
        return [*cast, source_of, target_of]

    u_T, _, u_r, u_bias, *_ = draw(seed + 1000)
    return draw(seed), [u_T, u_r, u_bias]


def laid_out(inputs: list, targets: Sequence[str], sources: Sequence[str]) -> list:
    """`inputs` with these layouts of the targets and of the sources in turn."""
    T = [LAYOUTS[layout](t) for t, layout in zip(inputs[0], itertools.cycle(targets), strict=False)]
    S = [LAYOUTS[layout](s) for s, layout in zip(inputs[1], itertools.cycle(sources), strict=False)]
    return [T, S, *inputs[2:]]


def gradient_and_adjoint(implementation: Any, inputs: list, u: list) -> tuple[Tensor, ...]:
    """(E..., g_T..., g_r..., g_bias..., v_T..., v_r..., v_bias..., v_a...)."""
    gradient = implementation.matching_gradient(*inputs, True)
    return flat((*gradient, *implementation.matching_adjoint(*inputs[:5], *u, *inputs[5:], True)))


def in_float64(inputs: list, u: list) -> tuple[Tensor, ...]:
    return gradient_and_adjoint(aten, *tree_map_only(Tensor, Tensor.double, (inputs, u)))


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        largest = y.abs().max().item()
        torch.testing.assert_close(x.double(), y.double(), rtol=TOLERANCE, atol=TOLERANCE * largest)


def check(inputs: list, u: list) -> tuple[Tensor, ...]:
    """Gradient and adjoint are ATen's, in the promised strides; returns them."""
    ours = gradient_and_adjoint(triton_launch, inputs, u)
    assert_same(ours, in_float64(inputs, u))
    targets, _, projections, biases, a, *_ = inputs
    g_T = [torch.empty_like(t) for t in targets]
    others = [
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs] for xs in (a, projections, biases)
    ]
    E, g_r, g_bias = others
    promised = flat((E, g_T, g_r, g_bias, g_T, g_r, g_bias, E))
    assert [x.stride() for x in ours] == [x.stride() for x in promised]
    return ours
