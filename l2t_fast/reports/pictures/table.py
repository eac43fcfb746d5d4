"""table.png: every method and seed of each column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from l2t_fast.reports.comparison import Summary, mean_std
from l2t_fast.reports.pictures.canvas import figure, name_picture, save

# Baselines are blue dots, methods that learn the transfer red diamonds.
_BLUE, _RED = "#2f6f9f", "#c8202f"
_NUMBER: dict[str, Any] = {"fontsize": 7.5, "va": "center"}


def plot_table(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """A panel a column, a row a method: mean ± std, each seed as a dot, the published mean hollow."""
    across = 2 if len(summaries) == 4 else min(3, len(summaries))
    down = -(-len(summaries) // across)
    count = len(summaries[0].standings)
    fig = figure(1.4 + 3.5 * across, 1.1 + down * (0.75 + 0.36 * count))
    grid = fig.subplots(down, across, squeeze=False, sharey=True)
    for axes, summary in zip(grid.flat, summaries, strict=False):
        _panel(axes, summary)
        if len(summaries) > 1 or summary.title != title:
            axes.set_title(summary.title, fontsize=10)
    for axes in grid.flat[len(summaries) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(count), [standing.method for standing in summaries[0].standings])
    grid[0, 0].set_ylim(count - 0.4, -0.6)
    name_picture(fig, title)
    fig.legend(
        handles=_legend(summaries), loc="outside lower center", ncols=min(5, 1 + across), fontsize=8, frameon=False
    )
    save(fig, path)


def _panel(axes: Any, summary: Summary) -> None:
    for y, standing in enumerate(summary.standings):
        color, marker = (_RED, "D") if standing.is_meta else (_BLUE, "o")
        if standing.published:
            mean, std = standing.published
            axes.errorbar(mean, y + 0.26, xerr=std, fmt="s", mfc="white", mec="0.45", ecolor="0.65", ms=4, elinewidth=1)
        if standing.headline is None:
            axes.text(1.02, y, "no result", transform=axes.get_yaxis_transform(), **_NUMBER, color="0.5")
            continue
        seeds = list(standing.values.values())
        axes.plot(seeds, np.full(len(seeds), y - 0.2), ".", color=color, alpha=0.55, ms=5, mew=0)
        axes.errorbar(
            standing.headline.mean,
            y,
            xerr=standing.headline.std,
            fmt=marker,
            color=color,
            ms=5.5,
            elinewidth=1.6,
            capsize=2.5,
        )
        if standing.method == summary.baseline:
            axes.axvline(standing.headline.mean, color=_BLUE, linewidth=0.8, linestyle="--", zorder=0)
        weight = "bold" if summary.leads(standing) else "normal"
        axes.text(
            1.02, y, mean_std(standing.headline, 1), transform=axes.get_yaxis_transform(), **_NUMBER, weight=weight
        )
    what = "best by validation" if summary.metric == "test_accuracy_best" else "last epoch"
    axes.set_xlabel(f"test accuracy (%), {what}", fontsize=9)
    axes.tick_params(labelsize=9, length=0, axis="y")
    axes.tick_params(labelsize=8, axis="x")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(summaries: Sequence[Summary]) -> list[Line2D]:
    standings = [standing for summary in summaries for standing in summary.standings]
    handles = []
    if any(not standing.is_meta for standing in standings):
        handles.append(Line2D([], [], color=_BLUE, marker="o", ms=5.5, lw=1.6, label="baseline, mean ± std"))
    if any(standing.is_meta for standing in standings):
        handles.append(Line2D([], [], color=_RED, marker="D", ms=5.5, lw=1.6, label="learned transfer, mean ± std"))
    handles.append(Line2D([], [], color="0.4", marker=".", ms=6, lw=0, label="one seed"))
    if any(standing.published for standing in standings):
        handles.append(Line2D([], [], color="0.65", marker="s", ms=4, lw=1, mfc="white", mec="0.45", label="published"))
    if any(summary.baseline for summary in summaries):
        handles.append(Line2D([], [], color=_BLUE, lw=0.8, ls="--", label="best baseline"))
    return handles
