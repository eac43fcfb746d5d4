"""Convolution and BatchNorm with their second order written out: exact, and cheaper than PyTorch's own.

The meta-gradient differentiates every layer's backward once more. PyTorch writes the weight part of a convolution's
double backward as a convolution whose kernel is a whole feature map, and BatchNorm's as some thirty passes over memory.
Here both are made of the kernels of the first order. In the formulas u is the cotangent of a gradient g_•, v_• what
its adjoint gives.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.errors import L2TError

_aten = torch.ops.aten
_TRITON = find_spec("triton") is not None  # it is for Linux


def replace_layers(network: nn.Module) -> None:
    """Gives the convolutions and BatchNorms of a feature extractor their second order written out here, in place.

    `network` is what torchvision's `create_feature_extractor` made. Its layers of exact type `nn.Conv2d` (zero padding
    by a number), `nn.BatchNorm2d` (affine) and `nn.Linear` are replaced by twins that share their parameters, buffers
    and hooks, also after `.to()` of either. Only the extractor's own containers change: the module it was made of keeps
    its layers. A call that a twin does not cover (BatchNorm in evaluation mode, half precision, autocast, an unbatched
    image) runs the ordinary forward pass.

    Raises:
        L2TError: in the backward pass, for a derivative of third order.
    """
    _replace(network, _replacement)


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


def _replacement(layer: nn.Module) -> type[nn.Module] | None:
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return Conv2d
    if type(layer) is nn.BatchNorm2d and layer.affine:
        return BatchNorm2d
    if type(layer) is nn.Linear:
        return Linear
    return None


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
        if input.dim() != 4 or input.dtype != self.weight.dtype or _autocast(input):
            return super().forward(input)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return convolution(input, self.weight, self.bias, *geometry)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_as_weight(input, self.weight))


class BatchNorm2d(nn.BatchNorm2d):
    """Affine `nn.BatchNorm2d`; twice differentiable in training mode. Takes bfloat16 beside float32 parameters."""

    def forward(self, input: Tensor) -> Tensor:
        if not _normalises(self, input):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, rstd = batch_norm(input, self.weight, self.bias, self.eps)
        # float32 already, but for compiled bfloat16 on a CPU
        mean, rstd = mean.to(self.running_mean.dtype), rstd.to(self.running_var.dtype)
        count = input.numel() // input.shape[1]
        variance = (rstd.pow(-2) - self.eps) * (count / (count - 1))  # unbiased
        self.num_batches_tracked.add_(1)
        momentum = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
        return y  # type: ignore[no-any-return]


class BatchStatistics2d(BatchNorm2d):
    """The same with running statistics left alone, in training mode."""

    def forward(self, input: Tensor) -> Tensor:
        if _normalises(self, input):
            return batch_norm(input, self.weight, self.bias, self.eps)[0]  # type: ignore[no-any-return]
        # Without running statistics of its own the ordinary pass has none to change.
        momentum = self.momentum or 0.0
        return F.batch_norm(input, None, None, self.weight, self.bias, True, momentum, self.eps)


def _normalises(layer: nn.BatchNorm2d, x: Tensor) -> bool:
    several = x.numel() > x.shape[1]  # the ordinary forward pass raises for one value per channel
    full = layer.weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
    mixed = layer.weight.dtype == torch.float32 and x.dtype == torch.bfloat16
    tracked = layer.training and layer.track_running_stats
    return tracked and several and x.dim() == 4 and (full or mixed) and not _autocast(x)


def _as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """x where the parameters are bfloat16 as well: some layer before, or a sum with a buffer, may have made it wide."""
    wide = weight.dtype == torch.bfloat16 and x.dtype == torch.float32 and not _autocast(x)
    return x.to(weight.dtype) if wide else x


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


# Parameters in lower precision, all at once: many small casts would cost a launch each.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of the tensors in another dtype, differentiable."""
    return Cast.apply(dtype, *tensors)  # type: ignore[no-any-return]


