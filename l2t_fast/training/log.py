"""metrics.jsonl, a line an iteration and a line an epoch: written by a training, read without torch by who looks on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2t_fast.errors import L2TError
from l2t_fast.files import save_text, writing

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[float, float]  # an epoch, and an iteration in it
_NAMED = 3  # pairs that an error names
_READ_EVERY = 50  # iterations whose metrics are read back at a time


def read_metrics(path: Path, before: Place = (math.inf, 0)) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is left out.

    before: an (epoch, iteration), without which and what follows it they are wanted.

    Raises:
        L2TError: the file is missing, or another line is damaged, missing, there twice or not in its place.
    """
    if not path.is_file():
        raise L2TError(f"{path} is missing: train that part anew.")
    rows: list[dict[str, Any]] = []
    epoch = iteration = 0  # of the next line
    batches: int | None = None  # of every epoch
    first: dict[bool, dict[str, Any]] = {}  # of both kinds of lines the first one
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        place = [row.get("epoch"), row.get("iteration", 0)] if isinstance(row, dict) else [None]
        whole = isinstance(row, dict) and all(isinstance(n, int) and not isinstance(n, bool) for n in place)
        if whole and (row["epoch"], row.get("iteration", math.inf)) >= before:
            continue
        of_epoch = whole and "iteration" not in row
        if not whole or not _is_like(row, first.setdefault(of_epoch, row)):
            raise L2TError(f"{path}, line {number}, is damaged: put it back, or train that part anew.")
        if of_epoch and batches is None:
            batches = iteration
        if row["epoch"] != epoch or row.get("iteration", iteration) != iteration or (of_epoch and iteration != batches):
            raise L2TError(
                f"{path}, line {number}, is not what follows the line before it: put back what was there, or train "
                "that part anew."
            )
        epoch, iteration = (epoch + 1, 0) if of_epoch else (epoch, iteration + 1)
        rows.append(row)
    return rows


def _is_like(row: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether a line says what the first of its kind does, in numbers and lists of them; it may say more."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def length(value: Any) -> int | None:
        return len(value) if isinstance(value, list) else None

    return all(
        is_number(value) for each in row.values() for value in (each if isinstance(each, list) else [each])
    ) and all(name in row and length(row[name]) == length(value) for name, value in first.items())


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that sum up an epoch."""
    return [row for row in read_metrics(path) if "iteration" not in row]


class _Readback:
    """Metrics of several iterations on their way to the host."""

    def __init__(self, pending: Sequence[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        import torch

        self._rows = [row for row, _ in pending]
        stacked = {name: torch.stack([metrics[name] for _, metrics in pending]) for name in pending[0][1]}
        self.on_cuda = any(value.is_cuda for value in stacked.values())
        if self.on_cuda:
            host = {name: torch.empty_like(v, device="cpu", pin_memory=True) for name, v in stacked.items()}
            for name, value in stacked.items():
                host[name].copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(next(iter(stacked.values())).device))
            stacked = host
        self._values = stacked

    def rows(self) -> list[dict[str, Any]]:
        if self.on_cuda:
            self._arrived.synchronize()
        values = {name: value.tolist() for name, value in self._values.items()}
        return [{**row, **{name: values[name][i] for name in values}} for i, row in enumerate(self._rows)]


class Log:
    """metrics.jsonl: rows stay on the device until there are some, and are read while the device works on."""

    def __init__(
        self,
        path: Path,
        start: tuple[int, int],
        checkpoint: Path,
        pairs: Sequence[tuple[int, ...]],
        told: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Drops lines from `start` on: a killed run may have written more than its checkpoint holds.

        Args:
            start: (epoch, iteration) where the training goes on.
            checkpoint, pairs: what an error names, the last good state and the (source, m, n) that went wrong.
            told: gets the row of each iteration, once it is on the host and written.
        """
        self._path, self._checkpoint, self._pairs, self._told = path, checkpoint, pairs, told
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._reading: _Readback | None = None
        kept = read_metrics(path, start) if path.exists() else []
        last = kept[-1] if kept else {"epoch": -1}
        reached = (last["epoch"], last["iteration"] + 1) if "iteration" in last else (last["epoch"] + 1, 0)
        if reached != start:
            raise L2TError(
                f"{path} ends before epoch {start[0]}, iteration {start[1]}, where {checkpoint} goes on: put back what "
                "was there, or train that part anew."
            )
        save_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._epoch_rows = [row for row in kept if row["epoch"] == start[0]]

    def add(self, epoch: int, iteration: int, metrics: dict[str, Tensor], lr: float) -> None:
        """Takes the metrics of one iteration, on their device."""
        self._pending.append(({"epoch": epoch, "iteration": iteration, "lr": lr}, metrics))
        if len(self._pending) >= _READ_EVERY:
            self._finish()  # the rows before these, which have arrived long since
            self._reading, self._pending = _Readback(self._pending), []
            if not self._reading.on_cuda:
                self._finish()

    def flush(self) -> None:
        """Writes all rows; waits for the device."""
        self._finish()
        if self._pending:
            self._reading, self._pending = _Readback(self._pending), []
            self._finish()

    def _finish(self) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        rows = reading.rows()
        self._epoch_rows += rows
        self._append(rows)
        for row in rows:
            self._told(row)
            self._check_finite(row)

    def write(self, row: dict[str, Any]) -> None:
        """Writes the line of an epoch, which is over."""
        self._append([row])
        self._epoch_rows = []

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def sync(self) -> None:
        """What is written survives the machine: a checkpoint is never ahead of its log."""
        with writing(self._path), self._path.open("rb") as file:
            os.fsync(file.fileno())

    def summary(self, epoch: int) -> dict[str, Any]:
        """Means over the iterations of the epoch."""
        import torch

        self.flush()
        rows = self._epoch_rows
        means: dict[str, Any] = {}
        for name in rows[0]:
            if name not in ("epoch", "iteration", "pair_losses"):
                means[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64).mean(0).tolist()
        return {"epoch": epoch, **means}

    def _check_finite(self, row: dict[str, Any]) -> None:
        if not all(map(math.isfinite, row.get("pair_weights", ()))):
            raise L2TError(
                f"λ is not finite at epoch {row['epoch']}, iteration {row['iteration']}: the meta-gradient of the "
                f"iteration before was not, or a source's features are not; {what_is_kept(self._checkpoint)}; {ADVICE}."
            )
        for name in row:
            if (name != "loss" and not name.endswith("_loss")) or math.isfinite(row[name]):
                continue
            term = "the cross entropy" if name == "loss" else f"the {name.removesuffix('_loss')} loss"
            whose = ""
            if name == "matching_loss":
                terms = zip(self._pairs, row["pair_losses"], strict=True)
                bad = [str(tuple(pair)) for pair, loss in terms if not math.isfinite(loss)]
                more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
                whose = f" of pairs {', '.join(bad[:_NAMED])}{more} (source, m, n)"
            raise L2TError(
                f"{term}{whose} is {row[name]} at epoch {row['epoch']}, iteration {row['iteration']}: "
                f"{what_is_kept(self._checkpoint)}; {ADVICE}."
            )


ADVICE = "lower the learning rate or beta in a run of another --name"


def what_is_kept(checkpoint: Path) -> str:
    """Where a training that broke off can go on, for the error that says so."""
    return f"{checkpoint} holds the last good state" if checkpoint.exists() else "nothing was saved yet"
