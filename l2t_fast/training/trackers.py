"""Who is told of a training beside the terminal: callbacks, loggers as Lightning has them, CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.files import save_text, writing
from l2t_fast.training.log import read_metrics
from l2t_fast.training.watch import Callback, Training


def scalars(row: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, float]:
    """The numbers of a row, those of the pairs as "pair_weights/layer2 → features.6"."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            found |= {f"{name}/{pair}": number for pair, number in zip(pairs, value, strict=True)}
        else:
            found[name] = value
    return found


def as_callback(tracker: object) -> Callback:
    """The callback itself, or one that tells a logger.

    Raises:
        L2TError: it is neither.
    """
    if isinstance(tracker, Callback):
        return tracker
    if callable(getattr(tracker, "log_metrics", None)):
        return ToLogger(tracker)
    raise L2TError(
        f"{type(tracker).__name__} cannot be told of a training: give a `Callback` of l2t_fast.training.watch, or an "
        "object with `log_metrics(metrics, step)`."
    )


class Together(Callback):
    """Tells several."""

    def __init__(self, trackers: Iterable[object]) -> None:
        self._each = [as_callback(tracker) for tracker in trackers]

    def on_start(self, training: Training) -> None:
        for each in self._each:
            each.on_start(training)

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        for each in self._each:
            each.on_iteration(engine, epoch, iteration, metrics)

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        for each in self._each:
            each.on_epoch(row)

    def on_end(self) -> None:
        for each in self._each:
            each.on_end()


class ToLogger(Callback):
    """Tells a logger with `log_metrics`, and where it has them `log_hyperparams` and `save`.

    Of several trainings each has its title before the names. The step counts iterations over all epochs.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def on_start(self, training: Training) -> None:
        self._training, self._prefix = training, f"{training.title}/" if training.title else ""
        if hasattr(self._logger, "log_hyperparams"):
            self._logger.log_hyperparams({name.removeprefix("--"): value for name, value in training.settings.items()})

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        self._tell("", {**metrics, "epoch": epoch}, self._training.step(epoch, iteration))

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self._tell("epoch/", row, self._training.step(row["epoch"] + 1, -1))  # its last iteration
        if hasattr(self._logger, "save"):
            self._logger.save()

    def _tell(self, kind: str, row: Mapping[str, Any], step: int) -> None:
        numbers = scalars(row, self._training.pairs)
        self._logger.log_metrics({f"{self._prefix}{kind}{name}": v for name, v in numbers.items()}, step=step)


class ToCsv(Callback):
    """iterations.csv and epochs.csv, beside metrics.jsonl and with the same rows."""

    def on_start(self, training: Training) -> None:
        self._pairs = training.pairs
        self._files = {name: training.folder / f"{name}.csv" for name in ("iterations", "epochs")}
        self._waiting: dict[str, list[Mapping[str, Any]]] = {name: [] for name in self._files}
        for path in self._files.values():
            save_text(path, "")
        for row in read_metrics(training.folder / "metrics.jsonl"):  # of before, where it goes on
            self._waiting["iterations" if "iteration" in row else "epochs"].append(row)
        self._write()

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        self._waiting["iterations"].append({"epoch": epoch, "iteration": iteration, **metrics})

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self._waiting["epochs"].append(row)
        self._write()

    def on_end(self) -> None:
        self._write()

    def _write(self) -> None:
        for name, path in self._files.items():
            rows, self._waiting[name] = [scalars(row, self._pairs) for row in self._waiting[name]], []
            if rows:
                _append(path, rows)


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with writing(path), path.open("a", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if not file.tell():
            lines.writeheader()
        lines.writerows(rows)
