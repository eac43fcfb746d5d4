"""Pictures of one results file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.report.columns import SECTIONS
from benchmarks.report.series import series
from benchmarks.rows import Row, contender_name

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draws what there are rows for, and returns the names of the files."""
    done = [row for row in rows if "unavailable" not in row]
    drawn = {
        "speedups.png": speedups(done),
        "roofline.png": roofline(done),
        "time_against_T.png": lines(done, "inner_steps", "ms_median", "T", "ms an iteration"),
        "time_against_batch.png": lines(done, "batch", "ms_median", "images in a batch", "ms an iteration"),
        "scaling.png": scaling(done),
        "memory_against_T.png": lines(done, "inner_steps", "peak_bytes", "T", "peak memory, MB", scale=1e-6),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            plt.close(figure)
    return [name for name, figure in drawn.items() if figure is not None]


def speedups(rows: Sequence[Row]) -> Any:
    """A bar for each speedup of a contender, with the spread of its turns."""
    baselines = ("reference", "official", "official_tf32", "eager", "plain")
    bars = []
    for row in rows:
        overs = [name for name in baselines if f"speedup_over_{name}" in row and row["by"] != name]
        what = {"iteration": "iteration", "meta-gradient": "meta-gradient"}.get(row["kind"])
        what = what or row.get("operator") or row.get("part")
        if row.get("inner_steps", 2) == 2:
            batch = f", batch {row['batch']}" if "batch" in row else ""
            bars += [(f"{row['case']}{batch}: {what}, {contender_name(row)}", over, row) for over in overs]
    if not bars:
        return None
    colours = dict(zip(baselines, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(bars)), layout="constrained")
    for i, (_, over, row) in enumerate(bars):
        middle, low, high = (row[f"{field}_over_{over}"] for field in ("speedup", "speedup_p20", "speedup_p80"))
        axes.barh(i, middle, color=colours[over], xerr=[[middle - low], [high - middle]], ecolor="0.3", height=0.7)
        axes.text(max(middle, high), i, f"  {middle:.2f}", va="center", fontsize=8)
    for over in dict.fromkeys(over for _, over, _ in bars):
        axes.barh(0, 0, color=colours[over], label=f"over {over.replace('_', ' ')}")
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set(xlabel="times as fast (median of turns, p20 to p80)")
    axes.legend()
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Achieved FLOP/s against FLOPs a byte, below what copies and products of the device allow."""
    rates = {name: rate for row in rows if row["kind"] == "rates" for name, rate in row["rates"].items()}
    points = [row for row in rows if row.get("floor_flops") and "ms_median" in row and row["floor_bytes"]]
    if not points or "copy" not in rates:
        return None
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [row["floor_flops"] / row["floor_bytes"] for row in points]
    ridge = max(rates.values()) / rates["copy"]
    x = [min([ridge, *intensities]) / 3, max([ridge, *intensities]) * 3]
    grid = [x[0] * (x[1] / x[0]) ** (i / 200) for i in range(201)]
    for style, precision in zip(("-", "--", "-."), [name for name in rates if name != "copy"], strict=False):
        roof = [min(rates["copy"] * i, rates[precision]) for i in grid]
        axes.plot(grid, roof, style, color="0.3", label=f"roof, {precision}: measured copy, product or convolution")
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in points:
        by = row["by"] if row["kind"] == "operator" else contender_name(row)
        kinds.setdefault((row["kind"], by), []).append(row)
    colours = plt.get_cmap("tab20").colors
    for i, ((kind, by), mine) in enumerate(kinds.items()):
        axes.scatter(
            [row["floor_flops"] / row["floor_bytes"] for row in mine],
            [1e3 * row["floor_flops"] / row["ms_median"] for row in mine],
            color=colours[i % len(colours)],
            marker="osD^vPX*"[i // len(colours) % 8 if len(kinds) > len(colours) else list(SECTIONS).index(kind) % 8],
            s=28,
            label=f"{kind}: {by}",
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, at least", ylabel="FLOP/s of the least work")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def scaling(rows: Sequence[Row]) -> Any:
    """Efficiency against the number of GPUs, as modelled: a panel for each case and way to scale."""
    panels: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in (row for row in rows if row["kind"] == "scaling"):
        curves = panels.setdefault((row["case"], row["scaling"]), {})
        curves.setdefault(f"{row['by']}, {row['network']}", []).append(row)
    if not panels:
        return None
    columns = len({scaling for _, scaling in panels})
    count = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        count, columns, figsize=(5.2 * columns, 3.6 * count), layout="constrained", squeeze=False, sharey=True
    )
    for axes, ((case, way), curves) in zip(grid.flat, panels.items(), strict=True):
        for style, (name, points) in zip(STYLES, curves.items(), strict=False):
            axes.plot([row["gpus"] for row in points], [row["efficiency"] for row in points], style, label=name, ms=4)
        first = next(iter(curves.values()))[0]
        axes.set_title(f"{case}, {way}; {first['compute_ms']:.3g} ms on one GPU, {first['compute_by']}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="GPUs, in nodes of 8", ylabel="compute / (compute + communication)", ylim=(0, 1.05))
        axes.axhline(0.9, color="0.6", linewidth=1)
        axes.grid(alpha=0.3)
        axes.set_xticks([row["gpus"] for row in next(iter(curves.values()))])
        axes.xaxis.set_major_formatter("{x:.0f}")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def lines(rows: Sequence[Row], x: str, y: str, xlabel: str, ylabel: str, scale: float = 1.0) -> Any:
    """Whole iterations against T or batch, a line a contender, a panel a case; the other of the two is held fixed."""
    other = "batch" if x == "inner_steps" else "inner_steps"
    panels = series(rows, x, y, scale)
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, ((case, fixed), contenders) in zip(all_axes[0], panels.items(), strict=True):
        for style, (name, points) in zip(STYLES, contenders.items(), strict=False):
            xs = sorted(points)
            axes.plot(xs, [points[value] for value in xs], style, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{case}, {'batch' if other == 'batch' else 'T ='} {fixed}")
        axes.set_xticks(sorted({value for points in contenders.values() for value in points}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
