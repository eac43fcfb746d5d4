"""What all pictures share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from l2t_fast.files import save_bytes
from l2t_fast.reports.arrays import Array

Style = Mapping[str, Any]
# Told apart by the colour-blind too (Okabe & Ito 2008), without the yellow, which white swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.")  # one for each turn of the colours


def figure(width: float, height: float) -> Any:
    """An empty picture, in inches; no window is ever opened for it."""
    return Figure(figsize=(width, height), layout="constrained")


def name_picture(fig: Any, title: str, **style: Any) -> None:
    """The title of the whole picture, in smaller letters where there is no room for it."""
    text = fig.suptitle(title, **style)
    canvas: Any = FigureCanvasAgg(fig)
    width = text.get_window_extent(canvas.get_renderer()).width
    text.set_fontsize(text.get_fontsize() * min(1.0, 0.98 * fig.bbox.width / max(width, 1.0)))


def mark_epochs(axes: Any, epochs: int) -> None:
    """Whole epochs at the bottom; a single one in the middle."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if epochs == 1:
        axes.set_xlim(0.5, 1.5)


def plot_band(axes: Any, x: Array, curves: Array, shade: float = 0.15, **line: Any) -> None:
    """The mean of `curves` [seeds, x] ± one sample std, shaded, over the seeds that have a value there."""
    count = np.sum(~np.isnan(curves), 0)
    mean = np.where(count > 0, np.nansum(curves, 0) / np.maximum(count, 1), np.nan)
    std = np.sqrt(np.nansum((curves - mean) ** 2, 0) / np.maximum(count - 1, 1))
    style = {"marker": "." if len(x) < 30 else None, **line}
    (drawn,) = axes.plot(x, mean, **style)
    axes.fill_between(x, mean - std, mean + std, color=drawn.get_color(), alpha=shade, linewidth=0)


def name_ends(axes: Any, names: Sequence[str], ends: Sequence[tuple[float, float]], styles: Sequence[Style]) -> None:
    """Names at the right of lines that end at (x, y), as high as these where there is room; styles: of each name."""
    low, high = axes.get_ylim()
    height = high
    for i in sorted(range(len(names)), key=lambda i: -ends[i][1]):
        height = min(ends[i][1], height)
        arrow = {"arrowstyle": "-", "color": styles[i]["color"], "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(
            names[i],
            ends[i],
            (1.04, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            arrowprops={**arrow, "shrinkA": 1, "shrinkB": 3},
            **styles[i],
        )
        height -= 0.05 * (high - low)


def pixels(fig: Any) -> NDArray[np.uint8]:
    """The picture as [height, width, RGB]."""
    canvas: Any = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save(fig: Any, path: Path) -> None:
    """Writes the picture as PNG, all of them as finely."""
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=120)
    save_bytes(path, picture.getbuffer())
