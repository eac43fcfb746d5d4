"""SyncBatchNorm by a sum over ranks that can be differentiated any number of times, on any backend.

PyTorch's own is for GPUs, and can be differentiated once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.ranks import Group, all_reduce_

_group: Group = None  # for the whole process: on CUDA autograd runs backward passes in threads of its own


@contextmanager
def synchronised(group: Group) -> Iterator[None]:
    """Statistics are those of all ranks of `group` in forward passes inside; outside they are this process's own."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


class AllReduce(torch.autograd.Function):
    """(x, group) -> Σ x over the ranks. As a function of all ranks' x it is its own adjoint."""

    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Tensor, None]:
        return AllReduce.apply(u[0], ctx.group), None


def _batch_norm(layer: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    y: Tensor = nn.modules.batchnorm._BatchNorm.forward(layer, input)
    return y


class SyncBatchNorm(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm`: with the statistics of all ranks' batches inside `synchronised`, else of this one's."""

    def forward(self, input: Tensor) -> Tensor:
        if _group is None or not self.training:
            return _batch_norm(self, input)
        group = self.process_group or _group
        x = input.to(torch.float32) if input.dtype in (torch.bfloat16, torch.float16) else input
        over, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = AllReduce.apply(torch.cat([x.sum(over), count]), group)
        total = sums[-1].detach()
        mean = sums[:-1] / total  # [C]
        centred = x - mean.view(shape)
        variance = AllReduce.apply(centred.square().sum(over), group) / total  # [C]
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + (0 if self.bias is None else self.bias.view(shape))
        if self.track_running_stats:
            _follow(self, mean.detach(), variance.detach() * (total / (total - 1)))
        normalised: Tensor = y.to(input.dtype)
        return normalised


@torch.no_grad()
def _follow(layer: nn.SyncBatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Running statistics of the batch's."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    momentum = layer.num_batches_tracked.to(mean.dtype).reciprocal() if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(variance, momentum)


@contextmanager
def by_itself(network: nn.Module) -> Iterator[None]:
    """SyncBatchNorms of a network that is run outside a training take the statistics of this process alone."""
    layers = [m for m in network.modules() if type(m) is nn.SyncBatchNorm and "forward" not in m.__dict__]
    for layer in layers:
        layer.__dict__["forward"] = MethodType(_batch_norm, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
