"""Callbacks, loggers and CSV files: told the rows of metrics.jsonl, and nothing is changed by them."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l2t_fast import Engine, L2TError
from l2t_fast.errors import Interrupted
from l2t_fast.training.fit import fit
from l2t_fast.training.log import read_metrics
from l2t_fast.training.trackers import ToCsv
from l2t_fast.training.watch import Callback, Training
from tests.training.test_fit import DATA, SCHEDULE, Stop, assert_same, training


class Kept(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.starts: list[Training] = []
        self.ends = 0

    def on_start(self, training: Training) -> None:
        self.starts.append(training)

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        assert engine is self.starts[-1].engine
        self.rows.append({"epoch": epoch, "iteration": iteration, **metrics})

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def on_end(self) -> None:
        self.ends += 1


class Logger:
    """As those of Lightning."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.settings |= params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.told.append((step, metrics))


@pytest.mark.core
def test_a_callback_is_told_every_row_and_changes_nothing(tmp_path: Path) -> None:
    engine, target = training()
    alone = fit(tmp_path / "alone", engine, target, DATA, SCHEDULE, Stop())
    watched, its_target = training()
    kept = Kept()
    made = {"--lr": "0.05"}
    result = fit(tmp_path / "run", watched, its_target, DATA, SCHEDULE, Stop(), made, [kept, Logger(), ToCsv()], "x")
    assert kept.rows == read_metrics(tmp_path / "run/metrics.jsonl")
    assert_same({**result, "seconds": 0}, {**alone, "seconds": 0})
    assert_same(watched.state_dict(), engine.state_dict())
    (start,) = kept.starts
    assert (start.title, start.epoch, start.iteration, start.epochs, start.batches) == ("x", 0, 0, 3, 4)
    assert start.pairs == ["2 → 2", "2 → 5", "5 → 2", "5 → 5"]
    assert start.settings == made
    assert kept.ends == 1


@pytest.mark.core
def test_metrics_are_not_asked_for_while_an_epoch_runs(tmp_path: Path) -> None:
    """Asking would make the engine wait for the device, each time."""
    kept, seen = Kept(), []

    class Looks(Stop):
        def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
            seen.append(len(kept.rows))

    engine, target = training()
    fit(tmp_path, engine, target, DATA, SCHEDULE, Looks(), callbacks=[kept])
    assert seen == [0] * 4 + [5] * 4 + [10] * 4  # four iterations and their epoch at a time


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_files_have_the_rows_whatever_happened_between(tmp_path: Path) -> None:
    """Stopped twice, and told of by CSV only when it went on."""
    engine, target = training()
    fit(tmp_path / "whole", engine, target, DATA, SCHEDULE, Stop(), callbacks=[ToCsv()])
    for after, callbacks in ((6, []), (2, [ToCsv()])):
        stopped, its_target = training()
        with pytest.raises(Interrupted):
            fit(tmp_path / "parts", stopped, its_target, DATA, SCHEDULE, Stop(after), callbacks=callbacks)
    resumed, its_target = training()
    fit(tmp_path / "parts", resumed, its_target, DATA, SCHEDULE, Stop(), callbacks=[ToCsv()])
    assert_same(resumed.state_dict(), engine.state_dict())
    for name in ("iterations.csv", "epochs.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    rows = read_metrics(tmp_path / "whole/metrics.jsonl")
    found = lines(tmp_path / "whole/iterations.csv")
    assert [float(line["loss"]) for line in found] == [row["loss"] for row in rows if "iteration" in row]
    assert float(found[5]["pair_weights/2 → 5"]) == [row for row in rows if "iteration" in row][5]["pair_weights"][1]
    assert [float(line["val_accuracy"]) for line in lines(tmp_path / "whole/epochs.csv")] == [
        row["val_accuracy"] for row in rows if "iteration" not in row
    ]


def test_a_logger_is_told_numbers_by_name_and_step(tmp_path: Path) -> None:
    logger = Logger()
    engine, target = training()
    fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(), {"--lr": "0.05"}, [logger], "l2t-ww, seed 0")
    assert logger.settings == {"lr": "0.05"}
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step, _ in logger.told] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11]
    assert logger.told[1][1]["l2t-ww, seed 0/loss"] == rows[1]["loss"]
    assert logger.told[4][1]["l2t-ww, seed 0/epoch/pair_weights/5 → 2"] == rows[4]["pair_weights"][2]
    assert all(isinstance(value, float | int) for _, metrics in logger.told for value in metrics.values())


def test_a_logger_of_lightning(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    engine, target = training()
    logger = loggers.CSVLogger(tmp_path, name="log", version=0)
    fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(), {"--lr": "0.05"}, [logger])
    found = lines(tmp_path / "log/version_0/metrics.csv")
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "iteration" in row]
    assert [float(line["loss"]) for line in found if line["loss"]] == losses


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    engine, target = training()
    with pytest.raises(L2TError, match=r"dict cannot be told of a training: give a `Callback` of"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(), callbacks=[{}])


def test_a_callback_hears_of_a_training_that_fails(tmp_path: Path) -> None:
    class Spoil(Stop):
        def evaluating(self, part: str) -> None:
            target.state_dict()["1.running_var"].fill_(torch.inf)

    engine, target = training()
    kept = Kept()
    with pytest.raises(L2TError, match="is not finite"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Spoil(), callbacks=[kept])
    assert kept.ends == 1
