"""A report of one results file: Markdown and pictures, and the README's numbers."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import rows as results
from benchmarks.rows import Row, name_of
from l2t_fast.errors import L2TError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

README = Path(__file__).parents[2] / "README.md"
MARKERS = "<!-- measured: {} -->", "<!-- /measured -->"
STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")

Column = tuple[str, Callable[[Row], str]]


# Cells


def number(field: str, form: str = ".3g", scale: float = 1.0) -> Callable[[Row], str]:
    """A cell with a number, or with a dash."""

    def cell(row: Row) -> str:
        value = row.get(field)
        return "–" if value is None or not math.isfinite(value) else format(scale * value, form)

    return cell


def text(field: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(field, "–"))


def milliseconds(row: Row) -> str:
    return f"{row['ms_median']:.4g} ({row['ms_p20']:.4g} – {row['ms_p80']:.4g})"


def speedup(over: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if f"speedup_over_{over}" not in row:
            return "–"
        median, low, high = (row[f"{field}_over_{over}"] for field in ("speedup", "speedup_p20", "speedup_p80"))
        return f"**{median:.2f}** ({low:.2f} – {high:.2f})"

    return cell


def floor(row: Row) -> str:
    return f"{row['floor_ms']:.3g} ({row['floor_bound']})" if "floor_ms" in row else "–"


def memory(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") is not None else "–"


def notes(row: Row) -> str:
    """What a reader must know of a row before trusting it."""
    found = []
    if row.get("correct") is False:
        found.append("**inexact: no speedup**")
    if row.get("throttled"):
        found.append(f"**throttled: {', '.join(row['throttled'])}**")
    return "; ".join(found)


FLOOR: tuple[Column, ...] = (("floor, ms (bound)", floor), ("of floor", number("floor_fraction", ".0%")))

SECTIONS: dict[str, tuple[str, str, tuple[Column, ...]]] = {
    "iteration": (
        "Whole iterations",
        "ms: median (p20 – p80). Speedups: of turns that belong together. Error: of the meta-gradient that the timed "
        "step took, relative to float64; beside it PyTorch's own in the same precision. A row is exact if its float64 "
        "error is below 1e-9 and its error at most 1.5 times PyTorch's own or, in float32, below 5e-6.",
        (
            ("case", text("case")),
            ("batch", text("batch")),
            ("T", text("inner_steps")),
            ("by", name_of),
            ("ms", milliseconds),
            ("images/s", number("images_per_second", ".4g")),
            ("× reference", speedup("reference")),
            ("× official", speedup("official")),
            *FLOOR,
            ("GFLOP", number("flops", ".4g", 1e-9)),
            ("peak MB", memory),
            ("J", number("joules_per_iteration")),
            ("images/J", number("images_per_joule")),
            ("error", number("error", ".1e")),
            ("PyTorch's", number("error_pytorch", ".1e")),
            ("error, float64", number("error_float64", ".1e")),
            ("", notes),
        ),
    ),
    "meta-gradient": (
        "The meta-gradient alone, by other libraries too",
        "From a state without momentum; no real step.",
        (
            ("case", text("case")),
            ("batch", text("batch")),
            ("T", text("inner_steps")),
            ("by", name_of),
            ("ms", milliseconds),
            ("× reference", speedup("reference")),
            *FLOOR,
            ("error, float64", number("error_float64", ".1e")),
            ("", notes),
        ),
    ),
    "operator": (
        "The matching operators",
        "Behind a check against float64; error: the largest ratio to that of the ATen formulas, exact up to 1.2 or, in "
        "float32, with an error below 1e-5.",
        (
            ("case", text("case")),
            ("precision", text("precision")),
            ("operator", text("operator")),
            ("by", text("by")),
            ("ms", milliseconds),
            ("× eager", speedup("eager")),
            ("× compiled", speedup("compiled")),
            *FLOOR,
            ("error / ATen's", number("error_over_aten", ".2f")),
            ("launches", number("launches", "d")),
            ("", notes),
        ),
    ),
    "inner step": ("Inner steps", "", ()),
    "source": ("The source pre-pass", "", ()),
    "input": ("The input pipeline", "One batch; `plain`: torchvision's transforms, image by image.", ()),
    "training": (
        "Whole trainings",
        "Data, validation and checkpoints included.",
        (
            ("networks", text("case")),
            ("data", text("dataset")),
            ("method", text("by")),
            ("batch", text("batch")),
            ("images/s", number("images_per_second", ".4g")),
            ("seconds", number("seconds")),
            *FLOOR,
            ("", notes),
        ),
    ),
    "accuracy": (
        "Seconds to an accuracy",
        "Of the validation images, first reached at the end of an epoch.",
        (
            ("networks", text("case")),
            ("data", text("dataset")),
            ("method", text("by")),
            ("source", text("source")),
            ("accuracy", number("accuracy", ".0%")),
            ("seconds", number("seconds")),
            *FLOOR,
            ("", notes),
        ),
    ),
}
_PARTS: tuple[Column, ...] = (
    ("case", text("case")),
    ("batch", text("batch")),
    ("part", text("part")),
    ("by", text("by")),
    ("ms", milliseconds),
    ("× plain", speedup("plain")),
    *FLOOR,
    ("", notes),
)


# Markdown


def table(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """A Markdown table; a column that no row has anything for is left out."""
    lines = [[cell(row) for _, cell in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] not in ("–", "") for line in lines)]
    header = [columns[i][0] for i in kept]
    body = [[line[i] for i in kept] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(kept), *body])


def markdown(first: Row, rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "cuda", "python") if first.get(name))
    parts = [
        f"# Benchmarks: {first['device']}\n\n{versions}; {first['threads']} threads; commit `{first['commit']}`; "
        f"{first['time']}. Made from [`{first['file']}`](../{first['file']}) by `python -m benchmarks report`.\n"
    ]
    rates = {name: rate for row in rows if row["kind"] == "rates" for name, rate in row["rates"].items()}
    if rates:
        copy = rates.pop("copy")
        products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
        parts.append(f"Measured rates of the device: copy {copy / 1e9:.4g} GB/s, product of matrices {products}.\n")
    absent = sorted({row["telemetry"] for row in rows if isinstance(row.get("telemetry"), str)})
    parts += [f"Clocks, temperature and energy are not known ({reason}).\n" for reason in absent]
    throttled = [row for row in rows if row.get("throttled")]
    if throttled:
        parts.append(f"**{len(throttled)} rows were measured while the GPU held its clocks down; they are marked.**\n")
    for kind, (title, remark, columns) in SECTIONS.items():
        found = [row for row in rows if row["kind"] == kind and "unavailable" not in row]
        if found:
            parts.append(
                "\n".join([f"## {title}\n", *([remark + "\n"] if remark else []), table(columns or _PARTS, found)])
            )
    found = [row for row in rows if row["kind"] == "breakdown" and "unavailable" not in row]
    if found:
        parts.append(f"## Where the time goes\n\nMilliseconds of an iteration.\n\n{table(_breakdown(found), found)}")
    panels = _series(rows, "inner_steps", "ms_median")
    fits = [fit for (case, batch), series in panels.items() for fit in _fits(case, batch, series)]
    if fits:
        header = "| case | batch | by | ms = | largest deviation |\n| --- | ---: | --- | --- | ---: |\n"
        parts.append(f"## Time against T\n\nLeast squares over the T measured.\n\n{header}" + "".join(fits))
    parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})\n" for picture in pictures]
    stages = [row for row in rows if row["kind"] == "stage"]
    if stages:
        columns = (("stage", text("stage")), ("seconds", number("seconds", ".0f")), ("outcome", text("outcome")))
        parts.append(f"## Stages\n\n{table(columns, stages)}")
    missing = dict.fromkeys(f"- {_title(row)}: {row['unavailable']}" for row in rows if "unavailable" in row)
    if missing:
        parts.append("## Not to be had\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def _breakdown(rows: Sequence[Row]) -> list[Column]:
    families = sorted({name for row in rows for name in row["family_ms"]})
    columns: list[Column] = [("case", text("case")), ("by", name_of)]
    columns += [(name, lambda row, name=name: f"{row['family_ms'].get(name, 0):.3g}") for name in families]
    for title, field, form in (
        ("GPU busy", "busy_fraction", ".0%"),
        ("launches", "launches", ".0f"),
        ("kernels", "kernels", ".0f"),
        ("host syncs", "host_synchronisations", ".0f"),
    ):
        columns.append((title, number(field, form)))
    return columns


def _title(row: Row) -> str:
    fields = ("kind", "case", "precision", "operator", "part", "by", "mode", "memory", "dataset")
    return " ".join(str(row[name]) for name in fields if row.get(name) not in (None, "save"))


# Pictures


def pictures(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draws what there are rows for, and returns the names of the files."""
    done = [row for row in rows if "unavailable" not in row]
    drawn = {
        "speedups.png": speedups(done),
        "roofline.png": roofline(done),
        "time_against_T.png": lines(done, "inner_steps", "ms_median", "T", "ms an iteration"),
        "time_against_batch.png": lines(done, "batch", "ms_median", "images in a batch", "ms an iteration"),
        "memory_against_T.png": lines(done, "inner_steps", "peak_bytes", "T", "peak memory, MB", scale=1e-6),
    }
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            plt.close(figure)
    return [name for name, figure in drawn.items() if figure is not None]


