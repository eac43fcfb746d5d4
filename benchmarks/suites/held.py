"""What long work holds: memory, open files, threads and processes.

A process that holds more with every iteration ends in a crash after hours. `--epochs` epochs of digits with L2T-ww, in
batches so small that there are twenty-one iterations in each; checkpoints, validation and logs included. The images
are in memory, or in files, which processes of their own read. And one worker of a table, as it begins each of as many
cells as there are epochs.
"""

import argparse
import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torchvision.utils import save_image

from benchmarks.cases import CASES
from benchmarks.rows import Row, add_row_arguments, begin, say, write
from benchmarks.suites.training import Counter, learner, loaded
from l2t_fast import Engine
from l2t_fast.data.images import FolderSet, ImageSet
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data
from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.runs.progress import Display, MakeWatch, StopSignal
from l2t_fast.runs.tasks import CellTask, column_tasks
from l2t_fast.runs.workers import work_off
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import OptimConfig, TableConfig
from l2t_fast.training.fit import Schedule, fit

BATCH = 20
WIDTH = 0.0625  # of the target
WORKERS = 2  # that read files


class _Sampler(Counter):
    """Notes what the process holds after each epoch."""

    def __init__(self, images: str) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._images = images

    def epoch(self, row: dict[str, Any]) -> None:
        at = {"images": self._images, "epoch": row["epoch"], "iterations": self.iterations}
        self.rows.append({"kind": "held", **at, **held()})


def held() -> Row:
    """Bytes of this process in memory, its open files, its threads and the processes that it has started (Linux with
    glibc). What is garbage, or freed and kept by malloc for later, isn't held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    count = {name: len(os.listdir(f"/proc/self/{folder}")) for name, folder in (("files", "fd"), ("threads", "task"))}
    started = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), **count, "processes": sum(map(len, started))}


def held_rows(epochs: int, per_class: int | None, device: torch.device, images: str = "in memory") -> Iterator[Row]:
    """A row an epoch; images: "in memory" or "in files"."""
    case = replace(CASES["tiny"], batch=BATCH, target_width=WIDTH)
    data = loaded(DataConfig("digits", classes=(5, 6, 7, 8, 9), per_class=per_class), device)
    sampler = _Sampler(images)
    with tempfile.TemporaryDirectory() as folder:
        if images == "in files":
            data = _in_files(Path(folder) / "images", data)
        target, made = learner("l2t-ww", case, data, None, device)
        engine = Engine(made, lr=0.01, meta_lr=1e-3, inner_steps=1, mode="eager")
        fit(Path(folder), engine, target, data, Schedule(epochs, BATCH, 0.01, seed=0), sampler)
    yield from sampler.rows


def _in_files(folder: Path, data: Data) -> Data:
    """The same images, each in a file."""

    def written(part: str) -> ImageSet:
        images: ImageSet = getattr(data, part)
        paths = []
        for x, y in images.eval_batches(1):
            path = folder / part / str(int(y)) / f"{len(paths)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(x, path, normalize=True)
            paths.append(str(path))
        side = images.image_shape[1]
        return FolderSet(images.labels, images.augment, paths=paths, size=side, workers=WORKERS)

    return replace(data, **{part: written(part) for part in ("train", "val", "test")})


@dataclass(frozen=True)
class _Noted(CellTask):
    """A cell of a table that notes what its worker holds when it begins."""

    def run(self, make_watch: MakeWatch) -> str:
        save_text(self.folder / "held.json", json.dumps(held()))
        return super().run(make_watch)


def worker_rows(cells: int, device: torch.device) -> Iterator[Row]:
    """A row a cell: what the one worker of a table holds that trains them all."""
    optim = OptimConfig(epochs=1, batch_size=25)
    table = TableConfig(method=("scratch",), seeds=tuple(range(cells)), target_width=(WIDTH,), optim=optim)
    ((name, config),) = column_configs(table).items()
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        column = Path(folder) / name
        _, tasks = column_tasks(column, column, config, ["scratch"], device)
        column.mkdir()
        (column / "config.json").touch()
        with Display(Console(file=nowhere)) as display:
            noted = [_Noted(**vars(task)) for task in tasks]
            for task, why in work_off(noted, 1, 1, display, StopSignal()):
                raise L2TError(f"{task.title}: {why}")
        for cell, task in enumerate(tasks):
            yield {"kind": "held", "by": "worker", "cell": cell, **json.loads((task.folder / "held.json").read_text())}


def show(row: Row) -> None:
    """One line of the table."""
    cells = [f"{row['resident_bytes'] / 1e6:.1f} MB", *(f"{row[k]} {k}" for k in ("files", "threads", "processes"))]
    if "cell" in row:
        say(f"worker, cell {row['cell']}", cells)
    else:
        say(f"images {row['images']}, epoch {row['epoch']}, {row['iterations']} iterations", cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--epochs", type=int, default=96)
    parser.add_argument("--per-class", type=int, help="training images (default: all)")


def run(arguments: argparse.Namespace) -> None:
    """Two trainings, and a worker."""
    device = begin("held", arguments)
    for images in ("in memory", "in files"):
        write(arguments.output, held_rows(arguments.epochs, arguments.per_class, device, images), show)
    write(arguments.output, worker_rows(arguments.epochs, device), show)
