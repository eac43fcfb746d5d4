"""Tables of methods x targets over seeds: from the results of trainings to Markdown, CSV, pictures and the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from l2t_fast.files import make_folder, save_text
from l2t_fast.reports.column import Column
from l2t_fast.reports.comparison import DASH, Standing, Stat, Summary, mean_std, summarize, sweep_groups
from l2t_fast.reports.csv_files import write_csv
from l2t_fast.reports.grid import Grid, plain, to_markdown, to_rich
from l2t_fast.reports.pictures.curves import plot_curves
from l2t_fast.reports.pictures.sweep import plot_sweep
from l2t_fast.reports.pictures.table import plot_table


def write_tables(folder: Path, title: str, columns: Sequence[Column], methods: Sequence[str]) -> list[Table]:
    """Writes the tables of `columns` into `folder` (made where it is missing) and returns them for the terminal.

    table.md      for a reader: with several columns a matrix methods x columns, then each column in detail
    table.csv     a line a column and method: means and stds in % and s, the comparison with the best baseline
    cells.csv     a line a training: the numbers of result.json as they are (accuracies as fractions)
    table.png     every mean, std and seed; sweep.png where a group has several `per_class`; curves.png with `curves`

    Args:
        methods: the rows, in their order.
    """
    make_folder(folder)
    summaries = [summarize(column, methods) for column in columns]
    save_text(folder / "table.md", _markdown(title, summaries))
    write_csv(folder, columns, summaries)
    plot_table(folder / "table.png", title, summaries)
    if groups := sweep_groups(summaries):
        plot_sweep(folder / "sweep.png", title, groups)
    if curves := {column.title: column.curves for column in columns if column.curves}:
        plot_curves(folder / "curves.png", curves, title.partition(":")[0])
    notes = _Notes()
    overview = [to_rich(_matrix(summaries, notes), title, [])] if len(summaries) > 1 else []
    details = [to_rich(_detail(s, notes), s.title if overview else title, _remarks(s)[:1]) for s in summaries]
    # What every table would say is said once, below the last.
    common = dict.fromkeys(remark for summary in summaries for remark in _remarks(summary)[1:])
    caption = "\n".join([str(details[-1].caption), " ".join(common), *notes.lines]).replace("\n\n", "\n")
    details[-1].caption = Text(caption)
    return [*overview, *details]


def _markdown(title: str, summaries: Sequence[Summary]) -> str:
    """The whole of table.md."""
    parts = [f"# {plain(title)}", "Test accuracy, mean ± sample std (n − 1) over seeds; the best mean is bold."]
    if len(summaries) > 1:
        notes = _Notes()
        what = "Best by validation, %" if any(s.metric == "test_accuracy_best" for s in summaries) else "%"
        parts += [f"{what}:", to_markdown(_matrix(summaries, notes)), *map(plain, notes.lines)]
    for summary in summaries:
        if len(summaries) > 1:
            parts.append(f"## {plain(summary.title)}")
        grid, below = detailed(summary)
        parts += [to_markdown(grid), below[0], *map(plain, below[1:])]
    return "\n\n".join(parts) + "\n"


def detailed(summary: Summary) -> tuple[Grid, list[str]]:
    """(one column with all that is known of it, what stands below)."""
    notes = _Notes()
    grid = _detail(summary, notes)
    return grid, [" ".join(_remarks(summary)), *notes.lines]


class _Notes:
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


def _matrix(summaries: Sequence[Summary], notes: _Notes) -> Grid:
    """Methods x columns, headline numbers only: the shape of the paper's Table 1."""
    header = ["method"]
    header += [s.title + ("" if s.metric == "test_accuracy_best" else " (last epoch)") for s in summaries]
    lines = [[standing.method] for standing in summaries[0].standings]
    bold = set()
    for j, summary in enumerate(summaries, start=1):
        for i, standing in enumerate(summary.standings):
            lines[i].append(mean_std(standing.headline) + notes.mark(_missing(summary, standing)))
            if summary.leads(standing):
                bold.add((i, j))
    return Grid(header, lines, bold)


def _detail(summary: Summary, notes: _Notes) -> Grid:
    """One column with all that is known of it."""
    validated = any(standing.best for standing in summary.standings)
    published = any(standing.published for standing in summary.standings)
    header = ["method", *(["best by validation (%)"] if validated else []), "last epoch (%)", "seeds", "seconds"]
    header += [*(["published (%)"] if published else []), "Δ best baseline", "p"]
    lines = []
    for standing in summary.standings:
        found, against = len(standing.values), standing.comparison
        seeds = str(found) if found == standing.asked else f"{found} of {standing.asked}"
        paper = Stat(*standing.published, 3) if standing.published else None
        delta = (
            DASH if against is None or against.difference is None else f"{against.difference:+.2f}".replace("-", "−")
        )
        p = DASH if against is None or against.p is None else _p_text(against.p)
        why = notes.mark([f"p is undefined: {against.why}."]) if against and against.why else ""
        line = [standing.method, *([mean_std(standing.best)] if validated else []), mean_std(standing.last)]
        line += [seeds + notes.mark(_missing(summary, standing)), mean_std(standing.seconds, 1)]
        if summary.baseline == standing.method:
            delta = "best baseline"
        lines.append([*line, *([mean_std(paper)] if published else []), delta, p + why])
    headline = 1  # the headline's place: the best by validation, or the last epoch where there is no validation
    if validated and summary.metric == "test_accuracy_last":
        headline = 2
    return Grid(
        header,
        lines,
        frozenset((i, headline) for i, standing in enumerate(summary.standings) if summary.leads(standing)),
    )


def _missing(summary: Summary, standing: Standing) -> list[str]:
    """The footnotes about missing trainings."""
    if not standing.asked:
        return [f"{summary.title}, {standing.method}: not run."]
    return [f"{summary.title}, {standing.method}, {problem}" for problem in standing.problems]


def _remarks(summary: Summary) -> list[str]:
    """What stands below a column's table: the baseline, the number of seeds, what p is worth."""
    what = "best by validation" if summary.metric == "test_accuracy_best" else "last epoch, as there is no validation"
    if summary.baseline is None:
        known = any(standing.values for standing in summary.standings)  # else nobody knows what will count
        return [f"No baseline has a result, so that there is nothing to compare with{f' ({what})' if known else ''}."]
    pairs = [s.comparison.pairs for s in summary.standings if s.comparison]
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
    if any(standing.published for standing in summary.standings):
        remarks.append(f"Published: {summary.published_in}.")
    return remarks


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
