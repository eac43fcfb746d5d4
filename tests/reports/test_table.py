"""Tables: aggregates, comparisons, footnotes, files and pictures, against numbers made by hand or by numpy."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from l2t_fast.data.options import DataConfig
from l2t_fast.reports.published import published
from l2t_fast.reports.table import Cell, Column, Stat, compare, stat, summarize, sweep_groups, write_tables
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, SourceConfig, TargetConfig, TrainConfig

METHODS = ["scratch", "fm-single", "l2t-ww"]
META = {"l2t-ww"}


def cell(method: str, seed: int, best: float | None, last: float, seconds: float = 10.0) -> Cell:
    """A finished training; accuracies in %."""
    result: dict[str, Any] = {"test_accuracy_last": last / 100, "seconds": seconds, "iterations": 60}
    if best is not None:
        result |= {"test_accuracy_best": best / 100, "val_accuracy_best": 0.5, "best_epoch": 3}
    return Cell(method, seed, result)


def cells(method: str, best: Sequence[float]) -> list[Cell]:
    return [cell(method, seed, value, value - 1, 10.0 + seed) for seed, value in enumerate(best)]


def column(title: str = "cifar100", **more: Any) -> Column:
    found = [*cells("scratch", [60, 62, 61]), *cells("fm-single", [63, 66, 63]), *cells("l2t-ww", [66, 67, 68.5])]
    return Column(title, found, **more)


def lines_of(text: str, start: str) -> list[list[str]]:
    """The lines of a Markdown table's methods that begin with `start`, as their fields."""
    rows = [[field.strip() for field in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [row for row in rows if row[0] == start]


def drawn(path: Path) -> None:
    """A picture that has something on it."""
    pixels = image.imread(path)
    assert pixels.shape[0] > 100
    assert pixels.shape[1] > 200
    assert np.mean(pixels[..., :3].min(-1) < 0.9) > 0.01
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_the_aggregates_are_those_of_numpy() -> None:
    summary = summarize(column(published={"l2t-ww": (70.0, 0.5)}), METHODS, META)
    ww = summary.entries[2]
    assert ww.best is not None
    assert ww.last is not None
    assert ww.seconds is not None
    assert ww.best.mean == pytest.approx(np.mean([66, 67, 68.5]))
    assert ww.best.std == pytest.approx(np.std([66, 67, 68.5], ddof=1))
    assert ww.last.mean == pytest.approx(np.mean([65, 66, 67.5]))
    assert ww.seconds == Stat(11.0, 1.0, 3)
    assert ww.published == (70.0, 0.5)
    assert summary.metric == "test_accuracy_best"
    assert summary.baseline == "fm-single"  # not l2t-ww, which is better but no baseline
    assert summary.entries[1].comparison is None
    assert [summary.leads(entry) for entry in summary.entries] == [False, False, True]
    assert stat([]) is None
    assert stat([3.0]) == Stat(3.0, None, 1)


def test_p_is_that_of_the_formula_for_two_degrees_of_freedom() -> None:
    ours, theirs = [66.0, 67.0, 68.5], [63.0, 66.0, 63.0]
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    d = np.subtract(ours, theirs)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert found.difference == pytest.approx(d.mean())
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    assert found.pairs == 3
    back = compare(dict(enumerate(theirs)), dict(enumerate(ours)))
    assert back.difference == pytest.approx(-d.mean())
    assert back.p == pytest.approx(found.p)


def test_p_is_undefined_where_there_is_no_spread() -> None:
    same = compare({0: 60.1, 1: 62.3}, {0: 59.1, 1: 61.3})  # in floating point not quite equal
    assert (same.difference, same.p, same.pairs) == (pytest.approx(1.0), None, 2)
    assert "same for every seed" in same.why
    one = compare({0: 60.0, 1: 70.0}, {0: 59.0, 2: 1.0})  # seed 0 alone is common
    assert (one.difference, one.p, one.pairs) == (1.0, None, 1)
    assert "one common seed" in one.why
    none = compare({0: 60.0}, {1: 60.0})
    assert (none.difference, none.p, none.pairs) == (None, None, 0)


def test_without_validation_the_last_epoch_is_the_headline(tmp_path: Path) -> None:
    found = [cell("scratch", 0, None, 60), cell("fm-single", 0, None, 59), cell("l2t-ww", 0, None, 61.25)]
    summary = summarize(Column("digits", found), METHODS, META)
    assert (summary.metric, summary.baseline) == ("test_accuracy_last", "scratch")
    write_tables(tmp_path, "run", [Column("digits", found)], METHODS, META)
    text = (tmp_path / "table.md").read_text()
    assert "best by validation" not in text
    assert lines_of(text, "l2t-ww") == [["l2t-ww", "**61.25**", "1", "10.0", "+1.25", "– (a)"]]
    assert "(a) p is undefined: one common seed has no spread." in text
    assert "last epoch, as there is no validation); 1 seed in common" in text
    assert "weak evidence" in text


def test_equal_means_are_all_bold_and_the_first_baseline_counts(tmp_path: Path) -> None:
    found = [*cells("scratch", [61, 63]), *cells("fm-single", [63, 61]), *cells("l2t-ww", [60, 62])]
    summary = summarize(Column("digits", found), METHODS, META)
    assert summary.baseline == "scratch"
    assert [summary.leads(entry) for entry in summary.entries] == [True, True, False]
    write_tables(tmp_path, "run", [Column("digits", found)], METHODS, META)
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
    tables = write_tables(tmp_path, "run", [column("whole"), Column("holes", found)], METHODS, META)
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


def test_a_method_that_no_column_ran_is_said_to_be_so(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [Column("digits", [])], METHODS, META)
    text = (tmp_path / "table.md").read_text()
    assert "digits, scratch: not run." in text
    assert "No baseline has a result" in text


def test_the_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [column(published={"l2t-ww": (70.96, 0.61)})], METHODS, META)
    text = (tmp_path / "table.md").read_text()
    assert lines_of(text, "l2t-ww")[0][5] == "70.96 ± 0.61"
    assert lines_of(text, "scratch")[0][5] == "–"
    assert "as transcribed" in text
    write_tables(tmp_path, "run", [column()], METHODS, META)
    assert "transcribed" not in (tmp_path / "table.md").read_text()


def test_the_csv_files_hold_the_numbers_in_full(tmp_path: Path) -> None:
    columns = [column("a, b", published={"scratch": (59.0, 0.1)}), column("c", per_class=5, group="g")]
    write_tables(tmp_path, "run", columns, METHODS, META)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["column"], row["method"]) for row in rows] == [(c, m) for c in ("a, b", "c") for m in METHODS]
    for row in rows:
        entry = summarize(column(), METHODS, META).entries[METHODS.index(row["method"])]
        assert entry.best is not None
        assert float(row["best_mean"]) == entry.best.mean
        assert float(row["best_std"]) == entry.best.std
        assert row["best_baseline"] == "fm-single"
        if entry.comparison is None:
            assert row["p"] == row["difference"] == ""
        else:
            assert float(row["p"]) == entry.comparison.p
            assert float(row["difference"]) == entry.comparison.difference
    assert (rows[0]["published_mean"], rows[0]["published_std"], rows[1]["published_mean"]) == ("59.0", "0.1", "")
    assert (rows[5]["kind"], rows[5]["per_class"], rows[5]["group"]) == ("meta", "5", "g")
    single = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert len(single) == 18
    assert {float(row["test_accuracy_best"]) for row in single if row["method"] == "l2t-ww"} == {0.66, 0.67, 0.685}


