"""Tables: footnotes, remarks, files and pictures of made-up results."""

import csv
from pathlib import Path

from rich.console import Console

from l2t_fast.reports.column import Cell, Column
from l2t_fast.reports.comparison import summarize, sweep_groups
from l2t_fast.reports.table import write_tables
from tests.reports.shared import METHODS, cell, cells, column, drawn


def lines_of(text: str, start: str) -> list[list[str]]:
    """The lines of a Markdown table's methods that begin with `start`, as their fields."""
    rows = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [row for row in rows if row[0] == start]


def test_without_validation_the_last_epoch_is_the_headline(tmp_path: Path) -> None:
    found = [cell("scratch", 0, None, 60), cell("fm-single", 0, None, 59), cell("l2t-ww", 0, None, 61.25)]
    summary = summarize(Column("digits", found), METHODS)
    assert (summary.metric, summary.baseline) == ("test_accuracy_last", "scratch")
    write_tables(tmp_path, "run", [Column("digits", found)], METHODS)
    text = (tmp_path / "table.md").read_text()
    assert "best by validation" not in text
    assert lines_of(text, "l2t-ww") == [["l2t-ww", "**61.25**", "1", "10.0", "+1.25", "– (a)"]]
    assert "(a) p is undefined: one common seed has no spread." in text
    assert "last epoch, as there is no validation); 1 seed in common" in text
    assert "weak evidence" in text


def test_equal_means_are_all_bold_and_the_first_baseline_counts(tmp_path: Path) -> None:
    found = [*cells("scratch", [61, 63]), *cells("fm-single", [63, 61]), *cells("l2t-ww", [60, 62])]
    summary = summarize(Column("digits", found), METHODS)
    assert summary.baseline == "scratch"
    assert [summary.leads(standing) for standing in summary.standings] == [True, True, False]
    write_tables(tmp_path, "run", [Column("digits", found)], METHODS)
    text = (tmp_path / "table.md").read_text()
    assert lines_of(text, "scratch")[0][1] == lines_of(text, "fm-single")[0][1] == "**62.00 ± 1.41**"
    assert lines_of(text, "fm-single")[0][-2:] == ["+0.00", "1.000"]
    assert lines_of(text, "l2t-ww")[0][1] == "61.00 ± 1.41"


def test_missing_trainings_have_footnotes(tmp_path: Path) -> None:
    found = [
        *cells("scratch", [60, 62, 61]),
        *(Cell("fm-single", seed, None, "nothing of resnet8 fits vgg9_bn") for seed in range(3)),
        *cells("l2t-ww", [66, 67]),
        Cell("l2t-ww", 2, None, "diverged: the loss | is nan"),
    ]
    tables = write_tables(tmp_path, "run", [column("whole"), Column("holes", found)], METHODS)
    text = (tmp_path / "table.md").read_text()
    matrix, _, _ = text.partition("## whole")
    assert lines_of(matrix, "fm-single") == [["fm-single", "64.00 ± 1.73", "– (a)"]]
    assert lines_of(matrix, "l2t-ww") == [["l2t-ww", "**67.17 ± 1.26**", "**66.50 ± 0.71 (b)**"]]
    _, _, detail = text.partition("## holes")
    assert lines_of(detail, "fm-single") == [["fm-single", "–", "–", "0 of 3 (a)", "–", "–", "–"]]
    assert lines_of(detail, "l2t-ww")[0][3] == "2 of 3 (b)"
    for part in (matrix, detail):
        assert "(a) holes, fm-single, seeds 0, 1, 2: nothing of resnet8 fits vgg9_bn." in part
        assert "(b) holes, l2t-ww, seed 2: diverged: the loss \\| is nan." in part
    assert "nothing of resnet8" not in text.partition("## whole")[2].partition("## holes")[0]
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "terminal").open("w"))
    for table in tables:
        console.print(table)
    said = " ".join(console.export_text().split())
    assert len(tables) == 3
    assert "(b) holes, l2t-ww, seed 2: diverged" in said
    assert said.count("With so few seeds p is weak evidence") == 1
    drawn(tmp_path / "table.png")


