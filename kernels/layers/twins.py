"""Twins of a network's layers: its parameters, buffers and hooks, with the second order written out in this folder.

The meta-gradient differentiates every layer's backward once more; PyTorch's own double backward is dearer than needed.
A twin is a class: a layer of a network that runs as it is has its forward pass for one (`Twins`), a layer of a traced
network is replaced by it (`replace_layers`). A call that a twin does not cover (BatchNorm in evaluation mode, half
precision, autocast, an unbatched image, padding by a word, indices wanted) runs the ordinary forward pass.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.kernels.layers import pending
from l2t_fast.kernels.layers.autograd import plain_suffices
from l2t_fast.kernels.layers.batch_norm import batch_norm, track_
from l2t_fast.kernels.layers.convolution import convolution
from l2t_fast.kernels.layers.few_places import will_be_few
from l2t_fast.kernels.layers.max_pool import max_pool, turns
from l2t_fast.kernels.layers.sync_batch_norm import SyncBatchNorm


def twin_of(layer: nn.Module) -> type[nn.Module] | None:
    """The twin of a layer, None for one that has none.

    Exact types: `nn.Conv2d` (zero padding by a number), `nn.BatchNorm2d` (affine), `nn.SyncBatchNorm`, `nn.MaxPool2d`
    and `nn.Linear`.
    """
    if type(layer) is nn.Conv2d:
        return Conv2d if _pads_by_number(layer) else None
    if type(layer) is nn.BatchNorm2d:
        return BatchNorm2d if layer.weight is not None and layer.bias is not None else None
    if type(layer) is nn.SyncBatchNorm:
        return SyncBatchNorm
    if type(layer) is nn.MaxPool2d:
        return MaxPool2d
    return Linear if type(layer) is nn.Linear else None


class Twins:
    """The layers of a network that have twins, and how they run as these.

    Differentiated a third time, convolutions and BatchNorms raise L2TError.
    """

    def __reduce__(self) -> tuple[Any, ...]:  # forward passes that are lent cannot be pickled
        return Twins, (self._network,)

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._layers: list[tuple[nn.Module, type[nn.Module], MethodType, MethodType]] = []
        for layer in network.modules():
            if (twin := twin_of(layer)) is not None:
                simulated = BatchStatistics2d if twin is BatchNorm2d else twin
                real_forward, simulated_forward = (MethodType(_lent(kind), layer) for kind in (twin, simulated))
                self._layers.append((layer, twin, real_forward, simulated_forward))

    @contextmanager
    def taken(self, *, simulated: bool) -> Iterator[None]:
        """Each layer runs its twin's forward inside; in simulated passes BatchNorms with batch statistics leave theirs.

        Not so one that has been made something else since (by a parametrization), or has a forward pass of its own.
        """
        taken: list[dict[str, Any]] = []
        try:
            for layer, twin, real_forward, simulated_forward in self._layers:
                own = layer.__dict__
                if "forward" not in own and twin_of(layer) is twin:
                    taken.append(own)
                    own["forward"] = simulated_forward if simulated else real_forward
            yield
        finally:
            for own in taken:
                del own["forward"]


def _lent(twin: type[nn.Module]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The twin's forward pass; the layer's under a network's own vmap or jvp, for which twins have no rule."""
    forward: Callable[[nn.Module, Tensor], Tensor] = twin.forward

    def lent(layer: nn.Module, input: Tensor) -> Tensor:
        if torch._C._functorch.peek_interpreter_stack() is None:
            return forward(layer, input)
        plain: Tensor = type(layer).forward(layer, input)
        return plain

    return lent


def replace_layers(network: nn.Module) -> None:
    """Gives the layers of a feature extractor their twins, in place.

    `network` is what torchvision's `create_feature_extractor` made. Only its own containers change: the module it was
    made of keeps its layers, whose parameters, buffers and hooks the twins share, also after `.to()` of either.
    """
    _replace(network, twin_of)


def without_statistics(network: nn.Module) -> nn.Module:
    """A view of a network after `replace_layers`, in training mode, whose BatchNorms leave running statistics alone.

    It shares everything with `network`. For simulated passes: their statistics would be thrown away.
    """
    view = copy.copy(network)  # of an fx.GraphModule: containers of its own, the same layers
    _replace(view, lambda layer: BatchStatistics2d if type(layer) is BatchNorm2d else None)
    return view


