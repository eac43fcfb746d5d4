"""The axes of the images, followed through every operation of a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from l2t_fast.learner.axes import (
    Axes,
    Axis,
    agreed,
    as_map,
    broadcast,
    concatenated,
    every,
    resized,
    size_of,
    sliced,
    unknown,
    viewed,
)


@dataclass(frozen=True)
class _Call:
    """One operation: its tensors' axes in the order of the arguments, all arguments by name, the shapes it returns."""

    operands: list[Axes]
    given: dict[str, Any]
    shapes: Sequence[Sequence[int]]
    strides: Sequence[int]  # of the first tensor
    place: int = 0  # which of the returned tensors is asked for

    @property
    def shape(self) -> Sequence[int]:
        return self.shapes[self.place]

    @property
    def dim(self) -> int:
        """The argument `dim`, from 0."""
        return int(self.given["dim"]) % len(self.operands[0])


def _same(call: _Call) -> Axes:
    return call.operands[0]


def _entrywise(call: _Call) -> Axes:
    return broadcast(call.operands, call.shape)


def _spatial(call: _Call) -> Axes:
    return as_map(call.operands[0], call.shape)


def _convolution(call: _Call) -> Axes:
    batch, _, *space = call.operands[0]
    return as_map((batch, unknown(call.shape[1]), *space), call.shape)


def _folded(call: _Call) -> Axes:
    return as_map((call.operands[0][0], *(unknown(size) for size in call.shape[1:])), call.shape)


def _product(call: _Call) -> Axes:
    a, b = call.operands[-2:]
    batch = [agreed(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)]
    return (*batch, a[-2], b[-1])


def _linear(call: _Call) -> Axes:
    return (*call.operands[0][:-1], unknown(call.shape[-1]))


def _attention(call: _Call) -> Axes:
    query, _, value = call.operands[:3]
    return (*query[:-1], value[-1])


def _permuted(call: _Call) -> Axes:
    return tuple(call.operands[0][dim] for dim in call.given["dims"])


def _transposed(call: _Call) -> Axes:
    axes = list(call.operands[0])
    i, j = call.given.get("dim0", 0), call.given.get("dim1", -1)
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def _unsqueezed(call: _Call) -> Axes:
    dim = call.given["dim"] % len(call.shape)
    return (*call.operands[0][:dim], unknown(1), *call.operands[0][dim:])


def _squeezed(call: _Call) -> Axes:
    (axes,) = call.operands
    dims = call.given.get("dim", range(len(axes)))
    dims = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims)}
    return tuple(axis for i, axis in enumerate(axes) if i not in dims or size_of(axis) > 1)


def _reshaped(call: _Call) -> Axes:
    return viewed(call.operands[0], call.shape)


def _slice(call: _Call) -> Axes:
    start, size = call.given["start"] or 0, size_of(call.operands[0][call.dim])
    start = max(start + size, 0) if start < 0 else min(start, size)
    if call.given["step"] > 1 and call.operands[0][call.dim][0].kind == "tokens":
        return _without(call)
    return sliced(call.operands[0], call.dim, start, call.shape[call.dim])


def _split(call: _Call) -> Axes:
    start = sum(shape[call.dim] for shape in call.shapes[: call.place])
    return sliced(call.operands[0], call.dim, start, call.shape[call.dim])


def _selected(call: _Call) -> Axes:
    return tuple(axis for i, axis in enumerate(call.operands[0]) if i != call.dim)


def _unfolded(call: _Call) -> Axes:
    """Patches [B, C k k, H W], each at its place in the map of patches."""
    (batch, _, *axes), given = call.operands[0], call.given
    sizes = [
        (size_of(axis) + 2 * p - d * (k - 1) - 1) // s + 1
        for axis, k, d, p, s in zip(
            axes, given["kernel_size"], given["dilation"], given["padding"], given["stride"], strict=True
        )
    ]
    rows, columns = resized(tuple(axes), sizes)
    return (batch, unknown(call.shape[1]), (*rows, *columns))


