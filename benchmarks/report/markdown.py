"""The report of one results file: Markdown, with pictures beside it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.columns import SECTIONS, MarkdownColumn, number, table, text, title
from benchmarks.report.readme import update_readme
from benchmarks.report.series import fits
from benchmarks.rows import Row, contender_name, latest, read, say

FITS = (
    MarkdownColumn("case", text("case")),
    MarkdownColumn("batch", text("batch"), "---:"),
    MarkdownColumn("by", text("by")),
    MarkdownColumn("ms =", text("line")),
    MarkdownColumn("largest deviation", number("deviation", ".1%"), "---:"),
)
STAGES = (
    MarkdownColumn("stage", text("stage")),
    MarkdownColumn("seconds", number("seconds", ".0f")),
    MarkdownColumn("outcome", text("outcome")),
)


def write(path: Path) -> Path:
    """Makes the report of a results file, in a folder of its name beside it, and returns that of the Markdown."""
    first, rows = read(path)
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    report = folder / "report.md"
    report.write_text(markdown({**first, "file": path.name}, rows, _pictures(rows, folder)))
    return report


def _pictures(rows: Sequence[Row], folder: Path) -> list[str]:
    try:
        from benchmarks.report.pictures import draw
    except ImportError as error:
        say(f"the report has no pictures ({error}): `python -m benchmarks report` draws them where matplotlib is.")
        return []
    return draw(rows, folder)


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
        flops = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
        of = next(row.get("of", "product of matrices") for row in rows if row["kind"] == "rates")
        parts.append(f"Measured rates of the device: copy {copy / 1e9:.4g} GB/s, {of} {flops}.\n")
    absent = sorted({row["telemetry"] for row in rows if isinstance(row.get("telemetry"), str)})
    parts += [f"Clocks, temperature and energy are not known ({reason}).\n" for reason in absent]
    throttled = [row for row in rows if row.get("throttled")]
    if throttled:
        parts.append(f"**{len(throttled)} rows were measured while the GPU held its clocks down; they are marked.**\n")
    for kind, section in SECTIONS.items():
        found = [row for row in rows if row["kind"] == kind and "unavailable" not in row]
        if found:
            remark = [section.remark + "\n"] if section.remark else []
            parts.append("\n".join([f"## {section.title}\n", *remark, table(section.columns, found)]))
    found = [row for row in rows if row["kind"] == "breakdown" and "unavailable" not in row]
    if found:
        parts.append(f"## Where the time goes\n\nMilliseconds of an iteration.\n\n{table(_breakdown(found), found)}")
    fitted = fits(rows)
    if fitted:
        parts.append(f"## Time against T\n\nLeast squares over the T measured.\n\n{table(FITS, fitted)}")
    parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})\n" for picture in pictures]
    stages = [row for row in rows if row["kind"] == "stage"]
    if stages:
        parts.append(f"## Stages\n\n{table(STAGES, stages)}")
    missing = dict.fromkeys(f"- {title(row)}: {row['unavailable']}" for row in rows if "unavailable" in row)
    if missing:
        parts.append("## Not to be had\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def _breakdown(rows: Sequence[Row]) -> list[MarkdownColumn]:
    families = sorted({name for row in rows for name in row["family_ms"]})
    columns = [MarkdownColumn("case", text("case")), MarkdownColumn("by", contender_name)]
    columns += [
        MarkdownColumn(name, lambda row, name=name: f"{row['family_ms'].get(name, 0):.3g}") for name in families
    ]
    return [
        *columns,
        MarkdownColumn("GPU busy", number("busy_fraction", ".0%")),
        MarkdownColumn("launches", number("launches", ".0f")),
        MarkdownColumn("kernels", number("kernels", ".0f")),
        MarkdownColumn("host syncs", number("host_synchronisations", ".0f")),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, help="default: the latest of benchmarks/results/")
    parser.add_argument("--readme", action="store_true", help="also write the numbers of benchmarks/README.md")


def run(arguments: argparse.Namespace) -> None:
    """Writes the report, and says where."""
    file = arguments.file or latest()
    if arguments.readme:
        update_readme(file)
    say(f"the report is {write(file)}")
