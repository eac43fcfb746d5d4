"""The gradient of a bias in front of a BatchNorm, which is zero: nothing where nobody looks, zeros for all others."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.kernels.layers import convolution
from l2t_fast.kernels.layers.autograd import may_lack, zeros_left_out
from l2t_fast.kernels.layers.batch_norm import batch_norm

pytestmark = pytest.mark.core

GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "leaves_out_zero_sums", convolution.has_zero_sums)


def leaves(unwatched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and a bias."""
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 4), (4, 3, 3, 3)))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    may_lack(bias, unwatched)
    return x, w.requires_grad_(), bias


def normalised(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    ones = torch.ones(4, dtype=torch.float64)
    return F.softplus(batch_norm(convolution.convolution(x, w, bias, *GEOMETRY), ones, ones, 1e-5)[0]).sum()


@pytest.mark.parametrize("unwatched", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_left_out_where_nobody_looks(unwatched: bool, ours: bool) -> None:
    """In gradients that the engine takes of what it put in a parameter's place."""
    x, w, bias = leaves(unwatched)
    y = normalised(x, w, bias)
    if ours:
        with zeros_left_out():
            (found,) = torch.autograd.grad(y, bias, allow_unused=True)
    else:
        (found,) = torch.autograd.grad(y, bias, allow_unused=True)
    if unwatched and ours:
        assert found is None
    else:
        torch.testing.assert_close(found, torch.zeros_like(bias), rtol=0, atol=1e-12)


def test_a_hook_of_the_forward_pass_is_called() -> None:
    x, w, bias = leaves(unwatched=True)
    y = normalised(x, w, bias)
    bias.register_hook(lambda g: g + 0.5)
    with zeros_left_out():
        (found,) = torch.autograd.grad(y, bias)
    torch.testing.assert_close(found, torch.full_like(bias, 0.5))


def test_a_bias_that_does_something_has_its_gradient() -> None:
    x, w, bias = leaves(unwatched=True)
    y = convolution.convolution(x, w, bias, *GEOMETRY).square().sum()
    wanted = 2 * F.conv2d(x, w, bias, padding=1).sum((0, 2, 3))
    with zeros_left_out():
        torch.testing.assert_close(torch.autograd.grad(y, bias)[0], wanted)


class Again(torch.autograd.Function):
    """A user's own checkpoint: the backward runs the forward pass once more, and wants every gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        ctx.inputs = x, w, bias
        with torch.no_grad():
            return normalised(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            y = normalised(*ctx.inputs)
        return None, *torch.autograd.grad(y, ctx.inputs[1:], g)


def test_a_backward_pass_of_someones_own_has_all_gradients() -> None:
    x, w, bias = leaves(unwatched=True)
    y = Again.apply(x, w, bias)
    with zeros_left_out():
        of_w, of_bias = torch.autograd.grad(y, (w, bias))
    assert not of_bias.any()
    torch.testing.assert_close(of_w, torch.autograd.grad(normalised(x, w, bias), w)[0])
