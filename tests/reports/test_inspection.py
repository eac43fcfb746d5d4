"""What was learned: tables, sentences and pictures of made-up runs, and runs that are none."""

from pathlib import Path

import pytest
from rich.console import Console

from l2t_fast.errors import L2TError
from l2t_fast.reports.inspection import inspect, pair_grid, sentences
from l2t_fast.reports.learned import read_learned
from tests.reports.shared import PEAKED, UNIFORM, drawn, training


def looked_at(folder: Path) -> tuple[str, str]:
    """(what is printed, what is written)"""
    with (folder / "terminal").open("w") as file:
        console = Console(width=200, file=file)
        path = inspect(folder, console)
    return (folder / "terminal").read_text(), path.read_text()


def test_pairs_by_falling_weight_with_their_change_and_their_channels(tmp_path: Path) -> None:
    channels = [PEAKED, UNIFORM, UNIFORM, UNIFORM]
    for seed, shift in enumerate((0.0, 0.2)):
        history = [[1.0, 1.0, 1.0, 1.0], [1.5, 0.5, 2.0 + shift, 0.0]]
        training(tmp_path / f"l2t-ww/seed-{seed}", history, final=[1.5, 0.5, 3.0 + shift, 0.0], channels=channels)
    (learned,) = read_learned(tmp_path)
    assert pair_grid(learned).lines == [
        ["b → x", "3.10 ± 0.14", "+1.10 ± 0.14", "100.0 ± 0.0", "10.0 ± 0.0"],
        ["a → x", "1.50 ± 0.00", "+0.50 ± 0.00", "50.0 ± 0.0", "20.0 ± 0.0"],
        ["a → y", "0.50 ± 0.00", "−0.50 ± 0.00", "100.0 ± 0.0", "10.0 ± 0.0"],
        ["b → y", "0.00 ± 0.00", "−1.00 ± 0.00", "100.0 ± 0.0", "10.0 ± 0.0"],
    ]
    said = " ".join(sentences(learned))
    assert "The top 3 of 4 pairs (b → x, a → x, a → y) have 100% of Σλ" in said
    assert "; λ is 0 for 1 of all." in said
    assert "The 2 seeds agree on the ranking of the pairs: Spearman's ρ of λ between two seeds is 1.00." in said
    assert "88% of the channels are effective (uniform: 100%; the most peaked pair: 50%)" in said
    assert "hold 12% of the weight" in said
    printed, written = looked_at(tmp_path)
    for line in pair_grid(learned).lines:
        assert f"| {' | '.join(line)} |" in written
    assert "3.10 ± 0.14" in printed
    assert "![l2t-ww](<inspect_l2t-ww.png>)" in written
    drawn(tmp_path / "inspect_l2t-ww.png", 1000)


def test_seeds_that_rank_the_pairs_differently_are_said_to(tmp_path: Path) -> None:
    finals = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]]
    for seed, final in enumerate(finals):
        training(tmp_path / f"l2t-ww/seed-{seed}", [final], final=final)
    (learned,) = read_learned(tmp_path)
    said = " ".join(sentences(learned))
    # ρ = -1, 0.8 and -0.8, by 1 - 6 Σ d² / (n (n² - 1)) with n = 4.
    assert "The 3 seeds disagree" in said
    assert "−0.33 on average, from −1.00 to 0.80" in said
    assert learned.effective is None
    assert "channels" not in said


def test_fixed_pair_weights_and_a_table_of_columns(tmp_path: Path) -> None:
    for column in ("digits", "letters"):
        training(tmp_path / column / "l2t-w-single/seed-0", [[1.0], [1.0]], channels=[PEAKED])
        training(tmp_path / column / "fm-single/seed-0", [[1.0], [1.0]], meta=False)
        training(tmp_path / column / "l2t-ww/seed-0", [[1.0] * 4, [2.0, 1.0, 1.0, 0.5]], final=[2.0, 1.0, 1.0, 0.5])
    found = read_learned(tmp_path)
    methods = ["l2t-w-single", "l2t-ww"]
    assert [(one.column, one.method) for one in found] == [(c, m) for c in ("digits", "letters") for m in methods]
    assert pair_grid(found[0]).lines == [["a → x", "50.0", "20.0"]]
    assert sentences(found[0])[0] == "λ is fixed."
    assert "One seed says nothing" in " ".join(sentences(found[1]))
    _, written = looked_at(tmp_path)
    assert "## letters, l2t-ww" in written
    assert "fm-single" not in written
    drawn(tmp_path / "letters/inspect_l2t-ww.png", 700)
    drawn(tmp_path / "digits/inspect_l2t-w-single.png", 400)


def test_several_sources_are_told_apart(tmp_path: Path) -> None:
    final = [1.0, 2.0, 3.0, 0.5]
    training(tmp_path / "l2t-ww/seed-0", [final], final=final, prefix=("0:", "0:", "1:", "1:"))
    (learned,) = read_learned(tmp_path)
    assert learned.layers == [("0", "a", "x"), ("0", "a", "y"), ("1", "b", "x"), ("1", "b", "y")]
    assert learned.names[2] == "1:b → x"
    looked_at(tmp_path)
    drawn(tmp_path / "inspect_l2t-ww.png", 700)


def test_a_run_under_way_tells_how_far_it_is(tmp_path: Path) -> None:
    ww = tmp_path / "l2t-ww"
    training(ww / "seed-0", [[1.0] * 4] * 3 + [[1.0, 2.0, 3.0, 4.0]], final=[1.5, 2.0, 3.0, 4.0], channels=[PEAKED] * 4)
    training(ww / "seed-1", [[1.0] * 4, [2.5, 2.0, 3.0, 4.0]], ended=False)
    (ww / "seed-2").mkdir()  # has not ended an epoch
    training(tmp_path / "l2t-w-single/seed-0", [[1.0]], ended=False)
    single, found = read_learned(tmp_path)
    assert (found.seeds, found.under_way) == ([0, 1], {1: 2})
    assert found.final is not None
    assert found.final[:, 0].tolist() == [1.5, 2.5]  # at the end of training, and in the last epoch so far
    assert {line[0]: line[3] for line in pair_grid(found).lines}["a → x"] == "50.0"
    assert sentences(found)[-1] == "Seed 1 has not ended: 2 epochs so far."
    assert (single.final, single.effective) == (None, None)
    printed, written = looked_at(tmp_path)
    assert "l2t-w-single: λ is fixed. Seed 0 has not ended: 1 epoch so far." in printed
    assert "Seed 1 has not ended" in written
    drawn(tmp_path / "inspect_l2t-ww.png", 1000)
    assert not (tmp_path / "inspect_l2t-w-single.png").exists()


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    console = Console(quiet=True)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(L2TError, match="is no run: give a folder that"):
            inspect(folder, console)
    training(tmp_path / "scratch/seed-0", [[1.0]], meta=False)
    training(tmp_path / "fm-single/seed-0", [[1.0]], meta=False)
    with pytest.raises(L2TError, match=r"has learned what or where to transfer yet \(scratch, fm-single\)"):
        inspect(tmp_path, console)
    assert not (tmp_path / "inspect.md").exists()
    training(tmp_path / "l2t-ww/seed-0", [[1.0] * 4], final=[1.0] * 4)
    (tmp_path / "l2t-ww/seed-0/learned.json").write_text("{")
    with pytest.raises(L2TError, match=r"seed-0/learned\.json is damaged"):
        inspect(tmp_path, console)
    (tmp_path / "l2t-ww/seed-0/learned.json").write_text("{}")
    with pytest.raises(L2TError, match="is not what a training writes"):
        inspect(tmp_path, console)
