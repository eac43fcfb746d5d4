"""The numbers of benchmarks/README.md, written from a results file."""

import re
from pathlib import Path

from benchmarks.report.columns import MarkdownColumn, notes, number, speedup, table, text
from benchmarks.rows import contender_name, read
from l2t_fast.errors import L2TError

README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- measured: {} -->", "<!-- /measured -->"


def readme_block(path: Path) -> str:
    """What the README says of a results file, its two markers included."""
    first, rows = read(path)
    found = [row for row in rows if row["kind"] == "iteration" and "unavailable" not in row]
    batch = {row["case"]: row["batch"] for row in reversed(found)}  # of each case the first: sweeps come later
    usual = [row for row in found if row["inner_steps"] == 2 and row["batch"] == batch[row["case"]]]
    columns = (
        MarkdownColumn("case", text("case")),
        MarkdownColumn("batch", text("batch")),
        MarkdownColumn("by", contender_name),
        MarkdownColumn("ms an iteration", lambda row: f"{row['ms_median']:.4g}"),
        MarkdownColumn("× reference", speedup("reference")),
        MarkdownColumn("× official", speedup("official")),
        MarkdownColumn("× official tf32", speedup("official_tf32")),
        MarkdownColumn("GFLOP", number("flops", ".4g", 1e-9)),
        MarkdownColumn("J", number("joules_per_iteration")),
        MarkdownColumn("", notes),
    )
    begin, end = MARKERS
    where = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit `{first['commit']}` "
        f"([rows](results/{path.name}), [report](results/{path.stem}/report.md)):"
    )
    return f"{begin.format(path.name)}\n{where}\n\n{table(columns, usual)}{end}"


def update_readme(path: Path, readme: Path = README) -> None:
    """Writes the README's numbers of a device anew, from a results file.

    Raises:
        L2TError: the README has no place, or several, for what was measured on this device.
    """
    content = readme.read_text()
    begin, end = (re.escape(marker).replace(r"\{\}", r"\S*") for marker in MARKERS)
    device = read(path)[0]["device"]
    mine = rf"{begin}\n{re.escape(device)}, (?:(?!{end}).)*{end}"
    changed, count = re.subn(mine, lambda _: readme_block(path), content, flags=re.DOTALL)
    if count != 1:
        raise L2TError(
            f"{readme} has {count} places for what was measured on {device}: it needs one, "
            f"'{device}, ' between {' and '.join(MARKERS)}."
        )
    readme.write_text(changed)
