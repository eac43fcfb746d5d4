"""metrics.jsonl: what is written comes back, also from a file that a killed run left."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from l2t_fast.errors import L2TError
from l2t_fast.training.log import Log, read_epochs, read_metrics


def opened(path: Path, start: tuple[int, int] = (0, 0)) -> Log:
    return Log(path / "metrics.jsonl", start, path / "last.pt", [(0, 0, 1), (0, 1, 1)])


def test_rows_come_back_and_an_epoch_is_their_mean(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for i, loss in enumerate((1.0, 2.0, 4.5)):
        log.add(0, i, {"loss": torch.tensor(loss), "pair_losses": torch.tensor([loss, 0.0])}, lr=0.1)
    row = log.summary(0)
    assert row == {"epoch": 0, "lr": pytest.approx(0.1), "loss": 2.5}
    log.write({**row, "val_accuracy": 0.5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("iteration") for line in rows] == [0, 1, 2, None]
    assert rows[2] == {"epoch": 0, "iteration": 2, "lr": 0.1, "loss": 4.5, "pair_losses": [4.5, 0.0]}
    assert read_epochs(tmp_path / "metrics.jsonl") == [{**row, "val_accuracy": 0.5}]


def test_lines_later_than_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    lines = [{"epoch": e, "iteration": i, "loss": 10.0 * e + i} for e in range(2) for i in range(3)]
    lines.insert(3, {"epoch": 0, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 1, "it')
    log = opened(tmp_path, start=(1, 1))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines[:5]
    log.add(1, 1, {"loss": torch.tensor(20.0)}, lr=0.1)
    assert log.summary(1)["loss"] == 15.0  # of the line that was kept, and the new one


def test_what_is_not_finite_is_written_and_named(tmp_path: Path) -> None:
    log = opened(tmp_path)
    losses = {"matching_loss": torch.tensor(math.nan), "pair_losses": torch.tensor([1.0, math.nan])}
    log.add(0, 0, losses, lr=0.1)
    with pytest.raises(L2TError, match=r"matching loss of pairs \(0, 1, 1\) .* is nan .*nothing was saved yet"):
        log.flush()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["matching_loss"])


@pytest.mark.parametrize("line", ["", "{", "[1]", '{"loss": 1}', '{"epoch": "0"}', "\0"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 1}}\n')
    for read in (lambda: read_metrics(tmp_path / "metrics.jsonl"), lambda: opened(tmp_path)):
        with pytest.raises(L2TError, match=r"metrics\.jsonl, line 2, is damaged"):
            read()


def lines(*changes: tuple[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of two epochs of two iterations, with changes to some of them; None takes away a key."""
    found: list[dict[str, Any]] = []
    for epoch in range(2):
        found += [{"epoch": epoch, "iteration": i, "loss": 1.0, "pair_weights": [1.0, 2.0]} for i in range(2)]
        found.append({"epoch": epoch, "loss": 1.0, "pair_weights": [1.0, 2.0], "val_accuracy": 0.5})
    for number, change in changes:
        found[number] = {key: value for key, value in {**found[number], **change}.items() if value is not None}
    return found


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        (lines() + lines(), 7),
        (lines()[2:], 4),
        (lines()[:1] + lines()[2:], 5),
        (lines()[:2] + lines()[3:], 3),
        (lines()[::-1], 1),
        (lines((5, {"epoch": 10**30})), 6),
        (lines((0, {"epoch": -3})), 1),
        (lines((3, {"epoch": True})), 4),
        (lines((5, {"pair_weights": None})), 6),
        (lines((5, {"pair_weights": "ab"})), 6),
        (lines((5, {"pair_weights": [1.0]})), 6),
        (lines((5, {"pair_weights": [1.0, [2.0]]})), 6),
        (lines((4, {"loss": "1"})), 5),
        (lines((5, {"val_accuracy": None})), 6),
    ],
)
def test_lines_that_were_edited_are_named(tmp_path: Path, rows: list[dict[str, Any]], number: int) -> None:
    """Means and curves of what is left would be other ones, silently."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (lambda: read_metrics(path), lambda: opened(tmp_path, (2, 0))):
        with pytest.raises(
            L2TError, match=rf"metrics\.jsonl(, line {number}, is (damaged|not what)| ends before epoch 2)"
        ):
            read()


def test_later_versions_may_say_more(tmp_path: Path) -> None:
    rows = lines((3, {"seconds": 1.0}), (5, {"seconds": 1.0}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize("left", [0, 3, 4])
def test_a_log_that_ends_before_its_checkpoint_is_not_gone_on_with(tmp_path: Path, left: int) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines()[:left]))
    with pytest.raises(L2TError, match=r"metrics.jsonl ends before epoch 1, iteration 2, where .*last.pt goes on"):
        opened(tmp_path, (1, 2))


def test_three_pairs_are_named(tmp_path: Path) -> None:
    pairs = [(0, m, n) for m in range(4) for n in range(4)]
    log = Log(tmp_path / "metrics.jsonl", (0, 0), tmp_path / "last.pt", pairs)
    nan = torch.tensor(float("nan"))
    log.add(0, 0, {"loss": torch.ones(()), "matching_loss": nan, "pair_losses": nan.expand(16)}, 0.1)
    named = r"pairs \(0, 0, 0\), \(0, 0, 1\), \(0, 0, 2\) and 13 more \(source, m, n\) is nan"
    with pytest.raises(L2TError, match=named):
        log.flush()
