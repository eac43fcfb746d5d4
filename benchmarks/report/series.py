"""Whole iterations against T or the number of images in a batch."""

import statistics
from collections.abc import Sequence

from benchmarks.rows import Row, contender_name

Series = dict[str, dict[int, float]]  # {contender: {T or batch: what was measured}}


def series(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> dict[tuple[str, int], Series]:
    """{(case, what is held fixed): {contender: {x: y}}}, where there are two x or more."""
    other = "batch" if x == "inner_steps" else "inner_steps"
    panels: dict[tuple[str, int], Series] = {}
    for row in rows:
        if row["kind"] == "iteration" and "unavailable" not in row and row.get(y) is not None:
            panel = panels.setdefault((row["case"], row[other]), {})
            panel.setdefault(contender_name(row), {})[row[x]] = scale * row[y]
    several = {key: {n: points for n, points in panel.items() if len(points) > 1} for key, panel in panels.items()}
    return {key: panel for key, panel in several.items() if panel}


def fits(rows: Sequence[Row]) -> list[Row]:
    """ms = a + b T by least squares, where three T or more tell whether it fits."""
    found = []
    for (case, batch), panel in series(rows, "inner_steps", "ms_median").items():
        for name, points in panel.items():
            if len(points) > 2:
                T, ms = list(points), list(points.values())
                slope, start = statistics.linear_regression(T, ms)
                worst = max(abs(start + slope * t - m) / m for t, m in zip(T, ms, strict=True))
                line = f"{start:.4g} + {slope:.4g} T, T = {min(T)} to {max(T)}"
                found.append({"case": case, "batch": batch, "by": name, "line": line, "deviation": worst})
    return found
