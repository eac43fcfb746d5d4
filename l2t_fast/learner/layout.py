"""How a layer's feature becomes a map [B, C, H, W], found by following the image's axes through the forward pass.

Sizes alone prove nothing (C may equal H, N need not be a square), and neither does one module: a Linear mixes channels
in a ViT and positions in a Mixer. So each axis of the image is followed through every operation, as named axes would
be: a view splits and joins axes, a product keeps the rows of one factor and the columns of the other, a convolution
makes axis 1 anew and makes rows of rows. What a layer gives is then read off its feature; where the trail is lost, the
user is asked.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from l2t_fast.errors import L2TError
from l2t_fast.learner.axes import Axes, Axis, Factor, size_of, spatial_kinds
from l2t_fast.learner.trail import AxisTrail

Layout = Literal["NCHW", "NHWC", "tokens"]
Key = int | str | None


def parse_layer(layer: str) -> tuple[str, Key]:
    """Name of the module and what is picked from its output: "stage2[1]" is ("stage2", 1), "body[out]" ("body", "out").

    A layer without brackets has None: its output is one tensor.
    """
    match = re.fullmatch(r"(.*)\[([^\[\]]+)\]", layer)
    if match is None:
        return layer, None
    name, key = match.groups()
    return name, int(key) if re.fullmatch(r"-?\d+", key) else key.strip("'\"")


def pick(output: object, layer: str, role: str) -> Tensor:
    """The feature that `layer` ("stage2[1]") names in the output of its module.

    Raises:
        L2TError: no such entry, or several where none is named (what is there is listed), or not a tensor.
    """
    name, key = parse_layer(layer)
    if isinstance(output, Tensor) and key is None:
        return output
    if isinstance(output, Tensor):
        raise L2TError(f"layer '{name}' of the {role} gives one tensor {list(output.shape)}: name it without [{key}].")
    entries: dict[int | str, object] = {}
    if isinstance(output, Mapping):
        entries = dict(output)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        entries = dict(enumerate(output))
    elif not isinstance(output, Tensor):
        entries = {k: v for k, v in getattr(output, "__dict__", {}).items() if isinstance(v, Tensor)}
    if not entries:
        raise L2TError(f"layer '{name}' of the {role} gives {type(output).__name__}, not a tensor: tap a layer in it.")
    found = entries.get(key, entries.get(str(key))) if key is not None else None
    if found is None and isinstance(output, tuple) and isinstance(key, str):
        found = getattr(output, key, None)  # a named tuple's field
    if found is None and isinstance(output, Sequence) and isinstance(key, int) and -len(output) <= key < 0:
        found = output[key]
    if isinstance(found, Tensor):
        return found
    there = ", ".join(
        f"'{name}[{k}]' {list(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in entries.items()
    )
    what = "gives several features" if key is None else f"has no tensor [{key}]"
    raise L2TError(f"layer '{name}' of the {role} {what}: tap one by its place, of {there}.")


@dataclass(frozen=True)
class FeatureMap:
    """What a layer gives, and how it becomes a map."""

    layout: Layout
    shape: tuple[int, int, int]  # C, H, W of the map
    prefix: int = 0  # tokens before the first position of the map (class, distillation, register tokens)

    def to_map(self, feature: Tensor) -> Tensor:
        """[B, C, H, W], a view of `feature`: [B, C, H, W], [B, H, W, C] or [B, prefix + H W (+ more), C]."""
        if self.layout == "NCHW":
            return feature
        if self.layout == "NHWC":
            return feature.permute(0, 3, 1, 2)
        _, height, width = self.shape
        positions = feature[:, self.prefix : self.prefix + height * width]  # [B, H W, C]
        return positions.transpose(1, 2).reshape(len(feature), -1, height, width)


def find_layout(feature: Tensor, trail: AxisTrail, layer: str, role: str, option: str | None = None) -> FeatureMap:
    """How `feature`, which the pass that `trail` watched has made, becomes a map.

    `option` ("NCHW", "NHWC", "tokens", "tokens+1": one token before those of the map) is the user's word, which
    decides where it is given and fits the shape.

    Raises:
        L2TError: an option that does not fit; without one, a feature that is no map, or whose axes are not known.
    """
    if option is not None:
        return _as_told(feature, trail, layer, role, option)
    told = f"layer '{layer}' of the {role} gives {list(feature.shape)}"
    if feature.dim() not in (3, 4):
        raise L2TError(f"{told}, which is no map: tap a layer that gives [B, C, H, W], [B, H, W, C] or [B, N, C].")
    axes = trail.axes(feature)
    if _is_batch(axes[0]):
        found = _tokens(axes) if feature.dim() == 3 else _four_axes(axes)
        why = "no axes of it are known to be the rows and columns of the images"
    else:
        found, why = None, "its first axis is not the batch alone"
    if found is None:
        choice = "'tokens' (or 'tokens+1')" if feature.dim() == 3 else "'NHWC' (or 'NCHW')"
        raise L2TError(f"{told}, and {why}: say layout={{'{layer}': {choice}}}, or tap another layer.")
    return found


def _as_told(feature: Tensor, trail: AxisTrail, layer: str, role: str, option: str) -> FeatureMap:
    told = f"layer '{layer}' of the {role} gives {list(feature.shape)}"
    tokens = re.fullmatch(r"tokens(?:\+(\d+))?", option)
    if option not in ("NCHW", "NHWC") and tokens is None:
        raise L2TError(f"layout={{'{layer}': '{option}'}} is not a layout: say 'NCHW', 'NHWC', 'tokens' or 'tokens+1'.")
    if feature.dim() != (4 if tokens is None else 3):
        raise L2TError(f"{told}, which is not '{option}': tokens have three axes, NCHW and NHWC four.")
    if option == "NCHW":
        return FeatureMap("NCHW", (feature.shape[1], feature.shape[2], feature.shape[3]))
    if option == "NHWC":
        return FeatureMap("NHWC", (feature.shape[3], feature.shape[1], feature.shape[2]))
    assert tokens is not None
    prefix = int(tokens[1] or 0)
    _, count, channels = feature.shape
    found = _tokens(trail.axes(feature))
    if found is not None and found.prefix == prefix:
        return found
    # The grid has the image's aspect: h w = n and h / w = H / W.
    height, width = trail.image_shape[2:]
    n = count - prefix
    h, w = math.isqrt(max(n, 0) * height // width), math.isqrt(max(n, 0) * width // height)
    if h * w != n or h * width != w * height or n < 1:
        raise L2TError(
            f"{told}, and {count} - {prefix} tokens are no grid with the aspect of the images ({height} x {width}): "
            "say how many come before them, as 'tokens+1'."
        )
    return FeatureMap("tokens", (channels, h, w), prefix)


def _is_batch(axis: Axis) -> bool:
    return len(axis) == 1 and axis[0].kind == "B" and axis[0].spans


def _four_axes(axes: Axes) -> FeatureMap | None:
    rows, columns = _place(axes, "H"), _place(axes, "W")
    sizes = [size_of(axis) for axis in axes]
    if (rows, columns) == (2, 3):
        return FeatureMap("NCHW", (sizes[1], sizes[2], sizes[3]))
    if (rows, columns) == (1, 2):
        return FeatureMap("NHWC", (sizes[3], sizes[1], sizes[2]))
    return None


def _place(axes: Axes, kind: str) -> int | None:
    """The one axis that is the rows (columns), whole and in order. Finer rows may lie in the channels."""
    places = [i for i, axis in enumerate(axes) if len(axis) == 1 and axis[0].kind == kind and _in_order(axis[0])]
    tokens = any(factor.kind == "tokens" for axis in axes for factor in axis)
    return places[0] if len(places) == 1 and not tokens else None


def _in_order(factor: Factor) -> bool:
    return factor.spans and not factor.shift


def _tokens(axes: Axes) -> FeatureMap | None:
    if len(axes) != 3 or spatial_kinds(axes[2]):
        return None
    axis, prefix = axes[1], 0
    if len(axis) == 1 and axis[0].kind == "tokens":
        axis, prefix = axis[0].grid, axis[0].before
    if [factor.kind for factor in axis] != ["H", "W"] or not all(map(_in_order, axis)):
        return None
    return FeatureMap("tokens", (size_of(axes[2]), axis[0].size, axis[1].size), prefix)
