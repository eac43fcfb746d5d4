"""Pictures of a table: every method and seed of each column, and accuracy against the number of training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from l2t_fast.reports.pictures.weights import plot_band, save

if TYPE_CHECKING:
    from l2t_fast.reports.table import Entry, Summary

# Baselines cold and dashed, methods that learn the transfer warm diamonds, the last of them in the red of plot_table.
_BLUE, _RED = "#2f6f9f", "#c8202f"
_COLD = ["#8a949e", "#7fb2d6", _BLUE, "#1b3a5c", "#6abf9f", "#2e7d6b", "#7b6fb0"]
_SHAPES = ["o", "s", "^", "v", "P", "X", "p"]
_WARM = [_RED, "#ef8636", "#e6b422", "#8e1b4f"]


def plot_table(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """A panel a column, a row a method: mean ± std, each seed as a dot, the published mean hollow."""
    columns = 2 if len(summaries) == 4 else min(3, len(summaries))
    rows = -(-len(summaries) // columns)
    count = len(summaries[0].entries)
    size = (1.4 + 3.5 * columns, 1.1 + rows * (0.75 + 0.36 * count))
    fig, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axes, summary in zip(grid.flat, summaries, strict=False):
        _panel(axes, summary)
        if len(summaries) > 1 or summary.title != title:
            axes.set_title(summary.title, fontsize=10)
    for axes in grid.flat[len(summaries) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(count), [entry.method for entry in summaries[0].entries])
    grid[0, 0].set_ylim(count - 0.4, -0.6)
    fig.suptitle(title)
    fig.legend(
        handles=_legend(summaries), loc="outside lower center", ncols=min(5, 1 + columns), fontsize=8, frameon=False
    )
    save(fig, path)


def _panel(axes: Any, summary: Summary) -> None:
    for y, entry in enumerate(summary.entries):
        color, marker = (_RED, "D") if entry.is_meta else (_BLUE, "o")
        if entry.published:
            mean, std = entry.published
            axes.errorbar(mean, y + 0.26, xerr=std, fmt="s", mfc="white", mec="0.45", ecolor="0.65", ms=4, elinewidth=1)
        if entry.headline is None:
            axes.text(1.02, y, "no result", transform=axes.get_yaxis_transform(), **_NUMBER, color="0.5")
            continue
        seeds = list(entry.values.values())
        axes.plot(seeds, np.full(len(seeds), y - 0.2), ".", color=color, alpha=0.55, ms=5, mew=0)
        axes.errorbar(
            entry.headline.mean,
            y,
            xerr=entry.headline.std,
            fmt=marker,
            color=color,
            ms=5.5,
            elinewidth=1.6,
            capsize=2.5,
        )
        if entry.method == summary.baseline:
            axes.axvline(entry.headline.mean, color=_BLUE, linewidth=0.8, linestyle="--", zorder=0)
        weight = "bold" if summary.leads(entry) else "normal"
        axes.text(1.02, y, _number(entry), transform=axes.get_yaxis_transform(), **_NUMBER, weight=weight)
    what = "best by validation" if summary.metric == "test_accuracy_best" else "last epoch"
    axes.set_xlabel(f"test accuracy (%), {what}", fontsize=9)
    axes.tick_params(labelsize=9, length=0, axis="y")
    axes.tick_params(labelsize=8, axis="x")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


_NUMBER: dict[str, Any] = {"fontsize": 7.5, "va": "center"}


def _number(entry: Entry) -> str:
    assert entry.headline is not None
    spread = "" if entry.headline.std is None else f" ± {entry.headline.std:.1f}"
    return f"{entry.headline.mean:.1f}{spread}"


def _legend(summaries: Sequence[Summary]) -> list[Line2D]:
    entries = [entry for summary in summaries for entry in summary.entries]
    handles = [Line2D([], [], color=_BLUE, marker="o", ms=5.5, lw=1.6, label="baseline, mean ± std")]
    if any(entry.is_meta for entry in entries):
        handles.append(Line2D([], [], color=_RED, marker="D", ms=5.5, lw=1.6, label="learned transfer, mean ± std"))
    handles.append(Line2D([], [], color="0.4", marker=".", ms=6, lw=0, label="one seed"))
    if any(entry.published for entry in entries):
        label = "published, as transcribed"
        handles.append(Line2D([], [], color="0.65", marker="s", ms=4, lw=1, mfc="white", mec="0.45", label=label))
    if any(summary.baseline for summary in summaries):
        handles.append(Line2D([], [], color=_BLUE, lw=0.8, ls="--", label="best baseline"))
    return handles


def plot_sweep(path: Path, title: str, groups: Mapping[str, Sequence[Summary]]) -> None:
    """Accuracy against training images a class, a panel a group: a line a method, mean ± std over its seeds.

    Columns without a limit (per_class None) stand apart at the right, as "all".
    """
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (0.6 + 4.2 * columns, 1.3 + 3.4 * rows)
    fig, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (name, summaries) in zip(grid.flat, groups.items(), strict=False):
        _sweep_panel(axes, name, summaries)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.suptitle(f"{title}: mean ± std")
    save(fig, path)


def _sweep_panel(axes: Any, name: str, summaries: Sequence[Summary]) -> None:
    numbers = [summary.per_class for summary in summaries if summary.per_class is not None]
    places = [float(number) for number in numbers]
    labels = [str(number) for number in numbers]
    limited = len(places)
    if limited < len(summaries):
        places += [2.5 * max(places)] * (len(summaries) - limited)
        labels += ["all"] * (len(summaries) - limited)
    x = np.array(places)
    metas = [entry.method for entry in summaries[0].entries if entry.is_meta]
    others = [entry.method for entry in summaries[0].entries if not entry.is_meta]
    style: dict[str, Any]
    for i, entry in enumerate(summaries[0].entries):
        column = [summary.entries[i] for summary in summaries]
        seeds = sorted({seed for found in column for seed in found.values})
        if not seeds:
            continue
        curves = np.array([[found.values.get(seed, np.nan) for found in column] for seed in seeds])  # [seeds, columns]
        if entry.is_meta:
            i_style = len(metas) - 1 - metas.index(entry.method)
            style = {"color": _WARM[i_style % len(_WARM)], "marker": "D", "linestyle": "-", "linewidth": 1.8}
        else:
            i_style = others.index(entry.method) % len(_COLD)
            style = {"color": _COLD[i_style], "marker": _SHAPES[i_style], "linestyle": "--", "linewidth": 1.3}
        plot_band(axes, x[:limited], curves[:, :limited], label=entry.method, markersize=4, **style)
        if limited < len(x):
            for place, found in zip(x[limited:], column[limited:], strict=True):
                if found.headline:
                    bar = {**style, "markersize": 4, "elinewidth": 1, "capsize": 2}
                    axes.errorbar(place, found.headline.mean, yerr=found.headline.std, **bar)
            ends = [found.headline.mean if found.headline else np.nan for found in column[limited - 1 : limited + 1]]
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
