"""pair_weights.png and channel_weights.png of one training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2t_fast.reports.arrays import Array
from l2t_fast.reports.pictures.canvas import figure, mark_epochs, name_picture, save


def plot_pair_weights(path: Path, weights: Sequence[Sequence[float]], names: Sequence[str], title: str) -> None:
    """pair_weights.png, as `draw_pair_weights` has it."""
    save(draw_pair_weights(weights, names, title), path)


def draw_pair_weights(weights: Sequence[Sequence[float]], names: Sequence[str], title: str) -> Any:
    """Heat map of the mean pair weights λ: pairs down, epochs across. weights: [epochs, P]."""
    values = np.array(weights).T  # [P, epochs]
    fig = figure(8, 1.5 + 0.28 * len(names))
    axes = fig.subplots()
    epochs = values.shape[1]
    extent = (0.5, epochs + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    mark_epochs(axes, epochs)
    axes.set_title(title)
    fig.colorbar(image, label="mean pair weight λ")
    return fig


def plot_channel_weights(path: Path, weights: Sequence[Array], names: Sequence[str], title: str) -> None:
    """A histogram of C_s·w a pair, over images and channels; 1 is uniform. weights: [N, C_s] of each pair."""
    across = min(5, len(names))
    down = -(-len(names) // across)
    fig = figure(2.6 * across, 0.8 + 1.9 * down)
    grid = fig.subplots(down, across, squeeze=False, sharex=True)
    scaled = [w * w.shape[1] for w in weights]
    low, high = min(w.min() for w in scaled), max(w.max() for w in scaled)
    margin = max(0.02, 0.05 * (high - low))
    bins = np.linspace(low - margin, high + margin, 41)
    for axes, w, name in zip(grid.flat, scaled, names, strict=False):
        axes.hist(w.ravel(), bins=bins, weights=np.full(w.size, 100 / w.size))
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7, labelbottom=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    fig.supxlabel("channel weight relative to uniform, C_s · w", fontsize=9)
    fig.supylabel("% of weights", fontsize=9)
    name_picture(fig, title)
    save(fig, path)