def running_buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The named buffers that a forward pass in training mode may change."""
    for prefix, module in network.named_modules():
        if type(module) is not BatchStatistics2d:
            yield from module.named_buffers(prefix, recurse=False)


def _replace(network: nn.Module, kind_of: Callable[[nn.Module], type[nn.Module] | None]) -> None:
    twins: dict[nn.Module, nn.Module] = {}  # a layer used under two names has one twin
    containers = [m for m in network.modules() if m is network or type(m) is nn.Module]
    for container in containers:
        for name, layer in container.named_children():
            kind = kind_of(layer)
            if kind is not None:
                if layer not in twins:
                    twins[layer] = kind.__new__(kind)
                    twins[layer].__dict__.update(layer.__dict__)
                container._modules[name] = twins[layer]


def half_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters to compute with in bfloat16: all but those of BatchNorm, whose kernels take both."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if p.dtype == torch.float32 and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding by a number; twice differentiable. Computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        input = _as_weight(input, self.weight)
        own = not _pads_by_number(self) or input.dim() != 4
        plain = plain_suffices(input) and not (
            torch.is_grad_enabled() and will_be_few(input, self.weight, self.stride, self.groups)
        )
        if own or plain or input.dtype != self.weight.dtype or _autocast(input):
            return nn.Conv2d.forward(self, input)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return convolution(input, self.weight, self.bias, *geometry)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.Linear.forward(self, _as_weight(input, self.weight))


class BatchNorm2d(nn.BatchNorm2d):
    """Affine `nn.BatchNorm2d`; twice differentiable in training mode. Takes bfloat16 beside float32 parameters."""

    def forward(self, input: Tensor) -> Tensor:
        if plain_suffices(input) or not _normalises(self, input):
            return _evaluated(self, input) if _evaluates(self, input) else nn.BatchNorm2d.forward(self, input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, rstd = _normalised(self, input)
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        track_(input, mean, rstd, self.eps, running, self.momentum)
        return y


class BatchStatistics2d(BatchNorm2d):
    """The same with running statistics left alone, in training mode."""

    def forward(self, input: Tensor) -> Tensor:
        if not plain_suffices(input) and _normalises(self, input):
            return _normalised(self, input)[0]
        if not self.training:
            return nn.BatchNorm2d.forward(self, input)  # which reads its statistics
        # Without running statistics of its own the ordinary pass has none to change.
        momentum = self.momentum or 0.0
        return F.batch_norm(input, None, None, self.weight, self.bias, True, momentum, self.eps)


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` of a batch; twice differentiable without leaving the layout of its input."""

    def forward(self, input: Tensor) -> Tensor:
        known = input.dtype in (torch.float32, torch.float64, torch.bfloat16)
        own = (plain_suffices(input) and not turns(input)) or self.return_indices or input.dim() != 4
        if own or not known or _autocast(input):
            return nn.MaxPool2d.forward(self, input)  # type: ignore[no-any-return]
        pairs = (_pair(n) for n in (self.kernel_size, self.stride or self.kernel_size, self.padding, self.dilation))
        return max_pool(input, *pairs, self.ceil_mode)  # type: ignore[no-any-return]


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _pads_by_number(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _normalises(layer: nn.BatchNorm2d, x: Tensor) -> bool:
    several = x.numel() > x.shape[1]  # the ordinary forward pass raises for one value per channel
    return layer.training and layer.track_running_stats and several and _takes(layer, x)


def _evaluates(layer: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether y may wait: in evaluation mode, where gradients are off, as in a source."""
    frozen = not layer.training and layer.running_mean is not None and not torch.is_grad_enabled()
    return frozen and x.numel() > 0 and _takes(layer, x) and not _hooked(layer) and pending.may_wait(x)


def _takes(layer: nn.BatchNorm2d, x: Tensor) -> bool:
    if layer.weight is None or layer.bias is None:
        return False
    full = layer.weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
    mixed = layer.weight.dtype == torch.float32 and x.dtype == torch.bfloat16
    return x.dim() == 4 and (full or mixed) and not _autocast(x)


def _normalised(layer: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, 1/σ) with batch statistics; y may wait for a ReLU, but not where a hook would see it."""
    if not _hooked(layer) and pending.may_wait(x):
        return pending.batch_norm(x, layer.weight, layer.bias, layer.eps)
    return batch_norm(x, layer.weight, layer.bias, layer.eps)  # type: ignore[no-any-return]


def _evaluated(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return pending.evaluated(x, layer.weight, layer.bias, layer.eps, layer.running_mean, layer.running_var)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """x where the parameters are bfloat16 as well: some layer before, or a sum with a buffer, may have made it wide."""
    wide = weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and not _autocast(x)
    return x.to(weight.dtype) if wide else x


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
