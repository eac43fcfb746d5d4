"""What is to train: source networks and cells, as tasks that another process can be given."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from l2t_fast.data.images import Data, load_data
from l2t_fast.data.options import DataConfig
from l2t_fast.methods import find_method
from l2t_fast.reports.column import Problems
from l2t_fast.runs.build import build_sources, source_folders
from l2t_fast.runs.cell import MakeWatch, train_cell, train_source
from l2t_fast.settings.options import TrainConfig


@dataclass(frozen=True)
class Source:
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

    def run(self, make_watch: MakeWatch) -> str:
        if not self.done:
            train_source(self.folder, self.config, self.index, torch.device(self.device), make_watch)
        return "trained"


@dataclass(frozen=True)
class Training:
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

    def run(self, make_watch: MakeWatch) -> str:
        if not self.done:
            data = _data(self.config.data, self.seed)
            networks = build_sources(self.config, self.sources)
            train_cell(
                self.folder, self.config, self.method, self.seed, networks, data, torch.device(self.device), make_watch
            )
        result = json.loads((self.folder / "result.json").read_text())
        return f"test {result['test_accuracy_last']:.1%} after {result['seconds']:.0f} s"


@functools.lru_cache(maxsize=1)
def _data(config: DataConfig, seed: int) -> Data:
    """Cells of one column and seed often come one after the other."""
    return load_data(config, seed)


def list_tasks(
    folder: Path, runs: dict[str, TrainConfig], problems: dict[str, Problems], device: torch.device
) -> tuple[list[Source], list[Training]]:
    """What is to train: sources, one for all columns of a data set, and cells, a seed of all methods at a time."""
    sources: dict[Path, Source] = {}
    trainings: list[Training] = []
    for name, config in runs.items():
        folders = tuple(source_folders(config, folder / "sources" / config.data.dataset))
        sources |= {path: Source(path, config, s, device.type) for s, path in enumerate(folders)}
        trainings += [
            Training(folder / name / method / f"seed-{seed}", config, method, seed, folders, device.type)
            for seed in config.seeds or ()
            for method in config.method or ()
            if method not in problems[name]
        ]
    # The long ones first, so that none of them is left alone at the end.
    trainings.sort(key=lambda t: (t.seed, not find_method(t.method).learns_weights))
    return list(sources.values()), trainings
