"""curves.png: cross entropy and validation accuracy over the epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from l2t_fast.reports.arrays import ragged
from l2t_fast.reports.column import Epochs
from l2t_fast.reports.pictures.canvas import COLORS, DASHES, figure, mark_epochs, name_picture, plot_band, save


def plot_curves(path: Path, columns: Mapping[str, Mapping[str, Sequence[Epochs]]], title: str) -> None:
    """A line a method, the mean of its seeds ± one std; columns of a table one below the other.

    columns: {title: {method: the epochs of each seed}}; a seed may have stopped before the others.
    """
    fig = figure(10, 0.6 + 3.4 * len(columns))
    grid = fig.subplots(len(columns), 2, squeeze=False)
    # A method looks the same in all columns, also where another is missing.
    methods = list(dict.fromkeys(method for runs in columns.values() for method in runs))
    turns = [divmod(i, len(COLORS)) for i in range(len(methods))]
    styles: dict[str, dict[str, Any]] = {
        method: {"color": COLORS[i], "linestyle": DASHES[turn % len(DASHES)]}
        for method, (turn, i) in zip(methods, turns, strict=True)
    }
    for (left, right), (name, runs) in zip(grid, columns.items(), strict=True):
        for method, seeds in runs.items():
            for axes, key, scale in ((left, "loss", 1.0), (right, "val_accuracy", 100.0)):
                curves = scale * ragged([[row.get(key, np.nan) for row in rows] for rows in seeds])
                plot_band(axes, np.arange(1, curves.shape[1] + 1), curves, **styles[method])
        for axes, what in ((left, "training cross entropy"), (right, "validation accuracy (%)")):
            axes.set_ylabel(what)
            mark_epochs(axes, max((len(rows) for seeds in runs.values() for rows in seeds), default=0))
            axes.grid(alpha=0.3)
        if len(columns) > 1:
            left.set_title(name, loc="left", fontsize=10)
    grid[0, 0].legend(handles=[Line2D([], [], label=method, **style) for method, style in styles.items()])
    count = max((len(seeds) for runs in columns.values() for seeds in runs.values()), default=0)
    name_picture(fig, title + (f": mean ± std of {count} seeds" if count > 1 else ""))
    save(fig, path)
