"""What is drawn: axes, labels and legends of pictures that are easily drawn wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l2t_fast.reports.column import Column
from l2t_fast.reports.comparison import summarize
from l2t_fast.reports.inspection import inspect
from l2t_fast.reports.pictures import curves, learned, table, weights
from l2t_fast.reports.pictures.canvas import figure, name_picture, pixels
from l2t_fast.reports.pictures.curves import plot_curves
from l2t_fast.reports.pictures.table import plot_table
from l2t_fast.reports.pictures.weights import plot_channel_weights, plot_pair_weights
from tests.reports.shared import cells, training


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, laid out."""
    kept: list[Any] = []
    for module in (curves, learned, table, weights):
        monkeypatch.setattr(module, "save", lambda figure, path: (figure.draw_without_rendering(), kept.append(figure)))
    return kept


def ticks(axes: Any) -> list[str]:
    """What stands at the ticks that are within the axes."""
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label.get_text() for place, label in labels if low <= place <= high and label.get_visible()]


def test_a_single_epoch_stands_in_the_middle_at_a_whole_number(tmp_path: Path, figures: list[Any]) -> None:
    plot_curves(tmp_path / "x.png", {"digits": {"scratch": [[{"epoch": 0, "loss": 1.5, "val_accuracy": 0.2}]]}}, "x")
    plot_pair_weights(tmp_path / "x.png", [[1.0, 2.0]], ["a → x", "b → x"], "x")
    training(tmp_path / "l2t-ww/seed-0", [[1.0, 2.0, 1.5, 0.5]], final=[1.0, 2.0, 1.5, 0.5])
    inspect(tmp_path, type("Silent", (), {"print": lambda *a, **k: None})())  # type: ignore[arg-type]
    by_epoch = [axes for figure in figures for axes in figure.axes if axes.get_xlabel() == "epoch"]
    assert len(by_epoch) == 4
    for axes in by_epoch:
        assert axes.get_xlim() == (0.5, 1.5)
        assert ticks(axes) == ["1"]


def test_several_epochs_are_whole_numbers(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"epoch": e, "loss": 1.5, "val_accuracy": 0.2} for e in range(3)]
    plot_curves(tmp_path / "x.png", {"digits": {"scratch": [rows]}}, "x")
    assert ticks(figures[0].axes[0]) == ["1", "2", "3"]


def test_each_histogram_has_its_numbers(tmp_path: Path, figures: list[Any]) -> None:
    w = np.random.default_rng(0).dirichlet(np.ones(8), 20)
    plot_channel_weights(tmp_path / "x.png", [w] * 7, [f"pair {p}" for p in range(7)], "x")
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert len(shown) == 7
    assert all(len(ticks(axes)) > 1 for axes in shown)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["l2t-ww"], ["learned transfer, mean ± std", "one seed"]),
        (["scratch"], ["baseline, mean ± std", "one seed", "best baseline"]),
        (["scratch", "l2t-ww"], ["baseline, mean ± std", "learned transfer, mean ± std", "one seed", "best baseline"]),
    ],
)
def test_the_legend_names_what_there_is(
    tmp_path: Path, figures: list[Any], methods: list[str], words: list[str]
) -> None:
    found = [cell for method in methods for cell in cells(method, [60, 62])]
    plot_table(tmp_path / "x.png", "digits", [summarize(Column("digits", found), methods)])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == words


def test_methods_are_told_apart_without_green_against_red(tmp_path: Path, figures: list[Any]) -> None:
    rows = [{"epoch": e, "loss": 1.5, "val_accuracy": 0.2} for e in range(2)]
    plot_curves(tmp_path / "x.png", {"digits": {f"method {i}": [rows] for i in range(11)}}, "x")
    handles = figures[0].axes[0].get_legend().get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in handles}) == 11


@pytest.mark.parametrize(
    "name", ["", "digits", "npz-vgg9_bn-50, l2t-w-one-to-one: mean of 3 seeds, bands ± std", "n" * 200]
)
def test_the_name_of_a_picture_is_within_it(name: str) -> None:
    fig = figure(4.6, 4.0)
    usual = figure(4.6, 4.0).suptitle(name).get_fontsize()
    name_picture(fig, name)
    pixels(fig)
    (text,) = fig.texts
    extent = text.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= fig.bbox.width
    assert text.get_fontsize() == usual if len(name) < 10 else text.get_fontsize() < usual
