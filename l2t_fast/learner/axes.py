"""Axes of a tensor, named by what they hold of the images: pure algebra on names and sizes, no tensor is touched.

An axis is a product of factors, outermost first: rows, columns, images, or something else. A view splits and joins
factors, so that windows, heads or tokens [B, H W, C] are known for what they are, and come back as rows and columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Factor:
    """A factor of an axis.

    Of kind "H", "W" or "B": every `step`-th of the `whole` rows, columns or images; of kind "tokens": the positions
    `grid`, with other tokens before and behind them; of kind "": anything else (channels, heads, what a product made).
    """

    kind: str
    size: int
    step: int = 1
    whole: int = 0
    shift: int = 0  # rolled by so many
    before: int = 0
    grid: "tuple[Factor, ...]" = ()

    @property
    def spans(self) -> bool:
        """From the first row to the last, not those of a window."""
        return self.size * self.step == self.whole


Axis = tuple[Factor, ...]  # outermost first; the sizes multiply to the axis's
Axes = tuple[Axis, ...]


def size_of(axis: Axis) -> int:
    """Entries of the axis."""
    return math.prod(factor.size for factor in axis)


def unknown(size: int) -> Axis:
    """An axis that holds nothing we know of the images' positions: channels, for one."""
    return (Factor("", size),)


def every(kind: str, size: int) -> Axis:
    """An axis that is all rows (columns, images), in order."""
    return (Factor(kind, size, whole=size),)


def spatial_kinds(axis: Axis) -> set[str]:
    """What the axis holds of rows and columns."""
    return {factor.kind for factor in axis} & {"H", "W", "tokens"}


def _joined(factors: Sequence[Factor]) -> Axis:
    """The factors of one axis, those that belong together made one."""
    axis: list[Factor] = []
    for factor in factors:
        last = axis[-1] if axis else None
        if last and last.kind == factor.kind == "":
            axis[-1] = Factor("", last.size * factor.size)
        elif (
            last
            and last.kind == factor.kind != "tokens"
            and (last.step, last.whole, last.shift) == (factor.step * factor.size, factor.whole, factor.shift)
        ):
            axis[-1] = replace(factor, size=last.size * factor.size)
        elif factor.kind or factor.size > 1:
            axis.append(factor)
    return tuple(axis) or unknown(1)


