"""sweep.png: accuracy against the number of training images a class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

from l2t_fast.reports.comparison import Summary
from l2t_fast.reports.pictures.canvas import figure, name_ends, name_picture, plot_band, save

# Baselines cold and dashed, methods that learn the transfer warm diamonds, the last of them in the red of plot_table.
_COLD = ["#8a949e", "#7fb2d6", "#2f6f9f", "#1b3a5c", "#6abf9f", "#2e7d6b", "#7b6fb0"]
_SHAPES = ["o", "s", "^", "v", "P", "X", "p"]
_WARM = ["#c8202f", "#ef8636", "#e6b422", "#8e1b4f"]


def plot_sweep(path: Path, title: str, groups: Mapping[str, Sequence[Summary]]) -> None:
    """Accuracy against training images a class, a panel a group: a line a method, mean ± std over its seeds.

    Columns without a limit (per_class None) stand apart at the right, as "all". In one panel alone each line has its
    name beside it.
    """
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    alone = len(groups) == 1
    fig = figure(0.6 + 4.2 * across + 1.6 * alone, 1.3 + 3.4 * down)
    grid = fig.subplots(down, across, squeeze=False)
    for axes, (name, summaries) in zip(grid.flat, groups.items(), strict=False):
        _panel(axes, name, summaries)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    if alone:
        _name_lines(grid[0, 0])
    else:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    name_picture(fig, f"{title}: mean ± std")
    save(fig, path)


def _panel(axes: Any, name: str, summaries: Sequence[Summary]) -> None:
    numbers = [summary.per_class for summary in summaries if summary.per_class is not None]
    places = [float(number) for number in numbers]
    labels = [str(number) for number in numbers]
    limited = len(places)
    if limited < len(summaries):
        places += [2.5 * max(places)] * (len(summaries) - limited)
        labels += ["all"] * (len(summaries) - limited)
    x = np.array(places)
    styles = _styles(summaries[0])
    for i, standing in enumerate(summaries[0].standings):
        along = [summary.standings[i] for summary in summaries]
        seeds = sorted({seed for found in along for seed in found.values})
        if not seeds:
            continue
        curves = np.array([[found.values.get(seed, np.nan) for found in along] for seed in seeds])  # [seeds, columns]
        style = styles[standing.method]
        plot_band(axes, x[:limited], curves[:, :limited], label=standing.method, markersize=4, **style)
        if limited < len(x):
            for place, found in zip(x[limited:], along[limited:], strict=True):
                if found.headline:
                    bar = {**style, "markersize": 4, "elinewidth": 1, "capsize": 2}
                    axes.errorbar(place, found.headline.mean, yerr=found.headline.std, **bar)
            ends = [found.headline.mean if found.headline else np.nan for found in along[limited - 1 : limited + 1]]
            axes.plot(x[limited - 1 : limited + 1], ends, color=style["color"], linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([label for _, label in sorted(dict(zip(places, labels, strict=True)).items())])
    what = "best by validation" if summaries[0].metric == "test_accuracy_best" else "last epoch"
    axes.set(xlabel="training images per class", ylabel=f"test accuracy (%), {what}")
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _name_lines(axes: Any) -> None:
    """The name of each line at its end, in its color; of those that learn the transfer bold."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    ends = [max(tuple(point) for point in line.get_xydata() if not np.isnan(point[1])) for line in lines]
    weights = {"-": "bold", "--": "normal"}
    styles = [{"color": line.get_color(), "weight": weights[line.get_linestyle()], "fontsize": 9} for line in lines]
    name_ends(axes, [line.get_label() for line in lines], ends, styles)


def _styles(summary: Summary) -> dict[str, dict[str, Any]]:
    """How the line of each method looks."""
    metas = [standing.method for standing in summary.standings if standing.is_meta]
    baselines = [standing.method for standing in summary.standings if not standing.is_meta]
    warm = {
        method: {"color": _WARM[i % len(_WARM)], "marker": "D", "linestyle": "-", "linewidth": 1.8}
        for i, method in enumerate(reversed(metas))
    }
    cold = {
        method: {"color": _COLD[i % len(_COLD)], "marker": _SHAPES[i % len(_COLD)], "linestyle": "--", "linewidth": 1.3}
        for i, method in enumerate(baselines)
    }
    return {**warm, **cold}