class Cast(torch.autograd.Function):
    """(dtype, *x) -> copies in that dtype, laid out in memory as x."""

    @staticmethod
    def forward(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _copies(dtype, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtypes = [t.dtype for t in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> Any:
        given = [g for g in u if g is not None]
        wide = iter(_copies(ctx.dtypes[0], given))
        return None, *(None if g is None else next(wide) for g in u)


def _copies(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


# Dynamo, tracing a Function inside torch.func.vjp by itself, silently loses the second order; AOTAutograd does not.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """y [B, C_out, H', W'] of x [B, C_in, H, W]; geometry: stride, padding, dilation, groups."""
    return Convolution.apply(x, w, bias, *geometry)  # type: ignore[no-any-return]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, C, H, W], mean [C], 1/σ [C]) with the batch statistics of x [B, C, H, W]."""
    return BatchNorm.apply(x, gamma, beta, eps)  # type: ignore[no-any-return]


class Convolution(torch.autograd.Function):
    """(x [B, C_in, H, W], w, bias or None, stride, padding, dilation, groups) -> y [B, C_out, H', W']."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        return _convolve(x, w, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, _, *ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return *ConvolutionBackward.apply(g, x, w, ctx.needs_input_grad[:3], *ctx.geometry), None, None, None, None


class ConvolutionBackward(torch.autograd.Function):
    """(g [B, C_out, H', W'], x, w, mask, *geometry) -> (g_x, g_w, g_bias), None where the mask says no."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, w: Tensor, mask: Sequence[bool], *geometry: Any) -> tuple[Tensor | None, ...]:
        return _convolve_backward(g, x, w, mask, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        g, x, w, _, *ctx.geometry = inputs
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> Any:
        v = _Last.apply(_convolution_adjoint, *u, *ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.geometry)
        return *v, None, None, None, None, None


def _convolution_adjoint(
    u_x: Tensor | None,
    u_w: Tensor | None,
    u_bias: Tensor | None,
    g: Tensor,
    x: Tensor,
    w: Tensor,
    needs: Sequence[bool],
    geometry: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """v_g = conv(u_x, w) + conv(x, u_w) + u_bias;  v_x = dgrad(g, u_w);  v_w = wgrad(g, u_x)."""
    need_g, need_x, need_w = needs
    terms = [
        *([_convolve(u_x, w, None, geometry)] if need_g and u_x is not None else []),
        *([_convolve(x, u_w, None, geometry)] if need_g and u_w is not None else []),
        *([u_bias[:, None, None].expand_as(g)] if need_g and u_bias is not None else []),
    ]
    v_g = functools.reduce(Tensor.add_, terms) if terms else None
    # One call gives both: dgrad looks at the weight alone, wgrad at the input alone.
    mask = (need_x and u_w is not None, need_w and u_x is not None, False)
    v_x, v_w, _ = _convolve_backward(g, x if u_x is None else u_x, w if u_w is None else u_w, mask, geometry)
    return v_g, v_x, v_w


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
    sizes = [w.shape[0]]
    return _aten.convolution_backward(g, x, w, sizes, stride, padding, dilation, False, (0, 0), groups, mask)  # type: ignore[no-any-return]


class BatchNorm(torch.autograd.Function):
    """(x [B, C, H, W], γ [C], β [C], ε) -> (y, mean [C], 1/σ [C]), with batch statistics.

    y = γ x̂ + β,  x̂ = (x − μ)/σ,  σ² = var(x) + ε.  Only y is differentiable.
    """

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = _aten._native_batch_norm_legit.no_stats(x, gamma, beta, True, 0.0, eps)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, gamma, _, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)  # two zeros a call
        ctx.save_for_backward(x, gamma, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        return *BatchNormBackward.apply(g, *ctx.saved_tensors), None


class BatchNormBackward(torch.autograd.Function):
    """(g, x [B, C, H, W], γ, μ, 1/σ [C]) -> (g_x, g_γ = Σ g x̂, g_β = Σ g); μ and σ count as functions of x."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _normalize_backward(g, x, gamma, mean, rstd, [True, True, True])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> Any:
        return *_Last.apply(_batch_norm_adjoint, *u, *ctx.saved_tensors, ctx.needs_input_grad[:3]), None, None


def _batch_norm_adjoint(
    u: Tensor,
    u_gamma: Tensor,
    u_beta: Tensor,
    g: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    g_gamma: Tensor,
    g_beta: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """With means over the N elements of a channel (ū, ḡ), m_u = mean(u x̂), m_g = mean(g x̂), s = γ/σ:

    Q = Σ (u − ū − x̂ m_u) g,   q = u_γ − s m_u,   r = q g − s m_g u
    v_g = s (u − ū) + q x̂ + u_β,   v_γ = Q/σ,   v_x = (r − r̄ − x̂ mean(r x̂) − x̂ s Q/N)/σ
    """
    need_g, need_x, need_gamma = needs
    if _fused(x):
        from l2t_fast.kernels.layers import batch_norm_triton as triton_norm

        primal = need_x or need_gamma
        return triton_norm.adjoint(u, u_gamma, u_beta, g, x, gamma, mean, rstd, g_gamma, g_beta, primal)
    count = x.numel() // x.shape[1]
    _, sum_ux, sum_u = _normalize_backward(u, x, gamma, mean, rstd, [False, True, True])
    m_u, u_mean = sum_ux / count, sum_u / count
    s = gamma * rstd
    q = u_gamma - s * m_u
    v_g = v_x = v_gamma = None
    if need_g:
        slope = q * rstd
        v_g = _combine([(x, slope), (u, s)], u_beta - s * u_mean - slope * mean)
    if need_x or need_gamma:
        m_g, g_mean = g_gamma / count, g_beta / count
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        _, sum_ug, _ = _normalize_backward(u, g, gamma, zero, one, [False, True, False])  # one fused reduction
        Q = sum_ug - sum_u * g_mean - sum_ux * m_g
        v_gamma = rstd * Q
    if need_x:
        p = -s * m_g
        r_mean, m_r = p * u_mean + q * g_mean, p * m_u + q * m_g
        slope = -rstd.square() * (m_r + s * Q / count)
        v_x = _combine([(x, slope), (u, p * rstd), (g, q * rstd)], -rstd * r_mean - slope * mean)
    return v_g, v_x, v_gamma


def _fused(x: Tensor) -> bool:
    """Whether Triton computes: on CUDA, but not where a compiler traces, which fuses the formulas by itself."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return _TRITON and x.is_cuda and type(x) is Tensor and dense and x.numel() < 2**31


def _normalize_backward(
    g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x, Σ g x̂, Σ g) where the mask asks for them. ε is given as 0: it is inside 1/σ already."""
    return _aten.native_batch_norm_backward(g, x, gamma, None, None, mean, rstd, True, 0.0, mask)  # type: ignore[no-any-return]


def _combine(terms: Sequence[tuple[Tensor, Tensor]], constant: Tensor) -> Tensor:
    """Σ coefficient_c term_c + constant_c, channel by channel, in one pass over memory a term: [B, C, H, W]."""
    (first, coefficient), *rest = terms
    total = torch.addcmul(constant[:, None, None], first, coefficient[:, None, None])  # in the dtype of the statistics
    for term, coefficient in rest:
        total.addcmul_(term, coefficient[:, None, None])
    return total.to(first.dtype)


class _Last(torch.autograd.Function):
    """f(*inputs), which must not be differentiated again (`once_differentiable` is silent in `torch.autograd.grad`)."""

    @staticmethod
    def forward(f: Callable[..., Any], *inputs: Any) -> Any:
        return f(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise L2TError(
            "Conv2d and BatchNorm2d of a tapped network have no third derivative: take it on the untapped module."
        )