def _windowed(call: _Call) -> Axes:
    """`x.unfold(dim, size, step)`: windows that tile the axis split it, their entries come last."""
    axes, dim = call.operands[0], call.given["dimension"]
    shape = (call.shape[dim], call.given["size"])
    tiles = call.given["step"] == call.given["size"]
    outer, inner = viewed((axes[dim],), shape) if tiles else map(unknown, shape)
    rest = list(axes)
    rest[dim] = outer
    return (*rest, inner)


def _restrided(call: _Call) -> Axes:
    """Only the strides of axes with one entry may change."""
    axes, strides = call.operands[0], call.given["stride"]
    kept = [size_of(axis) for axis in axes] == list(call.shape) and len(strides) == len(call.strides)
    same = all(a == b for a, b, n in zip(strides, call.strides, call.shape, strict=False) if n > 1)
    return axes if kept and same and not call.given["storage_offset"] else ()


def _without(call: _Call) -> Axes:
    """Nothing is known of axis `dim`, or `dims`: its entries are picked in any order."""
    picked = {dim % len(call.shape) for dim in call.given.get("dims", [call.given.get("dim")])}
    return tuple(unknown(call.shape[i]) if i in picked else axis for i, axis in enumerate(call.operands[0]))


def _indexed(call: _Call) -> Axes:
    picked = [i for i, index in enumerate(call.given["indices"]) if index is not None]
    if len(picked) != 1 or len(call.shape) != len(call.operands[0]):
        return ()
    return _without(replace(call, given={"dim": picked[0]}))


def _cat(call: _Call) -> Axes:
    operands = [axes for axes in call.operands if len(axes) == len(call.shape)]  # torch skips tensors [0]
    return concatenated(operands, call.given["dim"] % len(call.shape), call.shape)


def _stacked(call: _Call) -> Axes:
    dim = call.given["dim"] % len(call.shape)
    rest = broadcast(call.operands, [*call.shape[:dim], *call.shape[dim + 1 :]])
    return (*rest[:dim], unknown(call.shape[dim]), *rest[dim:])


def _padded(call: _Call) -> Axes:
    return resized(call.operands[0], call.shape)


def _rolled(call: _Call) -> Axes:
    axes = list(call.operands[0])
    if not call.given["dims"]:
        return ()
    for shift, dim in zip(call.given["shifts"], call.given["dims"], strict=True):
        factor, size = axes[dim][0], size_of(axes[dim])
        whole = len(axes[dim]) == 1 and factor.kind in ("H", "W")
        axes[dim] = (replace(factor, shift=(factor.shift + shift) % size),) if whole else unknown(size)
    return tuple(axes)


def _reduced(call: _Call) -> Axes:
    axes, dims = call.operands[0], call.given.get("dim")
    dims = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = {dim % len(axes) for dim in dims}
    if not call.given["keepdim"]:
        return tuple(axis for i, axis in enumerate(axes) if i not in dims)

    def one(axis: Axis) -> Axis:
        rows = len(axis) == 1 and axis[0].kind in ("H", "W") and axis[0].spans
        return every(axis[0].kind, 1) if rows else unknown(1)

    return tuple(one(axis) if i in dims else axis for i, axis in enumerate(axes))


