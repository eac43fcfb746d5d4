"""What a long training holds: memory, open files and threads, epoch by epoch.

A process that holds more with every iteration ends in a crash after hours. `--epochs` epochs of digits with L2T-ww, in
batches so small that there are twenty-one iterations in each; checkpoints, validation and logs included.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.rows import Row, add_row_arguments, begin, say, write
from benchmarks.suites.training import Counter, learner, loaded
from l2t_fast import Engine
from l2t_fast.data.options import DataConfig
from l2t_fast.training.fit import Schedule, fit

BATCH = 20


class _Sampler(Counter):
    """Notes what the process holds after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def epoch(self, row: dict[str, Any]) -> None:
        self.rows.append({"kind": "held", "epoch": row["epoch"], "iterations": self.iterations, **held()})


def held() -> Row:
    """Bytes of this process in memory, its open files and its threads (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    count = {name: len(os.listdir(f"/proc/self/{folder}")) for name, folder in (("files", "fd"), ("threads", "task"))}
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), **count}


def held_rows(epochs: int, per_class: int | None, device: torch.device) -> Iterator[Row]:
    """A row an epoch."""
    case = replace(CASES["tiny"], batch=BATCH, target_width=0.0625)
    data = loaded(DataConfig("digits", classes=(5, 6, 7, 8, 9), per_class=per_class), device)
    target, made = learner("l2t-ww", case, data, None, device)
    engine = Engine(made, lr=0.01, meta_lr=1e-3, inner_steps=1, mode="eager")
    sampler = _Sampler()
    with tempfile.TemporaryDirectory() as folder:
        fit(Path(folder), engine, target, data, Schedule(epochs, BATCH, 0.01, seed=0), sampler)
    yield from sampler.rows


def show(row: Row) -> None:
    """One line of the table."""
    cells = [f"{row['resident_bytes'] / 1e6:.1f} MB", f"{row['files']} files", f"{row['threads']} threads"]
    say(f"epoch {row['epoch']}, {row['iterations']} iterations", cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--epochs", type=int, default=96)
    parser.add_argument("--per-class", type=int, help="training images (default: all)")


def run(arguments: argparse.Namespace) -> None:
    """One training."""
    device = begin("held", arguments)
    write(arguments.output, held_rows(arguments.epochs, arguments.per_class, device), show)
