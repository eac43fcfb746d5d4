"""The AdamW step, the clipping of a gradient, and their adjoints, against torch.optim and autograd in float64."""

import pytest
import torch
from torch import Tensor

from l2t_fast.kernels.adamw.rule import AdamW
from l2t_fast.kernels.adamw.step import Moments, adamw_adjoint_, adamw_step
from l2t_fast.kernels.clipping import clip, clip_adjoint

pytestmark = pytest.mark.core

RULES = [AdamW(), AdamW((0.8, 0.95), 1e-4, 0.1), AdamW((0.0, 0.9), 1e-6, 0.0)]
SHAPES = [(3,), (2, 5, 3, 3), (1, 1), (), (0,)]
NONE = 1  # the parameter without a gradient


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def without(g: list[Tensor]) -> list[Tensor | None]:
    return [None if k == NONE else x for k, x in enumerate(g)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_step_is_that_of_torch(rule: AdamW, dtype: torch.dtype) -> None:
    theta = tensors(0, dtype)
    parameters = [p.clone().requires_grad_() for p in theta]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay, foreach=False
    )
    moments = Moments([torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta])
    for i, alpha in enumerate((0.1, 0.02, 0.3)):
        g = tensors(10 + i, dtype)
        for k, (p, x) in enumerate(zip(parameters, g, strict=True)):
            p.grad = torch.zeros_like(x) if k == NONE else x
        optimizer.param_groups[0]["lr"] = alpha
        optimizer.step()
        old = [t.clone() for t in (*theta, *moments.m, *moments.s)]
        new = adamw_step(theta, moments, without(g), scalar(i + 1.0), scalar(alpha), rule)
        torch.testing.assert_close([*theta, *moments.m, *moments.s], old, rtol=0, atol=0)
        theta, moments = new
        tolerance = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(theta, [p.detach() for p in parameters], rtol=tolerance, atol=tolerance)
        assert all(t.dtype == dtype for t in (*theta, *moments.m, *moments.s))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("with_moments", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_adjoint_is_that_of_autograd(rule: AdamW, with_moments: bool, fresh: bool) -> None:
    """fresh: no gradient has ever been there; of the parameter without one the second moment is zero."""
    theta, m, s, g = (tensors(seed) for seed in range(4))
    s = [x.square() for x in s]
    if fresh:
        m, s = [torch.zeros_like(x) for x in m], [torch.zeros_like(x) for x in s]
    leaves = [x.requires_grad_() for x in (*theta, *m, *s, *g)]
    t, alpha, (beta1, beta2) = 3, 0.3, rule.betas
    ends: list[Tensor] = []
    for k, (p, a, b, x) in enumerate(zip(theta, m, s, g, strict=True)):
        x = 0 * x if k == NONE else x
        a, b = beta1 * a + (1 - beta1) * x, beta2 * b + (1 - beta2) * x * x
        root = torch.where(b == 0, 0.0, torch.where(b == 0, 1.0, b).sqrt())
        D = root / (1 - beta2**t) ** 0.5 + rule.eps
        ends += [p * (1 - alpha * rule.weight_decay) - alpha / (1 - beta1**t) * a / D, a, b]
    u_theta, u_m, u_s = tensors(5), tensors(6), tensors(7)
    if not with_moments:
        u_m, u_s = [torch.zeros_like(x) for x in u_m], [torch.zeros_like(x) for x in u_s]
    u = [x for row in zip(u_theta, u_m, u_s, strict=True) for x in row]
    wanted = torch.autograd.grad(ends, leaves, u)
    with torch.no_grad():
        given = without(g)
        _, after = adamw_step(theta, Moments(m, s), given, scalar(t), scalar(alpha), rule)
        arguments = after, given, scalar(t), scalar(alpha), rule
        g_bar, bar = adamw_adjoint_(u_theta, Moments(u_m, u_s) if with_moments else None, *arguments)
    n = len(SHAPES)
    found = [*u_theta, *bar.m, *bar.s, *(torch.zeros_like(x) if k == NONE else x for k, x in enumerate(g_bar))]
    torch.testing.assert_close(found[: 3 * n], list(wanted[: 3 * n]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3 * n :], list(wanted[3 * n :]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.3, 1e3])
def test_clipping_is_that_of_torch_and_its_adjoint_that_of_autograd(max_norm: float) -> None:
    g, u = tensors(0), tensors(1)
    given = without(g)
    parameters = [torch.zeros_like(x).requires_grad_() for x in g]
    for p, x in zip(parameters, given, strict=True):
        p.grad = None if x is None else x.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, n = clip(given, max_norm)
    assert clipped[NONE] is None
    for x, p in zip(clipped, parameters, strict=True):
        assert x is None or torch.allclose(x, p.grad, rtol=1e-13)  # type: ignore[arg-type]
    leaves = [x.requires_grad_() for k, x in enumerate(g) if k != NONE]
    c = (max_norm / (torch.cat([x.flatten() for x in leaves]).norm() + 1e-6)).clamp(max=1.0)
    assert (c < 1) == (max_norm < 1)
    cotangents = [x for k, x in enumerate(u) if k != NONE]
    wanted = torch.autograd.grad([c * x for x in leaves], leaves, cotangents)
    with torch.no_grad():
        found = [x for x in clip_adjoint(without(u), given, n, max_norm) if x is not None]
    torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-13)


def test_a_gradient_of_zeros_is_not_clipped() -> None:
    zeros: list[Tensor | None] = [torch.zeros(3, dtype=torch.float64), None]
    clipped, n = clip(zeros, 1.0)
    ones: list[Tensor | None] = [torch.ones(3, dtype=torch.float64), None]
    assert torch.equal(clipped[0], zeros[0])  # type: ignore[arg-type]
    assert torch.equal(clip_adjoint(ones, zeros, n, 1.0)[0], ones[0])  # type: ignore[arg-type]
