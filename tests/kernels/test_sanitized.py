"""Every Triton kernel on a GPU at small shapes, for tools that watch each access to memory:

python -m pytest -q tests/kernels/test_sanitized.py    (compiles them)
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m pytest -q tests/kernels/test_sanitized.py
"""

import pytest
import torch
from torch import Tensor

from l2t_fast.kernels.layers import batch_norm_triton
from l2t_fast.kernels.matching import triton_launch
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.sgd.step import sgd_adjoint_, sgd_step
from tests.kernels.triton_shared import DEVICE, INTERPRETED, gradient_and_adjoint, laid_out, problem

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]

# Ragged in every way: channels beside powers of two, several chunks, tiles that no sample fills, resizes both ways.
SHAPES = [(17, 3, 3), (40, 5, 7)], [(33, 5, 7), (257, 3, 2)], [(0, 0), (1, 0), (1, 1), (0, 1)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
@pytest.mark.parametrize(("features", "products"), [(torch.bfloat16, "highest"), (torch.float32, "high")])
def test_matching(features: torch.dtype, products: str, layout: str) -> None:
    inputs, u = problem(SHAPES, 5, 0, features, torch.float32)
    inputs = laid_out(inputs, [layout], [layout])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        outputs = gradient_and_adjoint(triton_launch, inputs, u)
        alone = triton_launch.matching_distances(*inputs[:4], *inputs[5:])
        first = triton_launch.matching_adjoint(*inputs[:5], *u, *inputs[5:], False)[3]
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(x.isfinite().all() for x in (*outputs, *alone, *first))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32])
def test_batch_norm(features: torch.dtype, layout: torch.memory_format) -> None:
    u, g, x = (randn(5, 70, 7, 5, dtype=features).contiguous(memory_format=layout) for _ in range(3))
    channels = [randn(70) for _ in range(7)]
    outputs = batch_norm_triton.adjoint(u, *channels[:2], g, x, *channels[2:], True)
    assert all(y is not None and y.isfinite().all() for y in outputs)
    gamma, beta, mean, rstd = channels[:4]
    for summand in (g, None):
        y = batch_norm_triton.forward(x, gamma, beta, mean, rstd, summand, True)
        mask = (beta, y if summand is not None else None)
        first = batch_norm_triton.gradient(g, x, gamma, mean, rstd, mask, u, passed=True)
        second = batch_norm_triton.adjoint(u, gamma, beta, g, x, gamma, mean, rstd, *first[1:3], True, mask, g)
        assert all(t is not None and t.isfinite().all() for t in (y, *first, *second))


@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32])
def test_sgd(features: torch.dtype) -> None:
    shapes = [(3,), (70, 33, 3, 3), (4097,)]
    theta, v, u_theta, u_v = ([randn(*shape) for shape in shapes] for _ in range(4))
    g = [randn(*shape, dtype=features) for shape in shapes]
    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    new_theta, new_v = sgd_step(theta, v, g, lr, SGD())
    g_bar, v_bar = sgd_adjoint_(u_theta, u_v, [features] * len(shapes), lr, SGD())
    assert all(x is not None and x.isfinite().all() for x in (*new_theta, *new_v, *g_bar, *v_bar, *u_theta))
