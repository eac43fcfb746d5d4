"""Cells and columns of Markdown tables, and those of each kind of row."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.rows import Row, contender_name
from l2t_fast.reports.grid import markdown_table

CellText = Callable[[Row], str]


class MarkdownColumn(NamedTuple):
    """Its title, the text of a row in it, how it is aligned."""

    title: str
    cell: CellText
    rule: str = "---"  # "---:" aligns to the right


def table(columns: Sequence[MarkdownColumn], rows: Iterable[Row]) -> str:
    """A Markdown table; a column that no row has anything for is left out."""
    lines = [[column.cell(row) for column in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] not in ("–", "") for line in lines)]
    header, rule = [columns[i].title for i in kept], [columns[i].rule for i in kept]
    body = [[line[i] for i in kept] for line in lines]
    return markdown_table(header, rule, body) + "\n"


# Cells


def number(field: str, form: str = ".3g", scale: float = 1.0) -> CellText:
    """A cell with a number, or with a dash."""

    def cell(row: Row) -> str:
        value = row.get(field)
        return "–" if value is None or not math.isfinite(value) else format(scale * value, form)

    return cell


def text(field: str) -> CellText:
    return lambda row: str(row.get(field, "–"))


def milliseconds(row: Row) -> str:
    return f"{row['ms_median']:.4g} ({row['ms_p20']:.4g} – {row['ms_p80']:.4g})"


def speedup(over: str) -> CellText:
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


def title(row: Row) -> str:
    """What was measured, in words."""
    fields = ("kind", "case", "precision", "operator", "part", "by", "mode", "memory", "dataset")
    return " ".join(str(row[name]) for name in fields if row.get(name) not in (None, "save"))


def notes(row: Row) -> str:
    """What a reader must know of a row before trusting it."""
    found = []
    if row.get("replayed") is False:
        found.append("**no replay**")
    if row.get("correct") is False:
        found.append("**inexact: no speedup**")
    if row.get("throttled"):
        found.append(f"**throttled: {', '.join(row['throttled'])}**")
    return "; ".join(found)


# Columns


FLOOR = (MarkdownColumn("floor, ms (bound)", floor), MarkdownColumn("of floor", number("floor_fraction", ".0%")))
STEP = (
    MarkdownColumn("case", text("case")),
    MarkdownColumn("batch", text("batch")),
    MarkdownColumn("part", text("part")),
    MarkdownColumn("by", text("by")),
    MarkdownColumn("ms", milliseconds),
    MarkdownColumn("× plain", speedup("plain")),
    *FLOOR,
    MarkdownColumn("", notes),
)


class Section(NamedTuple):
    """Of the report: a table of the rows of one kind."""

    title: str
    remark: str
    columns: tuple[MarkdownColumn, ...]


SECTIONS = {
    "iteration": Section(
        "Whole iterations",
        "ms: median (p20 – p80). Speedups: of turns that belong together. Error: of the meta-gradient that a step "
        "took on a few images, relative to float64; beside it PyTorch's own in the same precision. A row is exact if "
        "its float64 error is below 1e-9 and its error at most 1.5 times PyTorch's own or, in float32, below 5e-6. "
        "Where an iteration is one replay, that must hold of its distance from launches on the whole batch too.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("batch", text("batch")),
            MarkdownColumn("T", text("inner_steps")),
            MarkdownColumn("by", contender_name),
            MarkdownColumn("ms", milliseconds),
            MarkdownColumn("images/s", number("images_per_second", ".4g")),
            MarkdownColumn("× reference", speedup("reference")),
            MarkdownColumn("× official", speedup("official")),
            MarkdownColumn("× official tf32", speedup("official_tf32")),
            *FLOOR,
            MarkdownColumn("GFLOP", number("flops", ".4g", 1e-9)),
            MarkdownColumn("peak MB", memory),
            MarkdownColumn("J", number("joules_per_iteration")),
            MarkdownColumn("images/J", number("images_per_joule")),
            MarkdownColumn("error", number("error", ".1e")),
            MarkdownColumn("PyTorch's", number("error_pytorch", ".1e")),
            MarkdownColumn("error, float64", number("error_float64", ".1e")),
            MarkdownColumn("replay from launches", number("error_replay", ".1e")),
            MarkdownColumn("", notes),
        ),
    ),
    "meta-gradient": Section(
        "The meta-gradient alone, by other libraries too",
        "From a state without momentum; no real step.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("batch", text("batch")),
            MarkdownColumn("T", text("inner_steps")),
            MarkdownColumn("by", contender_name),
            MarkdownColumn("ms", milliseconds),
            MarkdownColumn("× reference", speedup("reference")),
            *FLOOR,
            MarkdownColumn("error, float64", number("error_float64", ".1e")),
            MarkdownColumn("", notes),
        ),
    ),
    "operator": Section(
        "The matching operators",
        "Behind a check against float64; error: the largest ratio to that of the ATen formulas, exact up to 1.2 or, in "
        "float32, with an error below 1e-5.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("precision", text("precision")),
            MarkdownColumn("operator", text("operator")),
            MarkdownColumn("by", text("by")),
            MarkdownColumn("ms", milliseconds),
            MarkdownColumn("× eager", speedup("eager")),
            MarkdownColumn("× compiled", speedup("compiled")),
            *FLOOR,
            MarkdownColumn("error / ATen's", number("error_over_aten", ".2f")),
            MarkdownColumn("launches", number("launches", "d")),
            MarkdownColumn("", notes),
        ),
    ),
    "inner step": Section("Inner steps", "", STEP),
    "source": Section("The source pre-pass", "", STEP),
    "input": Section("The input pipeline", "One batch; `plain`: torchvision's transforms, image by image.", STEP),
    "scaling breaks": Section(
        "Many GPUs: what breaks first",
        "A model, not a measurement: exact data parallelism in nodes of eight GPUs, nothing overlapped. Where the "
        "efficiency (compute / (compute + communication)) first falls below 90 %, and whether latency or bytes do it; "
        "weak: a batch of the case on every GPU, strong: one divided among them. Against latency: trees, as NCCL picks "
        "by itself where they are faster, and more images a GPU. Against bytes: buckets that go while the backward "
        "pass still runs, which stays exact, and nodes on InfiniBand.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("scaling", text("scaling")),
            MarkdownColumn("network of nodes", text("network")),
            MarkdownColumn("all-reduce", text("by")),
            MarkdownColumn("GPUs, first below 90 %", number("gpus", ".0f"), "---:"),
            MarkdownColumn("by", text("what")),
            MarkdownColumn("latency there, ms", number("latency_ms"), "---:"),
            MarkdownColumn("transfer there, ms", number("transfer_ms"), "---:"),
            MarkdownColumn("most GPUs", number("most_gpus", ".0f"), "---:"),
            MarkdownColumn("efficiency there", number("efficiency", ".0%"), "---:"),
        ),
    ),
    "scaling": Section(
        "Many GPUs: an iteration",
        "The model's rows. Bytes: what a GPU sends in an iteration. Compute: as the column says it is known.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("scaling", text("scaling")),
            MarkdownColumn("network of nodes", text("network")),
            MarkdownColumn("all-reduce", text("by")),
            MarkdownColumn("GPUs", number("gpus", ".0f"), "---:"),
            MarkdownColumn("all-reduces", number("all_reduces", ".0f"), "---:"),
            MarkdownColumn("MB sent", number("wire_bytes", ".4g", 1e-6), "---:"),
            MarkdownColumn("latency, ms", number("latency_ms"), "---:"),
            MarkdownColumn("transfer, ms", number("transfer_ms"), "---:"),
            MarkdownColumn("compute, ms", number("compute_ms", ".4g"), "---:"),
            MarkdownColumn("known by", text("compute_by")),
            MarkdownColumn("efficiency", number("efficiency", ".0%"), "---:"),
        ),
    ),
    "all-reduce": Section(
        "All-reduces between processes of this CPU",
        "The sets of gradients of an iteration, by gloo; beside them start + bytes / speed of an empty and a large one "
        "of the same run. Every sum was checked.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("processes", number("processes", ".0f"), "---:"),
            MarkdownColumn("all-reduces", number("all_reduces", ".0f"), "---:"),
            MarkdownColumn("MB sent", number("wire_bytes", ".4g", 1e-6), "---:"),
            MarkdownColumn("ms", milliseconds),
            MarkdownColumn("model, ms", number("model_ms", ".4g"), "---:"),
            MarkdownColumn("an empty one, ms", number("empty_ms"), "---:"),
            MarkdownColumn("GB/s", number("bytes_per_second", ".3g", 1e-9), "---:"),
            MarkdownColumn("load of the machine", number("load", ".0f"), "---:"),
            MarkdownColumn("", notes),
        ),
    ),
    "iteration of ranks": Section(
        "Iterations of several processes of this CPU",
        "The tiny case, its batch divided among them; error: of the meta-gradient in float64, from that of the whole "
        "batch in one process.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("batch", text("batch")),
            MarkdownColumn("processes", number("processes", ".0f"), "---:"),
            MarkdownColumn("ms", milliseconds),
            MarkdownColumn("error, float64", number("error_float64", ".1e")),
            MarkdownColumn("load of the machine", number("load", ".0f"), "---:"),
            MarkdownColumn("", notes),
        ),
    ),
    "replicas": Section(
        "Engines by turns in one process",
        "Exact: each ends where it ends alone, to the bit on a CPU, on a GPU as near as one engine to itself.",
        (
            MarkdownColumn("case", text("case")),
            MarkdownColumn("batch", text("batch")),
            MarkdownColumn("replicas", number("replicas", ".0f"), "---:"),
            MarkdownColumn("iterations/s of all", number("iterations_per_second", ".4g"), "---:"),
            MarkdownColumn("error", number("error", ".1e")),
            MarkdownColumn("", notes),
        ),
    ),
    "training": Section(
        "Whole trainings",
        "Data, validation and checkpoints included.",
        (
            MarkdownColumn("networks", text("case")),
            MarkdownColumn("data", text("dataset")),
            MarkdownColumn("method", text("by")),
            MarkdownColumn("batch", text("batch")),
            MarkdownColumn("images/s", number("images_per_second", ".4g")),
            MarkdownColumn("seconds", number("seconds")),
            *FLOOR,
            MarkdownColumn("", notes),
        ),
    ),
    "accuracy": Section(
        "Seconds to an accuracy",
        "Of the validation images, first reached at the end of an epoch.",
        (
            MarkdownColumn("networks", text("case")),
            MarkdownColumn("data", text("dataset")),
            MarkdownColumn("method", text("by")),
            MarkdownColumn("source", text("source")),
            MarkdownColumn("accuracy", number("accuracy", ".0%")),
            MarkdownColumn("seconds", number("seconds")),
            *FLOOR,
            MarkdownColumn("", notes),
        ),
    ),
}
