"""What differs between two results files."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.report.columns import MarkdownColumn, number, table, text, title
from benchmarks.rows import Row, read
from l2t_fast.errors import L2TError


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
    (first, old), (second, new) = read(before), read(after)
    known = {key_of(row): row for row in old if "ms_median" in row}
    head = f"A: {first['device']}, commit {first['commit']}\nB: {second['device']}, commit {second['commit']}\n"
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
    columns = (
        MarkdownColumn("measured", title),
        MarkdownColumn("batch", text("batch")),
        MarkdownColumn("T", text("inner_steps")),
        MarkdownColumn("A, ms", number("a", ".4g")),
        MarkdownColumn("B, ms", number("ms_median", ".4g")),
        MarkdownColumn("A / B", number("ratio", ".2f")),
        MarkdownColumn("", lambda row: "differ" if row["apart"] else "within noise"),
    )
    return head + "\n" + table(columns, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    print(compare(*arguments.files))
