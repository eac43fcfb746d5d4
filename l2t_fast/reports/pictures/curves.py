"""curves.png: cross entropy and validation accuracy over the epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from l2t_fast.reports.arrays import ragged
from l2t_fast.reports.column import Epochs
from l2t_fast.reports.pictures.canvas import figure, plot_band, save


def plot_curves(path: Path, columns: Mapping[str, Mapping[str, Sequence[Epochs]]], title: str) -> None:
    """A line a method, the mean of its seeds ± one std; columns of a table one below the other.

    columns: {title: {method: the epochs of each seed}}; a seed may have stopped before the others.
    """
    fig = figure(10, 0.6 + 3.4 * len(columns))
    grid = fig.subplots(len(columns), 2, squeeze=False)
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