def speedups(rows: Sequence[Row]) -> Any:
    """A bar for each contender that has a speedup, with the spread of its turns."""
    baselines = ("reference", "eager", "plain")
    bars = []
    for row in rows:
        over = next((name for name in baselines if f"speedup_over_{name}" in row), None)
        what = {"iteration": "iteration", "meta-gradient": "meta-gradient"}.get(row["kind"])
        what = what or row.get("operator") or row.get("part")
        if over and row["by"] != over and row.get("inner_steps", 2) == 2:
            batch = f", batch {row['batch']}" if "batch" in row else ""
            bars.append((f"{row['case']}{batch}: {what}, {name_of(row)}", over, row))
    if not bars:
        return None
    colours = dict(zip(baselines, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(bars)), layout="constrained")
    for i, (_, over, row) in enumerate(bars):
        middle, low, high = (row[f"{field}_over_{over}"] for field in ("speedup", "speedup_p20", "speedup_p80"))
        axes.barh(i, middle, color=colours[over], xerr=[[middle - low], [high - middle]], ecolor="0.3", height=0.7)
        axes.text(max(middle, high), i, f"  {middle:.2f}", va="center", fontsize=8)
    for over in dict.fromkeys(over for _, over, _ in bars):
        axes.barh(0, 0, color=colours[over], label=f"over {over}")
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
        axes.plot(grid, roof, style, color="0.3", label=f"roof, {precision}: measured copy and product")
    kinds = dict.fromkeys((row["kind"], name_of(row) if row["kind"] != "operator" else row["by"]) for row in points)
    colours = plt.get_cmap("tab20").colors
    for i, (kind, by) in enumerate(kinds):
        mine = [row for row in points if (row["kind"], name_of(row) if kind != "operator" else row["by"]) == (kind, by)]
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


