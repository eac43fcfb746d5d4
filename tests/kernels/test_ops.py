"""The matching operators against plain autograd, finite differences and PyTorch's own operator checks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from l2t_fast.kernels.matching import ops
from tests.kernels.shared import SMALL_SHAPES, flat, random_inputs

pytestmark = pytest.mark.core


@pytest.fixture(params=SMALL_SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple:
    """(targets, sources, projections, biases, a, source_of, target_of), float64, random."""
    torch.manual_seed(0)
    targets, sources, *rest = random_inputs(*SMALL_SHAPES[request.param])
    for x in flat((targets, *rest[:3])):
        x.requires_grad_()
    return (targets, sources, *rest)


def plain_distances(targets, sources, projections, biases, source_of, target_of) -> list[Tensor]:
    """E in the plainest PyTorch."""
    E = []
    for r, bias, m, n in zip(projections, biases, source_of, target_of, strict=True):
        S, T = sources[m], targets[n]
        if S.shape[2:] != T.shape[2:]:
            S = F.interpolate(S, size=T.shape[2:], mode="bilinear", align_corners=False)
        E.append((F.conv2d(T, r, bias) - S).square().mean((2, 3)))
    return E


def plain_gradient(targets, sources, projections, biases, a, source_of, target_of) -> tuple[Tensor, ...]:
    """(E..., g_T..., g_r..., g_bias...) by autograd, differentiable again."""
    E = plain_distances(targets, sources, projections, biases, source_of, target_of)
    loss = sum((a_p * E_p).sum() for a_p, E_p in zip(a, E, strict=True))
    inputs = [*targets, *projections, *biases]
    g = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    return (*E, *(torch.zeros_like(x) if g_x is None else g_x for x, g_x in zip(inputs, g, strict=True)))


def assert_close(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_distances(case: tuple) -> None:
    targets, sources, projections, biases, _, *indices = case
    ours = torch.ops.l2t.matching_distances(targets, sources, projections, biases, *indices)
    assert_close(ours, plain_distances(targets, sources, projections, biases, *indices))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient(case: tuple, layout: torch.memory_format) -> None:
    targets, *rest = case
    targets = [t.contiguous(memory_format=layout) for t in targets]
    E, g_T, g_r, g_bias = torch.ops.l2t.matching_gradient(targets, *rest, True)
    assert_close((*E, *g_T, *g_r, *g_bias), plain_gradient(targets, *rest))
    assert all(g.stride() == t.stride() for g, t in zip(g_T, targets, strict=True))
    assert torch.ops.l2t.matching_gradient(targets, *rest, False)[0] == []


def test_adjoint(case: tuple) -> None:
    """The registered backward against autograd through the plain gradient."""
    targets, _, projections, biases, a, *_ = case
    inputs = [*targets, *projections, *biases, *a]
    outputs = [
        (ours, theirs, torch.randn_like(theirs))
        for ours, theirs in zip(flat(torch.ops.l2t.matching_gradient(*case, True)), plain_gradient(*case), strict=True)
        if theirs.requires_grad  # all but g_T of a layer without a pair
    ]
    ours, theirs, u = zip(*outputs, strict=True)
    theirs = torch.autograd.grad(theirs, inputs, u, allow_unused=True)
    ours = torch.autograd.grad(ours, inputs, u)
    assert_close(ours, [torch.zeros_like(x) if v is None else v for x, v in zip(inputs, theirs, strict=True)])


def test_first_step_needs_only_v_a(case: tuple) -> None:
    """With constant features and projections the adjoint gives v_a alone, the same one."""
    targets, sources, projections, biases, a, *indices = case
    full = flat(ops.matching_gradient(targets, sources, projections, biases, a, *indices, False))
    u = [torch.randn_like(x) for x in full]
    theirs = torch.autograd.grad(full, a, u)
    constants = [[t.detach() for t in tensors] for tensors in (targets, sources, projections, biases)]
    ours = torch.autograd.grad(flat(ops.matching_gradient(*constants, a, *indices, False)), a, u)
    assert_close(ours, theirs)


def test_gradcheck_and_gradgradcheck(case: tuple) -> None:
    targets, sources, projections, biases, a, *indices = case
    split = (len(targets), len(projections), len(biases))

    def distances(*x: Tensor) -> tuple[Tensor, ...]:
        T, r, bias = _split(x, split)
        return tuple(ops.matching_distances(T, sources, r, bias, *indices))

    def gradient(*x: Tensor) -> tuple[Tensor, ...]:
        T, r, bias, a_ = _split(x, (*split, len(a)))
        return flat(ops.matching_gradient(T, sources, r, bias, a_, *indices, True))

    primal = (*targets, *projections, *biases)
    assert torch.autograd.gradcheck(distances, primal)
    assert torch.autograd.gradgradcheck(distances, primal)
    assert torch.autograd.gradcheck(gradient, (*primal, *a))


def _split(x: tuple[Tensor, ...], lengths: tuple[int, ...]) -> list[list[Tensor]]:
    tensors = iter(x)
    return [[next(tensors) for _ in range(length)] for length in lengths]


def test_opcheck(case: tuple) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch."""
    targets, sources, projections, biases, _, *indices = case
    torch.library.opcheck(ops.matching_distances, (targets, sources, projections, biases, *indices))
    torch.library.opcheck(ops.matching_gradient, (*case, True))
    u = [[torch.randn_like(t) for t in tensors] for tensors in (targets, projections, biases)]
    for primal in (True, False):
        arguments = torch.utils._pytree.tree_map_only(Tensor, torch.Tensor.detach, (*case[:5], *u))
        torch.library.opcheck(ops.matching_adjoint, (*arguments, *indices, primal))


def test_third_order_is_refused(case: tuple) -> None:
    targets, *rest = case
    g_T = ops.matching_gradient(targets, *rest, False)[1][rest[-1][0]]
    (v_a,) = torch.autograd.grad(g_T.sum(), rest[3][0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(v_a.sum(), rest[1][0])


def test_flop_counts() -> None:
    """In units of the product r T: 1, 3, and 7 or (v_a alone) 3."""
    T, S = [torch.randn(2, 5, 4, 4)], [torch.randn(2, 3, 4, 4)]
    r, bias, a = [torch.randn(3, 5, 1, 1)], [torch.randn(3)], [torch.rand(2, 3)]
    unit = 2 * 2 * 3 * 5 * 16

    def count(operator: Callable[..., Any], *arguments: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            operator(*arguments)
        return counter.get_total_flops() / unit

    assert count(ops.matching_distances, T, S, r, bias, [0], [0]) == 1
    assert count(ops.matching_gradient, T, S, r, bias, a, [0], [0], True) == 3
    assert count(ops.matching_adjoint, T, S, r, bias, a, T, r, bias, [0], [0], True) == 7
    assert count(ops.matching_adjoint, T, S, r, bias, a, T, r, bias, [0], [0], False) == 3
