"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Rows = Sequence[Mapping[str, Any]]  # the epoch lines of one metrics.jsonl


def plot_curves(path: Path, runs: Mapping[str, Sequence[Rows]], title: str) -> None:
    """Cross entropy and validation accuracy over the epochs: a line a method, the mean of its seeds ± one std."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, seeds in runs.items():
        for axes, key, scale in ((left, "loss", 1.0), (right, "val_accuracy", 100.0)):
            curves = np.array([[row.get(key, np.nan) for row in rows] for rows in seeds]) * scale  # [seeds, epochs]
            epochs, mean, std = np.arange(1, curves.shape[1] + 1), curves.mean(0), curves.std(0)
            (line,) = axes.plot(epochs, mean, label=method, marker="." if len(epochs) < 30 else None)
            axes.fill_between(epochs, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    for axes, name in ((left, "training cross entropy"), (right, "validation accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.legend()
    count = max(len(seeds) for seeds in runs.values())
    fig.suptitle(title + (f": mean ± std of {count} seeds" if count > 1 else ""))
    _save(fig, path)


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
    _save(fig, path)


def plot_channel_weights(path: Path, weights: Sequence[np.ndarray], names: Sequence[str], title: str) -> None:
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
    _save(fig, path)


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=120)
    plt.close(fig)
