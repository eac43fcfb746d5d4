"""Convolution with its second order made of the kernels of the first: exact, and cheaper than PyTorch's own.

PyTorch writes the weight part of a convolution's double backward as a convolution whose kernel is a whole feature map.
In the formulas u is the cotangent of a gradient g_•, v_• what its adjoint gives.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2t_fast.kernels.beside import beside, captured, joined
from l2t_fast.kernels.layers.autograd import (
    Last,
    derivatives_wanted,
    has_zero_sums,
    is_left_out,
    is_unwatched,
    read_again,
)
from l2t_fast.kernels.layers.few_places import few_places, weight_gradient

_aten = torch.ops.aten

# Dynamo, tracing a Function inside torch.func.vjp by itself, silently loses the second order; AOTAutograd does not.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """y [B, C_out, H', W'] of x [B, C_in, H, W]; geometry: stride, padding, dilation, groups."""
    return Convolution.apply(x, w, bias, *geometry, read_again(x))  # type: ignore[no-any-return]


class Convolution(torch.autograd.Function):
    """(x [B, C_in, H, W], w, bias or None, stride, padding, dilation, groups) -> y [B, C_out, H', W'].

    again: x, as the gradient is to read it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        again: Tensor | None = None,
    ) -> Tensor:
        return _convolve(x, w, bias, (stride, padding, dilation, groups))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, bias = inputs[:3]
        ctx.geometry, again = inputs[3:7], inputs[7] if len(inputs) > 7 else None
        ctx.save_for_backward(x, w, bias if bias is not None and is_unwatched(bias) else None, again)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, unwatched, again = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if unwatched is not None and leaves_out_zero_sums(g) and is_left_out(unwatched):
            mask = (*mask[:2], False)
        x = x if again is None or x._backward_hooks else again  # hooks may have come since
        return *ConvolutionBackward.apply(g, x, w, mask, *ctx.geometry, read_again(g)), *[None] * 5


class ConvolutionBackward(torch.autograd.Function):
    """(g [B, C_out, H', W'], x, w, mask, *geometry, again) -> (g_x, g_w, g_bias), None where the mask says no.

    again: g, as which the second summand of v_g goes to who made it, or None.
    """

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, mask: Sequence[bool], *others: Any) -> tuple[Tensor | None, ...]:
        *geometry, _ = others
        if not (mask[2] and leaves_out_zero_sums(g)):
            return _convolve_backward(g, x, w, mask, geometry)
        g_x, g_w, _ = _convolve_backward(g, x, w, (*mask[:2], False), geometry)
        return g_x, g_w, g.new_zeros(w.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, w, _, *ctx.geometry, again = inputs
        ctx.apart = again is not None
        ctx.wanted = derivatives_wanted(ctx.needs_input_grad[:3])
        ctx.of_bias = not has_zero_sums(g)
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u_x: Tensor | None, u_w: Tensor | None, u_bias: Tensor | None) -> Any:
        u = u_x, u_w, u_bias if ctx.of_bias else None
        *v, again = Last.apply(_convolution_adjoint, *u, *ctx.saved_tensors, ctx.wanted, ctx.geometry, ctx.apart)
        return *v, *[None] * 5, again


def _convolution_adjoint(
    u_x: Tensor | None,
    u_w: Tensor | None,
    u_bias: Tensor | None,
    g: Tensor,
    x: Tensor,
    w: Tensor,
    needs: Sequence[bool],
    geometry: Sequence[Any],
    apart: bool,
) -> tuple[Tensor | None, ...]:
    """v_g = conv(u_x, w) + conv(x, u_w) + u_bias;  v_x = dgrad(g, u_w);  v_w = wgrad(g, u_x).

    apart: the two convolutions are not added, but the second one is returned last.
    """
    need_g, need_x, need_w = needs
    factors = [(u_x, w), (x, u_w)] if need_g else []
    known = [(a, b) for a, b in factors if a is not None and b is not None]
    terms: list[Tensor] = []
    for i, (a, b) in enumerate(known):
        with beside(g, when=i > 0 and _short(g)):
            # u_bias is the bias of one of them, which a CPU adds without a pass of its own.
            terms.append(_convolve(a, b, None if i else u_bias, geometry))
    # One call gives both: dgrad looks at the weight alone, wgrad at the input alone.
    mask = (need_x and u_w is not None, need_w and u_x is not None, False)
    v_x, v_w, _ = _convolve_backward(g, x if u_x is None else u_x, w if u_w is None else u_w, mask, geometry)
    if len(terms) > 1 and _short(g):
        joined(g)
    again = terms.pop() if apart and len(terms) > 1 else None
    v_g = functools.reduce(Tensor.add_, terms) if terms else None
    if need_g and u_bias is not None and not terms:
        v_g = u_bias[:, None, None].expand_as(g)
    return v_g, v_x, v_w, again


def leaves_out_zero_sums(g: Tensor) -> bool:
    """Whether the gradient of a bias is not computed, being zero; on a CPU it comes along for nothing."""
    return g.is_cuda and has_zero_sums(g)


def _short(g: Tensor) -> bool:
    """Whether kernels gain by running beside each other: those of float32 take long enough to fill the device."""
    return g.dtype == torch.bfloat16


def _convolve(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, w, bias, stride, padding, dilation, False, (0, 0), groups)


def _convolve_backward(
    g: Tensor, x: Tensor, w: Tensor, mask: Sequence[bool], geometry: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """(g_x, g_w, g_bias) where the mask asks for them."""
    stride, padding, dilation, groups = geometry
    if not any(mask):
        return None, None, None

    if mask[1] and few_places(g, w, groups):
        g_x, _, _ = _convolve_backward(g, x, w, (mask[0], False, False), geometry)
        of_weight, of_bias = weight_gradient(g, x, w, stride, padding, dilation)
        return g_x, of_weight, of_bias if mask[2] else None

    def backward(*mask: bool) -> tuple[Tensor | None, ...]:
        sizes = [w.shape[0]]
        return _aten.convolution_backward(g, x, w, sizes, stride, padding, dilation, False, (0, 0), groups, mask)  # type: ignore[no-any-return]

    if not (mask[0] and mask[1] and _short(g) and captured(g)):
        return backward(*mask)
    with beside(g):
        _, g_w, g_bias = backward(False, *mask[1:])
    g_x, _, _ = backward(True, False, False)
    joined(g)
    return g_x, g_w, g_bias