def lines(rows: Sequence[Row], x: str, y: str, xlabel: str, ylabel: str, scale: float = 1.0) -> Any:
    """Whole iterations against T or batch, a line a contender, a panel a case; the other of the two is held fixed."""
    other = "batch" if x == "inner_steps" else "inner_steps"
    panels = _series(rows, x, y, scale)
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, ((case, fixed), series) in zip(all_axes[0], panels.items(), strict=True):
        for style, (name, points) in zip(STYLES, series.items(), strict=False):
            xs = sorted(points)
            axes.plot(xs, [points[value] for value in xs], style, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=f"{case}, {'batch' if other == 'batch' else 'T ='} {fixed}")
        axes.set_xticks(sorted({value for points in series.values() for value in points}))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


Series = dict[str, dict[int, float]]


def _series(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> dict[tuple[str, int], Series]:
    """{(case, what is held fixed): {contender: {x: y}}}, where there are two x or more."""
    other = "batch" if x == "inner_steps" else "inner_steps"
    panels: dict[tuple[str, int], Series] = {}
    for row in rows:
        if row["kind"] == "iteration" and "unavailable" not in row and row.get(y) is not None:
            series = panels.setdefault((row["case"], row[other]), {})
            series.setdefault(name_of(row), {})[row[x]] = scale * row[y]
    several = {key: {n: points for n, points in series.items() if len(points) > 1} for key, series in panels.items()}
    return {key: series for key, series in several.items() if series}


def _fits(case: str, batch: int, series: Series) -> Iterator[str]:
    """Rows of a table: a + b T by least squares, where three T or more tell whether it fits."""
    for name, points in series.items():
        if len(points) > 2:
            T, ms = list(points), list(points.values())
            slope, start = statistics.linear_regression(T, ms)
            worst = max(abs(start + slope * t - m) / m for t, m in zip(T, ms, strict=True))
            line = f"{start:.4g} + {slope:.4g} T, T = {min(T)} to {max(T)}"
            yield f"| {case} | {batch} | {name} | {line} | {worst:.1%} |\n"


# Files


def write(path: Path) -> Path:
    """Makes the report of a results file, in a folder of its name beside it, and returns that of the Markdown."""
    first, rows = results.read(path)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    report = folder / "report.md"
    report.write_text(markdown({**first, "file": path.name}, rows, pictures(rows, folder)))
    return report


def readme_block(path: Path) -> str:
    """What the README says of a results file, its two markers included."""
    first, rows = results.read(path)
    found = [row for row in rows if row["kind"] == "iteration" and "unavailable" not in row]
    batch = {row["case"]: row["batch"] for row in reversed(found)}  # of each case the first: sweeps come later
    usual = [row for row in found if row["inner_steps"] == 2 and row["batch"] == batch[row["case"]]]
    columns: tuple[Column, ...] = (
        ("case", text("case")),
        ("batch", text("batch")),
        ("by", name_of),
        ("ms an iteration", lambda row: f"{row['ms_median']:.0f}"),
        ("× reference", speedup("reference")),
        ("× official", speedup("official")),
        ("GFLOP", number("flops", ".4g", 1e-9)),
        ("J", number("joules_per_iteration")),
        ("", notes),
    )
    begin, end = MARKERS
    where = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit `{first['commit']}` "
        f"([rows](benchmarks/results/{path.name}), [report](benchmarks/results/{path.stem}/report.md)):"
    )
    return f"{begin.format(path.name)}\n{where}\n\n{table(columns, usual)}{end}"