def test_a_sweep_over_images_per_class_is_drawn(tmp_path: Path) -> None:
    write_tables(tmp_path, "run", [column("one"), column("two")], METHODS, META)
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
    groups = sweep_groups([summarize(c, METHODS, META) for c in columns])
    assert {name: [s.per_class for s in found] for name, found in groups.items()} == {"digits": [5, 50, None]}
    write_tables(tmp_path, "run", columns, METHODS, META)
    drawn(tmp_path / "sweep.png")


def test_curves_are_drawn_though_a_seed_stopped_early(tmp_path: Path) -> None:
    rows = [{"epoch": e, "loss": 1 / (e + 1), "val_accuracy": 0.1 * e} for e in range(5)]
    curves = {"scratch": [rows, rows[:2]], "l2t-ww": [rows, [{**row, "loss": 0.5} for row in rows]]}
    write_tables(tmp_path, "run", [column("one", curves=curves), column("two")], METHODS, META)
    drawn(tmp_path / "curves.png")


def given(
    dataset: str, weights: tuple[str, ...] | None = ("w.pt",), settings: tuple[str, ...] = (), **parts: Any
) -> Any:
    """What stands beside a run of `dataset` that differs from its defaults in `parts`."""
    config = resolve(
        TrainConfig(
            method=tuple(METHODS_OF_PAPER),
            settings=settings,
            data=DataConfig(dataset, **parts.get("data", {})),
            source=SourceConfig(source_weights=weights, **parts.get("source", {})),
            target=TargetConfig(**parts.get("target", {})),
            optim=OptimConfig(**parts.get("optim", {})),
        )
    )
    return published(config)


METHODS_OF_PAPER = ["scratch", "lwf", "at", "lwf+at", "fm-single", "fm-one-to-one", "l2t-w-single", "l2t-ww"]


def test_published_numbers_are_given_for_the_papers_settings_alone() -> None:
    assert given("cifar100")["l2t-ww"] == (70.96, 0.61)
    assert len(given("stl10")) == 9
    assert given("stanford40", ("imagenet",))["l2t-ww"] == (63.08, 0.88)
    assert given("stanford-dogs", ("imagenet",))["at"] == (69.70, 0.08)
    assert given("cifar100", optim={"mode": "graph", "precision": "tf32", "memory": "recompute"})
    for change in (
        {"weights": None},
        {"settings": ("at.weight=1",)},
        {"source": {"source_width": (0.5,)}},
        {"source": {"source": ("resnet20",)}},
        {"source": {"source": ("resnet32", "resnet32")}, "weights": ("a.pt", "b.pt")},
        {"source": {"source_layers": ("layer1",)}},
        {"target": {"target_width": 0.25}},
        {"target": {"target": "resnet32"}},
        {"target": {"target_layers": ("features.2",)}},
        {"data": {"classes": (0, 1)}},
        {"data": {"per_class": 50}},
        {"data": {"val_fraction": 0.2}},
        *({"optim": {name: value}} for name, value in OTHER_SETTINGS.items()),
    ):
        assert given("cifar100", **change) == {}, change
    assert given("cifar10") == {}
    assert given("stanford40", ("w.pt",)) == {}


OTHER_SETTINGS = {
    "epochs": 100,
    "batch_size": 64,
    "lr": 0.05,
    "momentum": 0.0,
    "weight_decay": 0.3,
    "beta": 0.0,
    "meta_lr": 1e-3,
    "inner_steps": 0,
    "scheme": "simulation",
    "where": "relu",
}
