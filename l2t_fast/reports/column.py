"""Tables of methods x targets over seeds: from the results of trainings to Markdown, CSV and pictures.

Accuracies come in as fractions, as in result.json, and go out in %; std is the sample's (n - 1) everywhere.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from scipy import stats

from l2t_fast.files import save_text
from l2t_fast.methods import find_method
from l2t_fast.reports.pictures import table as report_plots
from l2t_fast.reports.pictures.weights import Rows, plot_curves_of_columns
from l2t_fast.reports.published import published
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.log import read_epochs

_DASH = "–"
_SAME = 1e-9  # % points below which two numbers are one: what is left of them in floating point


@dataclass(frozen=True)
class Cell:
    """One training. `result` is the content of its result.json; without one, `problem` says why."""

    method: str
    seed: int
    result: Mapping[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Column:
    """One target: its cells, what the paper has for it (method: mean, std in %), the epoch lines of its methods.

    Columns of one `group` (not "") differ in `per_class` alone, training images a class, None for all of them.
    """

    title: str
    cells: Sequence[Cell]
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Rows]] = field(default_factory=dict)
    per_class: int | None = None
    group: str = ""


@dataclass(frozen=True)
class Stat:
    """Mean and sample std of n numbers; std is None for one of them."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """A method minus the best baseline, paired over the seeds that both have.

    `difference` is the mean in % points (None without a common seed), `p` that of a two-sided paired t-test, None
    where it is undefined, and then `why` says why.
    """

    difference: float | None
    pairs: int
    p: float | None
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """One method in one column. `values` holds the headline number of each seed, in %."""

    method: str
    is_meta: bool
    asked: int
    values: Mapping[int, float]
    best: Stat | None
    last: Stat | None
    seconds: Stat | None
    published: tuple[float, float] | None
    comparison: Comparison | None  # None for the best baseline itself, and where there is none
    problems: tuple[str, ...]

    @property
    def headline(self) -> Stat | None:
        return stat(list(self.values.values()))


@dataclass(frozen=True)
class Summary:
    """One column in numbers. `metric` is the headline: "test_accuracy_best" (by validation) or "test_accuracy_last"."""

    title: str
    metric: str
    entries: Sequence[Entry]
    baseline: str | None  # the best one
    per_class: int | None
    group: str

    def leads(self, entry: Entry) -> bool:
        """Whether no method of the column has a higher mean."""
        means = [other.headline.mean for other in self.entries if other.headline]
        return entry.headline is not None and entry.headline.mean >= max(means) - _SAME


def write_tables(
    folder: Path, title: str, columns: Sequence[Column], methods: Sequence[str], meta_methods: Collection[str]
) -> list[Table]:
    """Writes the tables of `columns` into `folder` (made where it is missing) and returns them for the terminal.

    table.md      for a reader: with several columns a matrix methods x columns, then each column in detail
    table.csv     a line a column and method: means and stds in % and s, the comparison with the best baseline
    cells.csv     a line a training: the numbers of result.json as they are (accuracies as fractions)
    table.png     every mean, std and seed; sweep.png where a group has several `per_class`; curves.png with `curves`

    Args:
        methods: the rows, in their order.
        meta_methods: those that learn what or where to transfer; all others are baselines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [summarize(column, methods, meta_methods) for column in columns]
    save_text(folder / "table.md", markdown(title, summaries))
    save_text(folder / "table.csv", _csv(_TABLE_FIELDS, [_table_row(s, e) for s in summaries for e in s.entries]))
    cells = [_cell_row(column, cell) for column in columns for cell in column.cells]
    save_text(folder / "cells.csv", _csv(_CELL_FIELDS, cells))
    report_plots.plot_table(folder / "table.png", title, summaries)
    if groups := sweep_groups(summaries):
        report_plots.plot_sweep(folder / "sweep.png", title, groups)
    if curves := {column.title: column.curves for column in columns if column.curves}:
        plot_curves_of_columns(folder / "curves.png", curves, title.partition(":")[0])
    notes = Notes()
    overview = [_rich(title, _matrix(summaries, notes), [])] if len(summaries) > 1 else []
    details = [_rich(s.title if overview else title, _detail(s, notes), _remarks(s)[:1]) for s in summaries]
    # What every table would say is said once, below the last.
    common = dict.fromkeys(remark for summary in summaries for remark in _remarks(summary)[1:])
    details[-1].caption = "\n".join([str(details[-1].caption), " ".join(common), *notes.lines]).replace("\n\n", "\n")
    return [*overview, *details]


