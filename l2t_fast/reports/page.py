"""report.html: all that is known of a run or a table, in one page that needs nothing else."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.reports.arrays import Array
from l2t_fast.reports.column import NOT_YET, Column, read_column, read_problems, read_table
from l2t_fast.reports.comparison import mean_std, stat, summarize
from l2t_fast.reports.grid import Grid
from l2t_fast.reports.learned import Learned, read_learned
from l2t_fast.reports.repeat import repeating_command
from l2t_fast.reports.table import detailed
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, load_table
from l2t_fast.training.log import read_metrics

_POINTS = 160  # of a curve, about
_BINS = 24
_CURVES = {"loss": "training cross entropy", "matching_loss": "matching loss", "meta_loss": "meta-loss"}
_MACHINE = {"device": "device", "threads": "CPU threads", "jobs": "trainings side by side", "torch": "PyTorch"}
_MACHINE |= {"cuda": "CUDA", "triton": "Triton", "torchvision": "torchvision", "python": "Python"}
_MACHINE |= {"l2t-fast": "l2t-fast", "system": "system"}


def report(folder: Path, console: Console, results: Path | None = None) -> Path:
    """Writes folder/report.html of a run or a table, finished or not, and returns it.

    Args:
        results: a file of `python -m benchmarks`, whose iterations are shown beside their floors.

    Raises:
        L2TError: `folder` is no run, or one of its files is damaged.
    """
    data = page_data(folder, results)
    path = folder / "report.html"
    save_text(path, render(data))
    console.print(f"{path} has it all in one page", highlight=False, soft_wrap=True, markup=False)
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page; `data` is what its script draws."""
    template = files("l2t_fast.reports").joinpath("report.html").read_text(encoding="utf-8")
    inlined = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    before, between, after = template.split("@@")  # the title goes into the first place, the data into the second
    return before + html.escape(str(data["title"])) + between + inlined + after


def page_data(folder: Path, results: Path | None = None) -> dict[str, Any]:
    """All that the page shows, as JSON has it."""
    config: TrainConfig | TableConfig
    if (folder / "table.json").exists():
        config = load_table(folder / "table.json")
        _, columns, methods = read_table(folder)
    elif (folder / "config.json").exists():
        config = load_config(folder / "config.json")
        columns, methods = [read_column(folder, config, read_problems(folder))], config.method or ()
    else:
        raise L2TError(f"{folder} is no run: give a folder that `l2t-fast train` or `l2t-fast table` made.")
    trainings = [cell for column in columns for cell in column.cells]
    failed = sum(cell.result is None and cell.problem != NOT_YET for cell in trainings)
    ended = sum(cell.result is not None for cell in trainings)
    learned = _learned(folder)
    data = {
        "title": folder.resolve().name,
        "made": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "ended": ended,
        "failed": failed,
        "waiting": len(trainings) - ended - failed,
        "methods": list(methods),
        "columns": [
            {"title": column.title, "table": _table(column, methods), "curves": _curves(column)} for column in columns
        ],
        "learned": [_pairs(one) for one in learned],
        "weights": [weights for one in learned if (weights := _weights(one))],
        "timings": _grid(_timings(columns, methods)),
        "floors": _floors(results) if results is not None else None,
        "environment": _environment(folder),
        "command": repeating_command(config),
    }
    cleaned: dict[str, Any] = _clean(data)
    return cleaned


