"""table.csv and cells.csv: the numbers of a table in full."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2t_fast.files import save_text
from l2t_fast.reports.column import Cell, Column
from l2t_fast.reports.comparison import Standing, Summary

_TABLE_FIELDS = (
    *("column", "group", "per_class", "method", "kind", "seeds", "seeds_asked", "headline"),
    *("best_mean", "best_std", "last_mean", "last_std", "seconds_mean", "seconds_std"),
    *("published_mean", "published_std", "best_baseline", "difference", "pairs", "p", "p_undefined"),
)
_CELL_FIELDS = (
    *("column", "group", "per_class", "method", "seed", "test_accuracy_best", "test_accuracy_last"),
    *("val_accuracy_best", "best_epoch", "iterations", "seconds", "problem"),
)


def write_csv(folder: Path, columns: Sequence[Column], summaries: Sequence[Summary]) -> None:
    """Writes table.csv, a line a column and method, and cells.csv, a line a training, into `folder`."""
    table = [_table_row(summary, standing) for summary in summaries for standing in summary.standings]
    save_text(folder / "table.csv", _csv(_TABLE_FIELDS, table))
    cells = [_cell_row(column, cell) for column in columns for cell in column.cells]
    save_text(folder / "cells.csv", _csv(_CELL_FIELDS, cells))


def _table_row(summary: Summary, standing: Standing) -> dict[str, Any]:
    row: dict[str, Any] = {"column": summary.title, "group": summary.group, "per_class": summary.per_class}
    row |= {"method": standing.method, "kind": "meta" if standing.is_meta else "baseline"}
    row |= {"seeds": len(standing.values), "seeds_asked": standing.asked, "headline": summary.metric}
    for name, values in (("best", standing.best), ("last", standing.last), ("seconds", standing.seconds)):
        if values is not None:
            row |= {f"{name}_mean": values.mean, f"{name}_std": values.std}
    if standing.published:
        row["published_mean"], row["published_std"] = standing.published
    row["best_baseline"] = summary.baseline
    if against := standing.comparison:
        row |= {"difference": against.difference, "pairs": against.pairs, "p": against.p, "p_undefined": against.why}
    return row


def _cell_row(column: Column, cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"column": column.title, "group": column.group, "per_class": column.per_class}
    row |= {key: value for key, value in (cell.result or {}).items() if key in _CELL_FIELDS}
    return row | {"method": cell.method, "seed": cell.seed, "problem": cell.problem}


def _csv(fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Numbers in full, nothing for what there is not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
