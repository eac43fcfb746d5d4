"""The layers of one network or two: at which resolutions they are matched, and which with which."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2t_fast.reports.pictures.canvas import figure, save

# Okabe & Ito: told apart by the colour-blind, too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_EQUAL, _OTHER = "-", (0, (4, 3))  # lines of pairs: of equal resolution, and those that are resized
_LAYER, _BETWEEN = 0.62, 0.3  # inches, of a layer and between two resolutions


@dataclass(frozen=True)
class Column:
    """A network and its layers that are matched, as (name, (C, H, W))."""

    title: str
    layers: Sequence[tuple[str, tuple[int, int, int]]]


def plot_networks(path: Path, columns: Sequence[Column], pairs: Sequence[tuple[int, int]] = ()) -> None:
    """The source at the left, the target, if there is one, at the right; a line a pair (m, n).

    What stands at one height has one resolution, the highest above.
    """
    sizes = sorted({shape[1:] for column in columns for _, shape in column.layers}, key=lambda size: -size[0] * size[1])
    rows = {size: max(sum(s[1:] == size for _, s in column.layers) for column in columns) for size in sizes}
    height = sum(rows.values()) * _LAYER + (len(sizes) - 1) * _BETWEEN
    fig = figure(8.4 if len(columns) > 1 else 5.2, height + (1.5 if pairs else 0.9))
    axes = fig.add_subplot()
    places: list[list[float]] = [[] for _ in columns]
    top = height
    for size in sizes:
        middle = top - rows[size] * _LAYER / 2
        axes.text(-0.62, middle, f"{size[0]} × {size[1]}", ha="left", va="center", fontsize=9, color="0.3")
        for found, column in zip(places, columns, strict=True):
            count = sum(shape[1:] == size for _, shape in column.layers)
            found += [middle + ((count - 1) / 2 - i) * _LAYER for i in range(count)]
        top -= rows[size] * _LAYER + _BETWEEN
        if size != sizes[-1]:
            axes.axhline(top + _BETWEEN / 2, color="0.88", linewidth=0.8, zorder=0)
    for x, found, column in zip((0, 1), places, columns, strict=False):
        axes.text(x, height + 0.25, column.title, ha="center", va="bottom", fontsize=10, fontweight="bold")
        for m, ((name, shape), y) in enumerate(zip(column.layers, found, strict=True)):
            _box(axes, x, y, name, shape[0], _COLORS[m % len(_COLORS)] if pairs and x == 0 else "0.25")
    for m, n in pairs:  # under the boxes
        equal = columns[0].layers[m][1][1:] == columns[1].layers[n][1][1:]
        style: dict[str, Any] = {"color": _COLORS[m % len(_COLORS)], "linewidth": 2.2 if equal else 1.1}
        axes.plot((0, 1), (places[0][m], places[1][n]), linestyle=_EQUAL if equal else _OTHER, **style)
    if pairs:
        axes.plot([], [], color="0.25", linestyle=_EQUAL, linewidth=2.2, label="equal resolution")
        axes.plot([], [], color="0.25", linestyle=_OTHER, linewidth=1.1, label="source feature resized")
        fig.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes.set(xlim=(-0.65, 1.3 if len(columns) > 1 else 0.3), ylim=(-0.1, height + 0.55))
    axes.axis("off")
    save(fig, path)


def _box(axes: Any, x: float, y: float, name: str, channels: int, color: str) -> None:
    shown = name if len(name) <= 24 else f"…{name[-23:]}"
    frame = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color, "linewidth": 1.6}
    text = f"{shown}\n{channels} channels"
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, linespacing=1.25, bbox=frame, zorder=5)
