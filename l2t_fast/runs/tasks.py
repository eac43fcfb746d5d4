"""What is to train: source networks and cells, as tasks that another process can be given."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import Interrupted, L2TError
from l2t_fast.ranks import current
from l2t_fast.reports.column import read_result
from l2t_fast.runs.build import build_sources, find_device, source_folders
from l2t_fast.runs.cell import made_with, not_exported, train_cell, train_source
from l2t_fast.runs.progress import MakeWatch, RunWatch
from l2t_fast.runs.replicas import HandOver, side_by_side
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.state import check_made


@dataclass(frozen=True)
class SourceTask:
    """A source network to train."""

    folder: Path
    config: TrainConfig
    index: int
    device: str

    @property
    def title(self) -> str:
        return f"{self.config.data.dataset}, source {self.index + 1}"

    @property
    def done(self) -> bool:
        return (self.folder / "source.pt").exists()

    @property
    def config_file(self) -> Path:
        return self.folder.parent / "config.json"

    def run(self, make_watch: MakeWatch) -> str:
        if not current().first(lambda: self.done):
            train_source(self.folder, self.config, self.index, find_device(self.device), make_watch)
        return "trained"


@dataclass(frozen=True)
class CellTask:
    """A cell to train."""

    folder: Path
    config: TrainConfig
    method: str
    seed: int
    sources: tuple[Path, ...]
    device: str

    @property
    def title(self) -> str:
        return f"{self.config.name}, {self.method}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists() and not not_exported(self.folder, self.config)

    @property
    def config_file(self) -> Path:
        return self.folder.parent.parent / "config.json"

    def run(self, make_watch: MakeWatch, callbacks: Sequence[object] = ()) -> str:
        if not current().first(lambda: self.done):
            watch = make_watch(f"{self.method}, seed {self.seed}", self.config.optim.epochs or 0, 0)
            watch.preparing("reading the images")
            data = _data(self.config.data, self.seed)
            networks = build_sources(self.config, self.sources)
            device = find_device(self.device)
            train_cell(self.folder, self.config, self.method, self.seed, networks, data, device, watch, callbacks)
        path = self.folder / "result.json"
        result = current().first(lambda: read_result(path))
        check_made(str(path), result.get("made", {}), {**made_with(self.config, self.method), "seed": str(self.seed)})
        return f"test {result['test_accuracy_last']:.1%} after {result['seconds']:.0f} s"


@dataclass(frozen=True)
class Replicas:
    """Cells of one column that take turns in one process."""

    cells: tuple[CellTask, ...]

    @property
    def title(self) -> str:
        return f"{self.cells[0].title}, and {len(self.cells) - 1} beside it"

    @property
    def folder(self) -> Path:
        return self.cells[0].folder

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(cell.folder for cell in self.cells)

    @property
    def config_file(self) -> Path:
        return self.cells[0].config_file

    def run(self, make_watch: MakeWatch) -> str:
        """Raises what a cell raised, when all have ended: `Interrupted` before a bug before bad input."""

        def call(cell: CellTask, hand_over: HandOver) -> str:
            return cell.run(lambda *training: cast(RunWatch, _Handing(make_watch(*training), hand_over)))

        calls = [functools.partial(call, cell) for cell in self.cells]
        ends = side_by_side(calls, find_device(self.cells[0].device))
        errors = {cell: end for cell, end in zip(self.cells, ends, strict=True) if isinstance(end, BaseException)}
        said = [f"{cell.method}, seed {cell.seed}: {end}" for cell, end in zip(self.cells, ends, strict=True)]
        for kind in (Interrupted, BaseException):
            for error in errors.values():
                if isinstance(error, kind) and not isinstance(error, L2TError):
                    raise error
        if errors:
            raise L2TError("; ".join(words for cell, words in zip(self.cells, said, strict=True) if cell in errors))
        return "; ".join(said)


class _Handing:
    """A `RunWatch` that hands over after each iteration."""

    def __init__(self, watch: RunWatch, hand_over: HandOver) -> None:
        self._watch, self._hand_over = watch, hand_over

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
        self._watch.iteration(epoch, metrics)
        self._hand_over()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)


def replicated(cells: Sequence[CellTask], count: int) -> list[CellTask | Replicas]:
    """The cells as tasks: up to `count` of a column together, in the order given."""
    columns: dict[str | None, list[CellTask]] = {}
    for cell in cells:
        columns.setdefault(cell.config.name, []).append(cell)
    groups = [mine[i : i + count] for mine in columns.values() for i in range(0, len(mine), count)]
    groups.sort(key=lambda group: cells.index(group[0]))
    return [Replicas(tuple(group)) if len(group) > 1 else group[0] for group in groups]


def cells_of(task: CellTask | Replicas) -> tuple[CellTask, ...]:
    """What a task trains."""
    return task.cells if isinstance(task, Replicas) else (task,)


@functools.lru_cache(maxsize=1)
def _data(config: DataConfig, seed: int) -> Data:
    """Cells of one column and seed often come one after the other."""
    return load_data(config, seed)


def column_tasks(
    folder: Path, sources: Path, config: TrainConfig, methods: Sequence[str], device: torch.device
) -> tuple[list[SourceTask], list[CellTask]]:
    """What a column is made of: its sources, in folders under `sources`, then a seed of all methods at a time."""
    folders = tuple(source_folders(config, sources))
    return (
        [SourceTask(path, config, s, device.type) for s, path in enumerate(folders)],
        [
            CellTask(folder / method / f"seed-{seed}", config, method, seed, folders, device.type)
            for seed in config.seeds or ()
            for method in methods
        ],
    )
