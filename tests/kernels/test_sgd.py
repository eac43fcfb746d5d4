"""The fused SGD step and its adjoint against torch.optim and autograd; Triton in the interpreter, or on a GPU."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.sgd import step, triton_kernels
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.sgd.step import sgd_adjoint_, sgd_step, sgd_step_

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = [SGD(), SGD(0.0, 0.0), SGD(0.8, 1e-2, nesterov=True)]
ULP = 2**-7  # of bfloat16; the interpreter cuts where hardware rounds
SHAPES = [(3,), (2, 5, 3, 3), (1, 1), (4, 7), (2, 4, 1, 1), (0,)]


@pytest.fixture(params=["aten", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton with blocks so small that parameters need several, and launches of at most four parameters."""
    monkeypatch.setattr(step, "fused", lambda tensors: request.param == "triton")
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)
    monkeypatch.setattr(triton_kernels, "LIMIT", 4)
    triton_kernels.program_table.cache_clear()
    yield str(request.param)
    triton_kernels.program_table.cache_clear()  # of small blocks


def tensors(seed: int, dtype: torch.dtype = torch.float64, layout: Any = torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [t.to(DEVICE, dtype, memory_format=layout if t.dim() == 4 else torch.preserve_format) for t in drawn]


def lr(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_step_is_that_of_torch(rule: SGD, implementation: str) -> None:
    theta = tensors(0)
    parameters = [p.clone().requires_grad_() for p in theta]
    optimizer = torch.optim.SGD(
        parameters, lr=1.0, momentum=rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov
    )
    v = [torch.zeros_like(p) for p in theta]
    in_place = [p.clone() for p in theta], [p.clone() for p in v]
    for i, alpha in enumerate((0.1, 0.02)):
        g = tensors(10 + i)
        given = [None if k == 3 else x for k, x in enumerate(g)]  # no gradient: it counts as zero
        for k, (p, x) in enumerate(zip(parameters, g, strict=True)):
            p.grad = torch.zeros_like(x) if k == 3 else x
        optimizer.param_groups[0]["lr"] = alpha
        optimizer.step()
        old = [p.clone() for p in (*theta, *v)]
        new = sgd_step(theta, v, given, lr(alpha), rule)
        torch.testing.assert_close([*theta, *v], old, rtol=0, atol=0)
        sgd_step_(*in_place, given, lr(alpha), rule)
        theta, v = new
        torch.testing.assert_close(theta, [p.detach() for p in parameters], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close([*in_place[0], *in_place[1]], [*theta, *v], rtol=0, atol=0)


@pytest.mark.parametrize("velocity", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_adjoint_is_that_of_autograd(rule: SGD, velocity: bool, implementation: str) -> None:
    theta, v, g = ([p.requires_grad_() for p in tensors(seed)] for seed in range(3))
    given = [None if k == 3 else x for k, x in enumerate(g)]
    u_theta, u_v = tensors(3), tensors(4) if velocity else [torch.zeros_like(p) for p in theta]
    ends = [end for p, x, y in zip(theta, v, given, strict=True) for end in plain_step(p, x, y, 0.3, rule)]
    inputs = [*theta, *v, *(x for x in given if x is not None)]
    cotangents = list(itertools.chain.from_iterable(zip(u_theta, u_v, strict=True)))
    expected = torch.autograd.grad(ends, inputs, cotangents, allow_unused=True, materialize_grads=True)
    g_bar, v_bar = sgd_adjoint_(u_theta, u_v if velocity else None, dtypes(given), lr(0.3), rule)
    assert [x is None for x in g_bar] == [x is None for x in given]
    actual = [*u_theta, *v_bar, *(x for x in g_bar if x is not None)]
    torch.testing.assert_close(actual, list(expected), rtol=1e-13, atol=1e-13)


def dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if x is None else x.dtype for x in tensors]


def plain_step(p: Tensor, v: Tensor, g: Tensor | None, alpha: float, rule: SGD) -> tuple[Tensor, Tensor]:
    g = rule.weight_decay * p + (0 if g is None else g)
    v = rule.momentum * v + g
    return p - alpha * (g + rule.momentum * v if rule.nesterov else v), v


@pytest.mark.parametrize("layouts", list(itertools.product((torch.contiguous_format, torch.channels_last), repeat=2)))
def test_gradients_of_lower_precision_and_another_layout(layouts: tuple[Any, Any], implementation: str) -> None:
    rule = SGD()
    theta, v = tensors(0, torch.float32, layouts[0]), tensors(1, torch.float32, layouts[0])
    g = [x.bfloat16() if k in (1, 3) else x for k, x in enumerate(tensors(2, torch.float32, layouts[1]))]
    exact = sgd_step([p.double() for p in theta], [x.double() for x in v], [x.double() for x in g], lr(0.1), rule)
    new_theta, new_v = sgd_step(theta, v, g, lr(0.1), rule)
    for results, wanted in zip((new_theta, new_v), exact, strict=True):
        assert all(x.dtype == torch.float32 for x in results)
        torch.testing.assert_close([x.double() for x in results], wanted, rtol=1e-6, atol=1e-6)
    u_theta, u_v = tensors(3, torch.float32, layouts[0]), tensors(4, torch.float32, layouts[0])
    wide = [x.double() for x in u_theta], [x.double() for x in u_v]
    wanted_bar, _ = sgd_adjoint_(*wide, dtypes(wide[0]), lr(0.1), rule)
    g_bar, _ = sgd_adjoint_(u_theta, u_v, dtypes(g), lr(0.1), rule)
    assert [x.dtype for x in g_bar if x is not None] == [x.dtype for x in g]
    for x, y in zip(g_bar, wanted_bar, strict=True):
        assert x is not None
        assert y is not None
        torch.testing.assert_close(x.double(), y, rtol=ULP if x.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for up to 96 parameters alike, whatever their sizes."""
    launched: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, arguments, *_: launched.append(len(arguments["theta"])))
    theta = [torch.zeros(n) for n in range(1, 98)]
    triton_kernels.step(theta, theta, theta, lr(0.1), SGD())
    assert launched == [96, 1]
    launched.clear()
    mixed = [None if i % 3 == 0 else p.bfloat16() if i % 3 == 1 else p for i, p in enumerate(theta[:90])]
    triton_kernels.step(theta[:90], theta[:90], mixed, lr(0.1), SGD())
    assert launched == [30, 30, 30]