def update_readme(path: Path, readme: Path = README) -> None:
    """Writes the README's numbers anew, from a results file.

    Raises:
        L2TError: the README has no place for them.
    """
    content = readme.read_text()
    begin, end = (re.escape(marker).replace(r"\{\}", r"\S*") for marker in MARKERS)
    changed, count = re.subn(f"{begin}.*?{end}", lambda _: readme_block(path), content, flags=re.DOTALL)
    if count != 1:
        raise L2TError(
            f"{readme} has {count} places for what was measured: it needs one, between {' and '.join(MARKERS)}."
        )
    readme.write_text(changed)


# Comparison


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    fields = (
        "kind",
        "case",
        "batch",
        "inner_steps",
        "precision",
        "operator",
        "part",
        "by",
        "mode",
        "memory",
        "dataset",
    )
    return tuple(row.get(name) for name in fields)


def compare(before: Path, after: Path) -> str:
    """A table of what both files have measured: times, their ratio, and whether their p20 to p80 lie apart."""
    (first, old), (second, new) = results.read(before), results.read(after)
    known = {key_of(row): row for row in old if "ms_median" in row}
    lines = [f"A: {first['device']}, commit {first['commit']}\nB: {second['device']}, commit {second['commit']}\n"]
    rows = []
    for row in new:
        match = known.get(key_of(row))
        if match is not None and "ms_median" in row:
            apart = row["ms_p20"] > match["ms_p80"] or row["ms_p80"] < match["ms_p20"]
            rows.append(
                {**row, "a": match["ms_median"], "ratio": match["ms_median"] / row["ms_median"], "apart": apart}
            )
    if not rows:
        raise L2TError(f"{before} and {after} have no measurement in common: compare two runs of the same cases.")
    columns: tuple[Column, ...] = (
        ("measured", _title),
        ("batch", text("batch")),
        ("T", text("inner_steps")),
        ("A, ms", number("a", ".4g")),
        ("B, ms", number("ms_median", ".4g")),
        ("A / B", number("ratio", ".2f")),
        ("", lambda row: "differ" if row["apart"] else "within noise"),
    )
    return lines[0] + "\n" + table(columns, rows)