def test_names_of_methods_are_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    names = ["scratch", "l2t-w-single", "l2t-w-one-to-one"]
    found = [made for name in names for made in cells(name, [60.25, 61.5, 68.75])]
    console = Console(width=80, record=True, file=(tmp_path / "terminal").open("w"))
    for table in write_tables(tmp_path, "run", [Column("cifar100", found)], names):
        console.print(table)
    lines = [line.split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    assert "l2t-w-one-to-one" in "".join(line[1].strip() for line in lines)


def test_a_method_that_no_column_ran_is_said_to_be_so(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [Column("digits", [])], METHODS)
    text = (tmp_path / "table.md").read_text()
    assert "digits, scratch: not run." in text
    assert "No baseline has a result" in text
    assert "as there is no validation" not in text  # which nobody knows yet


def test_the_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [column(published={"l2t-ww": (70.96, 0.61)})], METHODS)
    text = (tmp_path / "table.md").read_text()
    assert lines_of(text, "l2t-ww")[0][5] == "70.96 ± 0.61"
    assert lines_of(text, "scratch")[0][5] == "–"
    assert "Published: the paper's Table 1 (arXiv 1905.05901), three runs." in text
    write_tables(tmp_path, "run", [column(published={"l2t-ww": (1.0, 0.0)}, published_in="another table")], METHODS)
    assert "Published: another table." in (tmp_path / "table.md").read_text()
    write_tables(tmp_path, "run", [column()], METHODS)
    assert "Published" not in (tmp_path / "table.md").read_text()


def test_the_csv_files_hold_the_numbers_in_full(tmp_path: Path) -> None:
    columns = [column("a, b", published={"scratch": (59.0, 0.1)}), column("c", per_class=5, group="g")]
    write_tables(tmp_path, "run", columns, METHODS)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["column"], row["method"]) for row in rows] == [(c, m) for c in ("a, b", "c") for m in METHODS]
    for row in rows:
        standing = summarize(column(), METHODS).standings[METHODS.index(row["method"])]
        assert standing.best is not None
        assert float(row["best_mean"]) == standing.best.mean
        assert float(row["best_std"]) == standing.best.std
        assert row["best_baseline"] == "fm-single"
        if standing.comparison is None:
            assert row["p"] == row["difference"] == ""
        else:
            assert float(row["p"]) == standing.comparison.p
            assert float(row["difference"]) == standing.comparison.difference
    assert (rows[0]["published_mean"], rows[0]["published_std"], rows[1]["published_mean"]) == ("59.0", "0.1", "")
    assert (rows[5]["kind"], rows[5]["per_class"], rows[5]["group"]) == ("meta", "5", "g")
    single = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert len(single) == 18
    assert {float(row["test_accuracy_best"]) for row in single if row["method"] == "l2t-ww"} == {0.66, 0.67, 0.685}


def test_a_sweep_over_images_per_class_is_drawn(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [column("one"), column("two")], METHODS)
    drawn(tmp_path / "table.png")
    assert not (tmp_path / "sweep.png").exists()
    assert not (tmp_path / "curves.png").exists()
    columns = [
        column("all", group="digits"),
        column("50", group="digits", per_class=50),
        column("5", group="digits", per_class=5),
        column("alone", group="other", per_class=5),
        column("none", per_class=5),
    ]
    groups = sweep_groups([summarize(c, METHODS) for c in columns])
    assert {name: [s.per_class for s in found] for name, found in groups.items()} == {"digits": [5, 50, None]}
    write_tables(tmp_path, "run", columns, METHODS)
    drawn(tmp_path / "sweep.png")


def test_curves_are_drawn_though_a_seed_stopped_early(tmp_path: Path) -> None:
    rows = [{"epoch": e, "loss": 1 / (e + 1), "val_accuracy": 0.1 * e} for e in range(5)]
    curves = {"scratch": [rows, rows[:2]], "l2t-ww": [rows, [{**row, "loss": 0.5} for row in rows]]}
    write_tables(tmp_path, "run", [column("one", curves=curves), column("two")], METHODS)
    drawn(tmp_path / "curves.png")