def _clean(value: Any) -> Any:
    """As JSON can have it: four digits, null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _grid(grid: Grid) -> dict[str, Any]:
    return {"header": grid.header, "lines": grid.lines, "bold": [list(place) for place in sorted(grid.bold)]}


def _table(column: Column, methods: Sequence[str]) -> dict[str, Any]:
    grid, below = detailed(summarize(column, methods))
    return {**_grid(grid), "below": below}


def _curves(column: Column) -> dict[str, Any]:
    """{what: {"label", "lines": [{"method", "seed", "points": [[iteration, value], ...]}]}}, of what there is."""
    found: dict[str, Any] = {}

    def add(key: str, label: str, method: str, seed: int, points: list[list[float]]) -> None:
        if any(math.isfinite(value) for _, value in points):
            line = {"method": method, "seed": seed, "points": points}
            found.setdefault(key, {"label": label, "lines": []})["lines"].append(line)

    for cell in column.cells:
        path = column.folder / cell.method / f"seed-{cell.seed}" / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        iterations = [row for row in rows if "iteration" in row]
        for key, label in _CURVES.items():
            add(key, label, cell.method, cell.seed, _thinned([row[key] for row in iterations if key in row]))
        batches = sum(row["epoch"] == 0 for row in iterations)
        epochs = [row for row in rows if "iteration" not in row and "val_accuracy" in row]
        points = [[float((row["epoch"] + 1) * batches), 100 * row["val_accuracy"]] for row in epochs]
        add("val_accuracy", "validation accuracy (%)", cell.method, cell.seed, points)
    return found


def _thinned(values: Sequence[float]) -> list[list[float]]:
    """[[iterations so far, mean since the point before], ...]."""
    each = max(1, len(values) // _POINTS)
    blocks = [values[start : start + each] for start in range(0, len(values), each)]
    return [[float(min(len(values), (i + 1) * each)), math.fsum(b) / len(b)] for i, b in enumerate(blocks)]


def _learned(folder: Path) -> list[Learned]:
    try:
        return read_learned(folder)
    except L2TError:
        if any(folder.glob("**/learned.json")):
            raise
        return []  # nothing has learned weights, or has not got so far


def _title(learned: Learned) -> str:
    return ", ".join(filter(None, (learned.column, learned.method)))


def _pairs(learned: Learned) -> dict[str, Any]:
    """λ in each epoch, of each seed; "history" is None where λ is fixed."""
    history = None if learned.history is None else learned.history.tolist()  # [seeds, epochs, P]
    layers = [list(layer) for layer in learned.layers] if learned.layers else None
    what = {"title": _title(learned), "seeds": learned.seeds, "names": learned.names}
    return {**what, "layers": layers, "history": history, "unfinished": sorted(learned.under_way)}


def _weights(learned: Learned) -> dict[str, Any] | None:
    """A histogram a pair of C_s w, % of the channels; mean over seeds of the channels by falling weight."""
    if learned.profiles is None:
        return None
    profiles = [profile.mean(0) for profile in learned.profiles]  # of each pair [C_s]
    edges = [_edges(profile) for profile in profiles]
    counts = [np.histogram(p, each)[0] / len(p) * 100 for p, each in zip(profiles, edges, strict=True)]
    drawn = {"edges": [each.tolist() for each in edges], "counts": [each.tolist() for each in counts]}
    return {"title": _title(learned), "names": learned.names, **drawn}


def _edges(values: Array) -> Array:
    """Of the bins of `values` and 1, uniform."""
    low, high = min(1.0, values.min()), max(1.0, values.max())
    margin = max(0.01, 0.02 * (high - low))
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _timings(columns: Sequence[Column], methods: Sequence[str]) -> Grid:
    """What the trainings took, all in all: no measurement of an iteration alone."""
    lines = []
    for column in columns:
        for method in methods:
            results = [c.result for c in column.cells if c.method == method and c.result is not None]
            results = [r for r in results if r.get("iterations") and r["seconds"]]
            if results:
                each = stat([1000 * r["seconds"] / r["iterations"] for r in results])
                speed = stat([r["images"] / r["seconds"] for r in results if "images" in r])
                seconds = stat([float(r["seconds"]) for r in results])
                slow = 2 if speed and speed.mean < 10 else 0
                numbers = [mean_std(each, 1), mean_std(speed, slow), mean_std(seconds, 1)]
                lines.append([*([column.title] if len(columns) > 1 else []), method, *numbers])
    start = ["column"] if len(columns) > 1 else []
    return Grid([*start, "method", "ms an iteration", "images a second", "seconds"], lines)


_HOW, _TIMES = ("case", "mode", "precision"), ("ms_median", "floor_ms", "floor_fraction")  # of a row of an iteration


def _floors(path: Path) -> dict[str, Any]:
    """The engine's iterations of a results file, beside the time below which the device cannot get."""
    rows = read_rows(path)
    device = next((str(row["device"]) for row in rows if row.get("kind") == "run"), "an unknown device")
    lines = []
    for row in rows:
        if row.get("kind") == "iteration" and row.get("by") == "engine" and row.get("correct") and "floor_ms" in row:
            if not (isinstance(row.get("batch"), int) and all(isinstance(row.get(name), str) for name in _HOW)) or any(
                not isinstance(row.get(name), int | float) for name in _TIMES
            ):
                raise L2TError(f"{path} is damaged (an iteration lacks its case or its times): give another --results.")
            how = [row["case"], str(row["batch"]), row["mode"], row["precision"]]
            lines.append([*how, f"{row['ms_median']:.2f}", f"{row['floor_ms']:.2f}", f"{row['floor_fraction']:.0%}"])
    if not lines:
        raise L2TError(f"{path} has no iteration of the engine with a floor: give another --results.")
    header = ["case", "batch", "mode", "precision", "ms an iteration", "floor (ms)", "floor / measured"]
    return {"device": device, "file": path.name, **_grid(Grid(header, lines))}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects.

    Raises:
        L2TError: it cannot be read, or is something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]
    except (OSError, ValueError, RecursionError) as error:
        raise L2TError(f"{path} cannot be read ({error}): remove it, or give another file.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise L2TError(f"{path} is damaged (not objects of JSON): remove it, or give another file.")
    return rows


def _environment(folder: Path) -> dict[str, Any] | None:
    """A column for each machine, or set of versions, that commands in the folder ran on."""
    path = folder / "environment.jsonl"
    if not path.exists():
        return None
    rows = [{key: str(row[key]) for key in _MACHINE if row.get(key) is not None} for row in read_rows(path)]
    distinct = [row for i, row in enumerate(rows) if row not in rows[:i]]
    lines = [
        [label, *(row.get(key, "–") for row in distinct)]
        for key, label in _MACHINE.items()
        if any(key in row for row in distinct)
    ]
    return _grid(Grid(["", *(f"machine {i + 1}" if len(distinct) > 1 else "" for i in range(len(distinct)))], lines))
