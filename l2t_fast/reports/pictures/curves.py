"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]  # the epoch lines of one metrics.jsonl


def plot_curves(path: Path, runs: Mapping[str, Sequence[Rows]], title: str) -> None:
    """Cross entropy and validation accuracy over the epochs: a line a method, the mean of its seeds ± one std."""
    plot_curves_of_columns(path, {"": runs}, title)


def plot_curves_of_columns(path: Path, columns: Mapping[str, Mapping[str, Sequence[Rows]]], title: str) -> None:
    """The same for several columns of a table, one below the other; a seed may have stopped before the others."""
    size = (10, 0.6 + 3.4 * len(columns))
    fig, grid = plt.subplots(len(columns), 2, figsize=size, layout="constrained", squeeze=False)
    # A method has one colour in all columns, also where another is missing.
    methods = list(dict.fromkeys(method for runs in columns.values() for method in runs))
    shades: Sequence[Any] = matplotlib.color_sequences["tab10" if len(methods) <= 10 else "tab20"]
    colors = {method: shades[i % len(shades)] for i, method in enumerate(methods)}
    for (left, right), (name, runs) in zip(grid, columns.items(), strict=True):
        for method, seeds in runs.items():
            for axes, key, scale in ((left, "loss", 1.0), (right, "val_accuracy", 100.0)):
                curves = scale * ragged([[row.get(key, np.nan) for row in rows] for rows in seeds])
                plot_band(axes, np.arange(1, curves.shape[1] + 1), curves, color=colors[method])
        for axes, what in ((left, "training cross entropy"), (right, "validation accuracy (%)")):
            axes.set(xlabel="epoch", ylabel=what)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        if len(columns) > 1:
            left.set_title(name, loc="left", fontsize=10)
    grid[0, 0].legend(handles=[Line2D([], [], color=color, label=method) for method, color in colors.items()])
    count = max((len(seeds) for runs in columns.values() for seeds in runs.values()), default=0)
    fig.suptitle(title + (f": mean ± std of {count} seeds" if count > 1 else ""))
    save(fig, path)


def ragged(rows: Sequence[Sequence[float]]) -> Array:
    """[rows, longest]: what a shorter row lacks is nan."""
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for line, row in zip(values, rows, strict=True):
        line[: len(row)] = row
    return values


def plot_band(axes: Any, x: Array, curves: Array, shade: float = 0.15, **line: Any) -> None:
    """The mean of `curves` [seeds, x] ± one sample std, shaded, over the seeds that have a value there."""
    count = np.sum(~np.isnan(curves), 0)
    mean = np.where(count > 0, np.nansum(curves, 0) / np.maximum(count, 1), np.nan)
    std = np.sqrt(np.nansum((curves - mean) ** 2, 0) / np.maximum(count - 1, 1))
    style = {"marker": "." if len(x) < 30 else None, **line}
    (drawn,) = axes.plot(x, mean, **style)
    axes.fill_between(x, mean - std, mean + std, color=drawn.get_color(), alpha=shade, linewidth=0)


def plot_pair_weights(path: Path, weights: Sequence[Sequence[float]], names: Sequence[str], title: str) -> None:
    """Heat map of the mean pair weights λ: a row a pair, a column an epoch. weights: [epochs, P]."""
    values = np.array(weights).T  # [P, epochs]
    fig, axes = plt.subplots(figsize=(8, 1.5 + 0.28 * len(names)), layout="constrained")
    epochs = values.shape[1]
    extent = (0.5, epochs + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", title=title)
    fig.colorbar(image, label="mean pair weight λ")
    save(fig, path)


def plot_channel_weights(path: Path, weights: Sequence[Array], names: Sequence[str], title: str) -> None:
    """A histogram of C_s·w a pair, over images and channels; 1 is uniform. weights: [N, C_s] of each pair."""
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    fig, grid = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 0.8 + 1.9 * rows), layout="constrained", squeeze=False, sharex=True
    )
    scaled = [w * w.shape[1] for w in weights]
    low, high = min(w.min() for w in scaled), max(w.max() for w in scaled)
    margin = max(0.02, 0.05 * (high - low))
    bins = np.linspace(low - margin, high + margin, 41)
    for axes, w, name in zip(grid.flat, scaled, names, strict=False):
        axes.hist(w.ravel(), bins=bins, weights=np.full(w.size, 100 / w.size))
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    fig.supxlabel("channel weight relative to uniform, C_s · w", fontsize=9)
    fig.supylabel("% of weights", fontsize=9)
    fig.suptitle(title)
    save(fig, path)


def save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=120)
    plt.close(fig)