def viewed(axes: Axes, shape: Sequence[int]) -> Axes:
    """The same numbers in the same order, as other axes."""
    if not math.prod(shape) == math.prod(map(size_of, axes)) > 0:
        return tuple(unknown(size) for size in shape)
    factors = [factor for axis in axes for factor in axis if factor.kind or factor.size > 1]
    result: list[Axis] = []
    for i, size in enumerate(shape):
        taken: list[Factor] = []
        if size == 1:  # of the factors of size 1 those that the following axes of size 1 do not need
            ones = next((j for j, factor in enumerate(factors) if factor.size > 1), len(factors))
            places = next((j for j, s in enumerate(shape[i:]) if s > 1), len(shape) - i)
            count = max(ones - places + 1, min(ones, 1))
            taken, factors = factors[:count], factors[count:]
        while (left := size // math.prod(p.size for p in taken)) > 1:
            factor = factors.pop(0)
            if left % factor.size == 0:
                taken.append(factor)
            elif factor.size % left == 0:
                inner = factor.size // left
                split = factor.kind != "tokens"
                taken.append(replace(factor, size=left, step=factor.step * inner) if split else Factor("", left))
                factors.insert(0, replace(factor, size=inner) if split else Factor("", inner))
            else:
                return (*result, *(unknown(s) for s in shape[i:]))
        # A map of one column: its column goes with its rows, unless an axis of size 1 waits for it.
        alone = i + 1 == len(shape) or (shape[i + 1] > 1 and spatial_kinds(tuple(taken)))
        while size > 1 and alone and factors and factors[0].size == 1:
            taken.append(factors.pop(0))
        result.append(_joined(taken))
    return tuple(result)


def agreed(a: Axis, b: Axis) -> Axis:
    """One axis of two operands that act on each other entry by entry: what either knows, nothing if they differ."""
    if not _known(b):
        return a
    if not _known(a):
        return b
    return _merged(a, b) or _merged(b, a) or unknown(size_of(a))


def _known(axis: Axis) -> list[Factor]:
    return [factor for factor in axis if factor.kind]


def _merged(a: Axis, b: Axis) -> Axis | None:
    """The factors of a, where it knows nothing those of b; None if they differ or do not lie on each other."""
    pieces = viewed((b,), [factor.size for factor in a])
    if _known(tuple(factor for piece in pieces for factor in piece)) != _known(b):
        return None
    merged: list[Factor] = []
    for factor, piece in zip(a, pieces, strict=True):
        if not factor.kind:
            merged.extend(piece)
        elif not _known(piece):
            merged.append(factor)
        elif len(piece) == 1 and _alike(factor, piece[0]):
            merged.append(piece[0] if factor.shift else factor)
        else:
            return None
    return _joined(merged)


def _alike(a: Factor, b: Factor) -> bool:
    return (a.kind, a.size, a.before, a.spans) == (b.kind, b.size, b.before, b.spans)


def broadcast(operands: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of what is computed entry by entry."""
    result = []
    for place, size in enumerate(shape, start=-len(shape)):
        axis = unknown(size)
        for axes in operands:
            if -place <= len(axes) and size_of(axes[place]) == size:
                axis = agreed(axis, axes[place])
        result.append(axis)
    return tuple(result)


def resized(axes: Axes, shape: Sequence[int]) -> Axes:
    """Rows and columns pooled, cropped, padded: still rows and columns, where the axis holds nothing else."""

    def one(i: int, size: int) -> Axis:
        axis = axes[i]
        if size_of(axis) == size:
            return axis
        factor = axis[0]
        elsewhere = {factor.kind for j, rest in enumerate(axes) if j != i for factor in rest}
        if len(axis) == 1 and factor.kind in ("H", "W") and factor.spans and factor.kind not in elsewhere:
            return (Factor(factor.kind, size, whole=size, shift=factor.shift),)
        return unknown(size)

    return tuple(one(i, size) for i, size in enumerate(shape))


def as_map(axes: Axes, shape: Sequence[int]) -> Axes:
    """What is [B, C, H, W] by the kind of the operation; if nothing is known about its rows, that makes them known."""
    axes = resized(axes, shape)
    if len(shape) == 4 and not any(spatial_kinds(axis) for axis in axes):
        axes = (*axes[:2], every("H", shape[2]), every("W", shape[3]))
    return axes


def sliced(axes: Axes, dim: int, start: int, size: int) -> Axes:
    """Axis `dim` from `start` on; tokens without those before them are the positions themselves."""
    (*_, factor), whole = axes[dim], size_of(axes[dim])
    shape = [size_of(axis) for axis in axes]
    if len(axes[dim]) == 1 and factor.kind == "tokens" and size != whole:
        positions = size_of(factor.grid)
        before = factor.before - start
        if before == 0 and size == positions:
            new = factor.grid
        elif before >= 0 and size >= before + positions:
            new = (replace(factor, size=size, before=before),)
        else:
            new = unknown(size)
        return (*axes[:dim], new, *axes[dim + 1 :])
    return resized(axes, [*shape[:dim], size, *shape[dim + 1 :]])


def concatenated(operands: Sequence[Axes], dim: int, shape: Sequence[int]) -> Axes:
    """Positions with other entries before or behind them are tokens; two sets of positions are nothing known."""
    joined = [axes[dim] for axes in operands]
    positions = [i for i, axis in enumerate(joined) if spatial_kinds(axis)]
    new = unknown(shape[dim])
    if len(operands) == 1:
        new = joined[0]
    elif len(positions) == 1 and "B" not in {factor.kind for factor in joined[positions[0]]}:
        (i,) = positions
        before, grid = sum(size_of(axis) for axis in joined[:i]), joined[i]
        if grid[0].kind == "tokens":
            before, grid = before + grid[0].before, grid[0].grid
        new = (Factor("tokens", shape[dim], before=before, grid=grid),)
    rest = broadcast(operands, shape)
    return (*rest[:dim], new, *rest[dim + 1 :])