def summarize(column: Column, methods: Sequence[str], meta_methods: Collection[str]) -> Summary:
    """The numbers of one column, a line a method; the headline is the best by validation if every training has it."""
    results = [cell.result for cell in column.cells if cell.result is not None]
    validated = bool(results) and all("test_accuracy_best" in result for result in results)
    metric = "test_accuracy_best" if validated else "test_accuracy_last"
    cells = {method: [cell for cell in column.cells if cell.method == method] for method in methods}
    values = {method: _numbers(cells[method], metric, 100) for method in methods}
    means = {m: statistics.fmean(v.values()) for m, v in values.items() if v and m not in meta_methods}
    # Of those with most seeds; the first of equals.
    most = max((len(values[method]) for method in means), default=0)
    complete = [method for method in means if len(values[method]) == most]
    baseline = max(complete, key=lambda method: means[method]) if complete else None
    entries = [
        Entry(
            method=method,
            is_meta=method in meta_methods,
            asked=len(cells[method]),
            values=values[method],
            best=stat(list(_numbers(cells[method], "test_accuracy_best", 100).values())),
            last=stat(list(_numbers(cells[method], "test_accuracy_last", 100).values())),
            seconds=stat(list(_numbers(cells[method], "seconds", 1).values())),
            published=column.published.get(method),
            comparison=None
            if baseline in (None, method) or not values[method]
            else compare(values[method], values[baseline or ""]),
            problems=_problems(cells[method]),
        )
        for method in methods
    ]
    return Summary(column.title, metric, entries, baseline, column.per_class, column.group)


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and sample std; None of nothing."""
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison:
    """`values` minus `baseline` (accuracy in % by seed), paired by seed, with the p of a two-sided paired t-test."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return Comparison(None, 0, None, "no seed is common to both")
    ours, theirs = np.array([values[s] for s in seeds]), np.array([baseline[s] for s in seeds])
    difference = float((ours - theirs).mean())
    if len(seeds) < 2:
        return Comparison(difference, 1, None, "one common seed has no spread")
    if np.ptp(ours - theirs) <= _SAME:
        # t is 0/0 or infinite: p would be nothing or 0, and neither is knowledge about the methods.
        return Comparison(difference, len(seeds), None, "the difference is the same for every seed, without spread")
    return Comparison(difference, len(seeds), float(stats.ttest_rel(ours, theirs).pvalue))


