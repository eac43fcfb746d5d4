"""Max-pooling with its second order written out: without copies, zeros and int64 where they can be had without.

PyTorch's own double backward gathers in NCHW whatever the layout, and adds a map of zeros for x. The indices do not
move with x, so everything after the forward pass is linear: the backward scatters, its adjoint gathers. On CUDA, in
channels_last, they are Triton's (`max_pool_triton.py`), but not under a compiler.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2t_fast.kernels import launch

_aten = torch.ops.aten

# Dynamo, tracing a Function inside torch.func.vjp by itself, silently loses the second order; AOTAutograd does not.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def max_pool(x: Tensor, *geometry: Any) -> Tensor:
    """y [B, C, h, w] of x [B, C, H, W]; geometry: kernel, stride, padding, dilation (pairs), ceil_mode."""
    return MaxPool.apply(x, *geometry)[0]  # type: ignore[no-any-return]


class MaxPool(torch.autograd.Function):
    """(x [B, C, H, W], *geometry) -> (y, places of the maxima) [B, C, h, w].

    Places are int64, in the plane of x (ATen), or uint8, in the window (Triton).
    """

    @staticmethod
    def forward(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
        if fused(x, geometry):
            from l2t_fast.kernels.layers import max_pool_triton

            return max_pool_triton.forward(x, geometry)
        if turns(x):
            y, places = _aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *geometry)
            return y.clone(memory_format=torch.contiguous_format), places.clone(memory_format=torch.contiguous_format)
        return _aten.max_pool2d_with_indices(x, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.geometry = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> Any:
        g_x = None if g is None else MaxPoolBackward.apply(g, *ctx.saved_tensors, *ctx.geometry)
        return g_x, None, None, None, None, None


class MaxPoolBackward(torch.autograd.Function):
    """(g [B, C, h, w], x, places, *geometry) -> g_x [B, C, H, W], which looks at the shape and layout of x alone."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, places: Tensor, *geometry: Any) -> Tensor:
        if places.dtype == torch.uint8:
            from l2t_fast.kernels.layers import max_pool_triton

            return max_pool_triton.backward(g, x, places, geometry)
        return _aten.max_pool2d_with_indices_backward(g, x, *geometry, places)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, places, *ctx.geometry = inputs
        ctx.save_for_backward(x, places)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        return MaxPoolAdjoint.apply(u, *ctx.saved_tensors, *ctx.geometry), *[None] * 7


class MaxPoolAdjoint(torch.autograd.Function):
    """(u [B, C, H, W], x, places, *geometry) -> u at the maxima, [B, C, h, w]: the adjoint of `MaxPoolBackward`."""

    @staticmethod
    def forward(u: Tensor, x: Tensor, places: Tensor, *geometry: Any) -> Tensor:
        if places.dtype == torch.uint8:
            from l2t_fast.kernels.layers import max_pool_triton

            return max_pool_triton.adjoint(u, places, geometry)
        return _gathered(u, x, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, places, *ctx.geometry = inputs
        ctx.save_for_backward(x, places)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return MaxPoolBackward.apply(g, *ctx.saved_tensors, *ctx.geometry), *[None] * 7


def _gathered(u: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """u at the maxima [B, C, h, w], in the layout of x: no copies where u has the same."""
    if x.stride(1) != 1 or x.is_contiguous():
        return u.flatten(2).gather(2, places.flatten(2)).view(places.shape)
    batch, channels, h, w = places.shape
    rows = u.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # [B, H·W, C]
    flat = places.permute(0, 2, 3, 1).reshape(batch, h * w, channels)
    return rows.gather(1, flat).view(batch, h, w, channels).permute(0, 3, 1, 2)


def turns(x: Tensor) -> bool:
    """Whether x is laid out as channels_last first, and y back: in NCHW a CPU compares number by number.

    With the copies it is some three times as fast, from as many channels on as fill a vector.
    """
    return x.device.type == "cpu" and type(x) is Tensor and x.dim() == 4 and x.shape[1] >= 8 and x.is_contiguous()


def fused(x: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether Triton computes: on CUDA, in channels_last, but not where a compiler traces."""
    if not (launch.TRITON and x.is_cuda and type(x) is Tensor and 0 < x.numel() < 2**30):
        return False
    kernel, stride, padding, dilation, _ = geometry
    laid_out = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    unrolled = dilation == (1, 1) and kernel[0] * kernel[1] <= 64
    axes = zip(x.shape[2:], kernel, stride, padding, strict=True)
    return laid_out and unrolled and all(0 <= 2 * p <= k <= n + 2 * p and s > 0 for n, k, s, p in axes)
