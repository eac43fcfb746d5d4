"""inspect_METHOD.png, what a method learned: pairs by λ, λ over the epochs, weights of the channels."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.lines import Line2D

from l2t_fast.reports.learned import Learned
from l2t_fast.reports.pictures.canvas import COLORS, figure, mark_epochs, name_ends, name_picture, plot_band, save

_LABELLED = 5  # lines with their name beside them
_WIDEST = 11.0  # points, of the line of the highest λ


def plot_learned(path: Path, learned: Learned, title: str) -> None:
    """Left the layers of each source and the target with λ between them, middle λ over the epochs, right the channels.

    What is fixed, or not known yet, has no panel; something must be known.
    """
    sources = list(dict.fromkeys(source for source, _, _ in learned.layers or []))
    linked = sources if learned.final is not None else []
    widths = ([4.0] if linked else []) + ([4.6] if learned.history is not None else [])
    widths += [3.9] if learned.profiles is not None else []
    height = max(4.2, sum(0.8 + 0.42 * max(len(_layer_names(learned, s, i)) for i in (1, 2)) for s in linked))
    fig = figure(sum(widths) + 1.2, height)
    spec = fig.add_gridspec(1, len(widths), width_ratios=widths)
    grid = iter([spec[0, i] for i in range(len(widths))])
    colors = _colors(learned)
    if linked and learned.final is not None:
        places = next(grid).subgridspec(len(linked), 1)
        highest = float(learned.final.mean(0).max())
        for i, source in enumerate(linked):
            _links(fig.add_subplot(places[i, 0]), learned, source, colors, highest)
        fig.axes[0].set_title(f"pair weight λ at the end (widest: {highest:.2f})", fontsize=10, pad=8)
    if learned.history is not None:
        _history(fig.add_subplot(next(grid)), learned, colors)
    if learned.profiles is not None:
        _profiles(fig.add_subplot(next(grid)), learned, colors)
    _legend(fig, learned, colors)
    count = len(learned.seeds)
    name_picture(fig, title + (f": mean of {count} seeds, bands ± std" if count > 1 else f": seed {learned.seeds[0]}"))
    save(fig, path)


def _layer_names(learned: Learned, source: str, which: int) -> list[str]:
    return list(dict.fromkeys(layer[which] for layer in learned.layers or [] if layer[0] == source))


def _colors(learned: Learned) -> list[Any]:
    """A color for each pair: that of its source layer."""
    owners = [layer[:2] for layer in learned.layers] if learned.layers else [("", name) for name in learned.names]
    distinct = list(dict.fromkeys(owners))
    shades: list[Any] = list(COLORS)
    if len(distinct) > len(COLORS):
        shades = [colormaps["viridis"](i / (len(distinct) - 1)) for i in range(len(distinct))]
    return [shades[distinct.index(owner)] for owner in owners]


def _legend(fig: Any, learned: Learned, colors: list[Any]) -> None:
    if not learned.layers:
        return
    named = {f"{s}:{m}" if s else m: color for (s, m, _), color in zip(learned.layers, colors, strict=True)}
    handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in named.items()]
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": min(6, len(handles)), "frameon": False}
    fig.legend(handles=handles, title="source layer", title_fontsize=8, fontsize=8, **where)


def _links(axes: Any, learned: Learned, source: str, colors: list[Any], highest: float) -> None:
    """Layers of one source at the left, of the target at the right, first ones below: a line a pair, as wide as λ."""
    assert learned.final is not None
    ms, ns = _layer_names(learned, source, 1), _layer_names(learned, source, 2)
    left, right = np.linspace(0, 1, len(ms) + 2)[1:-1], np.linspace(0, 1, len(ns) + 2)[1:-1]
    drawn = zip(learned.layers or [], learned.final.mean(0), colors, strict=True)
    for (s, m, n), weight, color in sorted(drawn, key=lambda pair: pair[1]):
        if s == source and weight > 0:
            part = weight / highest
            y = (left[ms.index(m)], right[ns.index(n)])
            style = {"color": color, "alpha": 0.35 + 0.6 * part, "solid_capstyle": "butt"}
            axes.plot((0, 1), y, linewidth=_WIDEST * part, **style)
    shades = {m: color for (s, m, _), color in zip(learned.layers or [], colors, strict=True) if s == source}
    for m, y in zip(ms, left, strict=True):
        axes.plot(0, y, "s", color=shades[m], markersize=9, clip_on=False)
        axes.text(-0.09, y, m, ha="right", va="center", fontsize=8)
    for n, y in zip(ns, right, strict=True):
        axes.plot(1, y, "s", color="0.35", markersize=9, clip_on=False)
        axes.text(1.09, y, n, ha="left", va="center", fontsize=8)
    axes.text(0, 1, f"source {source}".strip(), ha="center", va="bottom", fontsize=9)
    axes.text(1, 1, "target", ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-0.05, 1.05), ylim=(0, 1.04))
    axes.axis("off")


def _history(axes: Any, learned: Learned, colors: list[Any]) -> None:
    """A line a pair; the highest ones have their names at the right."""
    assert learned.history is not None
    epochs = np.arange(1, learned.history.shape[1] + 1)
    ends = np.nanmean(learned.history[:, -1], axis=0)  # of the seeds that got there
    labelled = np.argsort(-ends, kind="stable")[:_LABELLED]
    for p, color in enumerate(colors):
        faint = p not in labelled
        style = {"color": color, "linewidth": 0.9 if faint else 1.8, "alpha": 0.6 if faint else 1.0, "markersize": 4}
        plot_band(axes, epochs, learned.history[:, :, p], shade=0.0 if faint else 0.12, **style)
    low, high = float(np.nanmin(learned.history)), float(np.nanmax(learned.history))  # λ is never below, a band may be
    low = 0.0 if low < 0.3 * high else low
    margin = 0.04 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    styles = [{"color": colors[p], "fontsize": 8} for p in labelled]
    name_ends(axes, [learned.names[p] for p in labelled], [(epochs[-1], ends[p]) for p in labelled], styles)
    mark_epochs(axes, len(epochs))
    axes.xaxis.label.set_size(9)
    axes.set_ylabel("mean λ in the epoch", fontsize=9)
    axes.set_title("pair weight λ over training", fontsize=10)
    _trim(axes)


def _profiles(axes: Any, learned: Learned, colors: list[Any]) -> None:
    """C_s * w in falling order against the share of the channels, a line a pair; uniform weights are 1."""
    highest, lowest = 1.0, 1.0
    for profile, color in zip(learned.profiles or [], colors, strict=True):
        mean = profile.mean(0)  # [C_s]
        axes.plot((np.arange(len(mean)) + 0.5) / len(mean) * 100, mean, color=color, linewidth=1.2, alpha=0.85)
        highest, lowest = max(highest, mean.max()), min(lowest, mean.min())
    axes.axhline(1, color="black", linewidth=0.9, linestyle=":")
    axes.text(99, 1, "uniform", fontsize=7.5, ha="right", va="bottom")
    if highest > 8:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(lowest * 0.8, 1e-3))
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels, by falling weight (%)", fontsize=9)
    axes.set_ylabel("weight relative to uniform, $C_s\\,w$", fontsize=9)
    axes.set_title("channel weights w at the end", fontsize=10)
    _trim(axes)


def _trim(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
