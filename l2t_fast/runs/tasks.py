"""What is to train: source networks and cells, as tasks that another process can be given."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.reports.column import read_result
from l2t_fast.runs.build import build_sources, source_folders
from l2t_fast.runs.cell import made_with, train_cell, train_source
from l2t_fast.runs.progress import MakeWatch
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
        if not self.done:
            train_source(self.folder, self.config, self.index, torch.device(self.device), make_watch)
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
        return (self.folder / "result.json").exists()

    @property
    def config_file(self) -> Path:
        return self.folder.parent.parent / "config.json"

    def run(self, make_watch: MakeWatch) -> str:
        if not self.done:
            data = _data(self.config.data, self.seed)
            networks = build_sources(self.config, self.sources)
            train_cell(
                self.folder, self.config, self.method, self.seed, networks, data, torch.device(self.device), make_watch
            )
        path = self.folder / "result.json"
        result = read_result(path)
        check_made(str(path), result.get("made", {}), {**made_with(self.config, self.method), "seed": str(self.seed)})
        return f"test {result['test_accuracy_last']:.1%} after {result['seconds']:.0f} s"


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
