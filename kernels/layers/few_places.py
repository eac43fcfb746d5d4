"""The gradient of a convolution's weight as one product of matrices, on a CPU, where the maps are small.

oneDNN computes it in blocks of its own and then lays it out as the weight. For maps of few places the weight is larger
than all that is computed with: there the laying out takes several times as long as the product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def few_places(g: Tensor, w: Tensor, groups: int) -> bool:
    """Whether the product is faster, by the places B H' W' of g [B, C_out, H', W'].

    What it copies grows with them, what it spares with C_out (measured: benchmarks/NOTES.md). In bfloat16 only half as
    much is spared. Kernels of one place have no blocks worth laying out.
    """
    return _helps(g, w, groups) and g.numel() // w.shape[0] * 4 <= w.shape[0] * g.element_size()


def will_be_few(x: Tensor, w: Tensor, stride: Sequence[int], groups: int) -> bool:
    """The same of y's gradient, before there is one: for any padding by less than a kernel."""
    return _helps(x, w, groups) and x.numel() // x.shape[1] * 4 <= w.shape[0] * x.element_size() * stride[0] * stride[1]


def weight_gradient(
    g: Tensor, x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(g_w like w [C_out, C_in, k, m], g_bias [C_out]) of g [B, C_out, H', W'] and x [B, C_in, H, W].

    The batch is the innermost axis, so that rows of it are copied as they are, whatever the layout of g and x.
    """
    (batch, C_in, *size), (height, width), (k, m) = x.shape, g.shape[2:], w.shape[2:]
    padded = x.new_zeros(C_in, *(n + 2 * p for n, p in zip(size, padding, strict=True)), batch)
    rows, columns = (slice(p, p + n) for n, p in zip(size, padding, strict=True))
    padded[:, rows, columns] = x.permute(1, 2, 3, 0)
    channel, row, column, image = padded.stride()
    sizes = (C_in, k, m, height, width, batch)
    strides = (channel, dilation[0] * row, dilation[1] * column, stride[0] * row, stride[1] * column, image)
    read = padded.as_strided(sizes, strides)  # what each place of the kernel is multiplied with
    flat = g.permute(1, 2, 3, 0).reshape(w.shape[0], -1)  # [C_out, H' W' B]
    if w.is_contiguous():
        g_w = (flat @ read.reshape(-1, flat.shape[1]).T).view(w.shape)
    else:  # channels_last
        g_w = (flat @ read.permute(1, 2, 0, 3, 4, 5).reshape(-1, flat.shape[1]).T).view(-1, k, m, C_in)
        g_w = g_w.permute(0, 3, 1, 2)
    return g_w, flat.sum(1)


def _helps(x: Tensor, w: Tensor, groups: int) -> bool:
    known = x.device.type == "cpu" and type(x) is Tensor and x.dtype in (torch.float32, torch.bfloat16)
    return known and groups == 1 and w.shape[2] * w.shape[3] > 1