_RULES: dict[Callable[[_Call], Axes], str] = {
    _same: "detach alias lift_fresh _to_copy clone dropout native_dropout log_sigmoid_forward "
    "_softmax _safe_softmax _log_softmax native_layer_norm native_group_norm rms_norm _fused_rms_norm cumsum "
    "native_channel_shuffle _native_multi_head_attention _transformer_encoder_layer_fwd",
    _entrywise: "copy expand repeat where masked_fill hardswish prelu _prelu_kernel rrelu_with_noise",
    _convolution: "convolution _convolution cudnn_convolution mkldnn_convolution deform_conv2d",
    _folded: "col2im",
    _unfolded: "im2col",
    _windowed: "unfold",
    _spatial: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training _batch_norm_with_update avg_pool2d max_pool2d_with_indices max_pool2d "
    "fractional_max_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
    "_upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa "
    "pixel_shuffle pixel_unshuffle reflection_pad2d replication_pad2d",
    _product: "mm bmm addmm baddbmm _addmm_activation",
    _linear: "linear",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math",
    _permuted: "permute",
    _transposed: "transpose t",
    _unsqueezed: "unsqueeze",
    _squeezed: "squeeze",
    _reshaped: "view _unsafe_view reshape _reshape_alias view_copy",
    _slice: "slice",
    _split: "split split_with_sizes unsafe_split",
    _selected: "select unbind",
    _without: "index_select flip",
    _indexed: "index",
    _cat: "cat",
    _stacked: "stack",
    _padded: "constant_pad_nd glu",
    _rolled: "roll",
    _restrided: "as_strided",
}
_RULE = {name: rule for rule, names in _RULES.items() for name in names.split()}
_OF_EACH = {_split, _selected}  # their rule holds for all tensors that are returned, others' for the first


class AxisTrail(TorchDispatchMode):
    """Follows the axes of `image` [B, C, H, W] through what runs inside `with AxisTrail(image) as trail:`.

    The forward pass is unchanged. Only what is done at the level of ATen counts, so that any module, with gradients or
    without, can be watched; features that hooks record meanwhile are then asked for by `find_layout`.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.image_shape = tuple(image.shape)
        b, c, h, w = image.shape
        # Autograd hands on another object than the one seen here, but over the same numbers. A weak reference
        # keeps the address of a freed storage from being given to another.
        self._axes: dict[Any, Axes] = {}
        self._set(image, (every("B", b), unknown(c), every("H", h), every("W", w)))

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of each axis."""
        return self._axes.get(_identity(tensor), tuple(unknown(size) for size in tensor.shape))

    def _set(self, tensor: Tensor, axes: Axes) -> None:
        if [size_of(axis) for axis in axes] == list(tensor.shape) and any(p.kind for axis in axes for p in axis):
            self._axes[_identity(tensor)] = axes
        else:
            self._axes.pop(_identity(tensor), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # tensors without numbers are asked for their device so
            return func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in arguments), args, strict=False)) | (kwargs or {})
        tensors = [tensor for argument in arguments for tensor in _tensors(given.get(argument.name))]
        rule = _rule(func, given) if tensors else None
        if rule is None:  # under inference_mode even a convolution comes in one piece
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        # All of it before the call, which may change strides and shapes in place.
        before = [_identity(tensor) for tensor in tensors[:1]]
        operands, strides = [self.axes(tensor) for tensor in tensors], tensors[0].stride() if tensors else ()
        result = func(*args, **(kwargs or {}))

        if rule not in (_entrywise, _product) and not (operands and operands[0]):  # a scalar has no axes
            rule = None
        returned = _tensors(result)
        shapes = [tensor.shape for tensor in returned]
        for place, tensor in enumerate(returned):
            if rule is not None and (place == 0 or rule in _OF_EACH):
                self._set(tensor, rule(_Call(operands, given, shapes, strides, place)))
            elif _identity(tensor) not in before:  # else its entries were overwritten, its axes stay
                self._set(tensor, ())
        return result


def _rule(func: Any, given: dict[str, Any]) -> Callable[[_Call], Axes] | None:
    space, name = func._schema.name.split("::")
    if space in ("aten", "torchvision") and name.removesuffix("_") in _RULE:
        return _RULE[name.removesuffix("_")]
    if space == "aten" and "keepdim" in given:
        return _reduced
    return _entrywise if torch.Tag.pointwise in func.tags else None


def _tensors(value: Any) -> list[Tensor]:
    """The dense tensors in an argument or result."""
    if isinstance(value, list | tuple):
        return [tensor for v in value for tensor in _tensors(v)]
    return [value] if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested else []


def _identity(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride()