def sweep_groups(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """The groups of columns that differ in images per class, by rising number, None (all images) last."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.group:
            groups.setdefault(summary.group, []).append(summary)
    order = {name: sorted(found, key=lambda s: s.per_class or math.inf) for name, found in groups.items()}
    return {name: found for name, found in order.items() if len({s.per_class for s in found}) > 1}


def mean_std(values: Stat | None, digits: int = 2) -> str:
    """ "70.27 ± 0.09", without ± for a single number, a dash for none."""
    if values is None:
        return _DASH
    spread = "" if values.std is None else f" ± {values.std:.{digits}f}"
    return f"{values.mean:.{digits}f}{spread}"


class Notes:
    """Footnotes, lettered in the order of their first use."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, texts: Sequence[str]) -> str:
        """The letters that stand for `texts`, such as " (a, b)"; nothing for none."""
        self._texts += [text for text in dict.fromkeys(texts) if text not in self._texts]
        letters = [_letters(self._texts.index(text)) for text in texts]
        return f" ({', '.join(letters)})" if letters else ""

    @property
    def lines(self) -> list[str]:
        return [f"({_letters(i)}) {text}" for i, text in enumerate(self._texts)]


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


@dataclass(frozen=True)
class _Grid:
    """A table as text: header, lines, and the (line, column) places in bold."""

    header: list[str]
    lines: list[list[str]]
    bold: set[tuple[int, int]]


def _matrix(summaries: Sequence[Summary], notes: Notes) -> _Grid:
    """Methods x columns, headline numbers only: the shape of the paper's Table 1."""
    header = ["method"]
    header += [s.title + ("" if s.metric == "test_accuracy_best" else " (last epoch)") for s in summaries]
    lines = [[entry.method] for entry in summaries[0].entries]
    bold = set()
    for j, summary in enumerate(summaries, start=1):
        for i, entry in enumerate(summary.entries):
            lines[i].append(mean_std(entry.headline) + notes.mark(_told(summary, entry)))
            if summary.leads(entry):
                bold.add((i, j))
    return _Grid(header, lines, bold)


def _detail(summary: Summary, notes: Notes) -> _Grid:
    """One column with all that is known of it."""
    validated = any(entry.best for entry in summary.entries)
    published = any(entry.published for entry in summary.entries)
    header = ["method", *(["best by validation (%)"] if validated else []), "last epoch (%)", "seeds", "seconds"]
    header += [*(["published (%)"] if published else []), "Δ best baseline", "p"]
    lines = []
    for entry in summary.entries:
        found, against = len(entry.values), entry.comparison
        seeds = str(found) if found == entry.asked else f"{found} of {entry.asked}"
        paper = Stat(*entry.published, 3) if entry.published else None
        delta = (
            _DASH if against is None or against.difference is None else f"{against.difference:+.2f}".replace("-", "−")
        )
        p = _DASH if against is None or against.p is None else _p_text(against.p)
        why = notes.mark([f"p is undefined: {against.why}."]) if against and against.why else ""
        line = [entry.method, *([mean_std(entry.best)] if validated else []), mean_std(entry.last)]
        line += [seeds + notes.mark(_told(summary, entry)), mean_std(entry.seconds, 1)]
        if summary.baseline == entry.method:
            delta = "best baseline"
        lines.append([*line, *([mean_std(paper)] if published else []), delta, p + why])
    headline = 1  # the headline's place: the best by validation, or the last epoch where there is no validation
    if validated and summary.metric == "test_accuracy_last":
        headline = 2
    return _Grid(header, lines, {(i, headline) for i, entry in enumerate(summary.entries) if summary.leads(entry)})


def _told(summary: Summary, entry: Entry) -> list[str]:
    """The footnotes about missing trainings."""
    if not entry.asked:
        return [f"{summary.title}, {entry.method}: not run."]
    return [f"{summary.title}, {entry.method}, {problem}" for problem in entry.problems]


def _remarks(summary: Summary) -> list[str]:
    """What stands below a column's table: the baseline, the number of seeds, what p is worth."""
    what = "best by validation" if summary.metric == "test_accuracy_best" else "last epoch, as there is no validation"
    if summary.baseline is None:
        return [f"No baseline has a result, so that there is nothing to compare with ({what})."]
    pairs = [e.comparison.pairs for e in summary.entries if e.comparison]
    remarks = [f"Best baseline: {summary.baseline}, by its mean ({what})"]
    if pairs:
        few, many = min(pairs), max(pairs)
        remarks[0] += f"; {few}{'' if few == many else f' to {many}'} seed{'s' * (many != 1)} in common with it."
        remarks.append(
            "Δ: mean difference to the best baseline in points, paired by seed; p: two-sided paired t-test, not "
            "corrected for the number of methods, nor for the choice of the best baseline by the same numbers."
        )
        if few < 10:
            remarks.append(
                "With so few seeds p is weak evidence: a small one may be chance, a large one does not mean equality."
            )
    else:
        remarks[0] += "."
    if summary.metric == "test_accuracy_best":
        remarks.append("Of epochs with the same validation accuracy the first counts.")
    remarks.append("Seconds are those of trainings that may have run side by side.")
    if any(entry.published for entry in summary.entries):
        remarks.append(
            "Published: the paper's Table 1 (arXiv 1905.05901), three runs, as transcribed; compare with the paper "
            "before quoting."
        )
    return remarks


def markdown(title: str, summaries: Sequence[Summary]) -> str:
    """The whole of table.md."""
    parts = [f"# {_plain(title)}", "Test accuracy, mean ± sample std (n − 1) over seeds; the best mean is bold."]
    if len(summaries) > 1:
        notes = Notes()
        what = "Best by validation, %" if any(s.metric == "test_accuracy_best" for s in summaries) else "%"
        parts += [f"{what}:", _markdown_table(_matrix(summaries, notes)), *map(_plain, notes.lines)]
    for summary in summaries:
        notes = Notes()
        if len(summaries) > 1:
            parts.append(f"## {_plain(summary.title)}")
        parts.append(_markdown_table(_detail(summary, notes)))
        parts += [" ".join(_remarks(summary)), *(_plain(line) for line in notes.lines)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(grid: _Grid) -> str:
    rule = ["---"] + ["---:"] * (len(grid.header) - 1)
    lines = [
        [f"**{_plain(text)}**" if (i, j) in grid.bold else _plain(text) for j, text in enumerate(line)]
        for i, line in enumerate(grid.lines)
    ]
    header = [_plain(text) for text in grid.header]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def _plain(text: str) -> str:
    """Text of others on one line, where no sign of it makes a table's border."""
    return " ".join(text.split()).replace("|", "\\|")


def _rich(title: str, grid: _Grid, remarks: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", caption=" ".join(remarks), caption_justify="left")
    for j, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if j == 0 else "right")
    for i, line in enumerate(grid.lines):
        table.add_row(*(Text(text, style="bold" if (i, j) in grid.bold else "") for j, text in enumerate(line)))
    return table


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _numbers(cells: Sequence[Cell], key: str, scale: float) -> dict[int, float]:
    return {cell.seed: scale * cell.result[key] for cell in cells if cell.result is not None and key in cell.result}


def _problems(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The reasons of the cells without a result, each once with its seeds."""
    seeds: dict[str, list[int]] = {}
    for cell in cells:
        if cell.result is None:
            seeds.setdefault(cell.problem or "no result yet", []).append(cell.seed)
    return tuple(
        f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}: {problem.rstrip('.')}."
        for problem, found in seeds.items()
    )


_TABLE_FIELDS = (
    *("column", "group", "per_class", "method", "kind", "seeds", "seeds_asked", "headline"),
    *("best_mean", "best_std", "last_mean", "last_std", "seconds_mean", "seconds_std"),
    *("published_mean", "published_std", "best_baseline", "difference", "pairs", "p", "p_undefined"),
)
_CELL_FIELDS = (
    *("column", "group", "per_class", "method", "seed", "test_accuracy_best", "test_accuracy_last"),
    *("val_accuracy_best", "best_epoch", "iterations", "seconds", "problem"),
)


def _table_row(summary: Summary, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"column": summary.title, "group": summary.group, "per_class": summary.per_class}
    row |= {"method": entry.method, "kind": "meta" if entry.is_meta else "baseline"}
    row |= {"seeds": len(entry.values), "seeds_asked": entry.asked, "headline": summary.metric}
    for name, values in (("best", entry.best), ("last", entry.last), ("seconds", entry.seconds)):
        if values is not None:
            row |= {f"{name}_mean": values.mean, f"{name}_std": values.std}
    if entry.published:
        row["published_mean"], row["published_std"] = entry.published
    row["best_baseline"] = summary.baseline
    if against := entry.comparison:
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


Problems = dict[str, dict[str, str]]  # method: {seed: why there is no result}


def read_column(folder: Path, config: TrainConfig, problems: Problems) -> Column:
    """The column of a table that a run, in `folder`, is."""
    cells: list[Cell] = []
    curves: dict[str, list[Any]] = {}
    for method in config.method or ():
        for seed in config.seeds or ():
            path = folder / method / f"seed-{seed}" / "result.json"
            result = json.loads(path.read_text()) if path.exists() else None
            why = "" if result else problems.get(method, {}).get(str(seed), "not trained yet")
            cells.append(Cell(method, seed, result, why))
            if result:
                curves.setdefault(method, []).append(read_epochs(path.with_name("metrics.jsonl")))
    limit = config.data.per_class
    group = f"{config.data.dataset}, {config.target.target}"
    return Column(
        title=group if limit is None else f"{group}, {limit} per class",
        cells=cells,
        published=published(config),
        curves=curves,
        per_class=limit,
        group=group,
    )


def meta_methods(methods: Sequence[str]) -> set[str]:
    """Those that learn what or where to transfer."""
    return {name for name in methods if find_method(name).learns_weights}
