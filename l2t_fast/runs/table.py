"""A table: methods x targets x seeds, in one folder that the same command goes on with.

runs/NAME/table.json                      the settings, all of them
          sources/DATASET/source/         the trainings of sources, where there were any
          COLUMN/METHOD/seed-K/           a cell, as `cells.py` has it; COLUMN is DATASET-TARGET, or DATASET-TARGET-SIZE
          table.md, table.csv, ...        what came out
          sessions.jsonl                  a line a command that ran to its end: cells trained, and how long it took
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from l2t_fast.data.images import Data, load_data
from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError, UnfitError
from l2t_fast.files import save_text
from l2t_fast.methods import METHODS, find_method
from l2t_fast.reports.table import Problems, meta_methods, read_column, write_tables
from l2t_fast.runs import cell as cells
from l2t_fast.runs import workers
from l2t_fast.runs.progress import Display, StopSignal
from l2t_fast.settings.columns import columns
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import ELSEWHERE, check_same, load_config, load_table, save_config

# What a column that goes on may be given anew, and what the source that columns share does not depend on.
_ROWS = ("method", "seeds")
_OF_TARGETS = (
    "per_class",
    "classes",
    "split",
    "epochs",
    "meta_lr",
    "meta_weight_decay",
    "beta",
    "where",
    "inner_steps",
)


def run(config: TableConfig, console: Console) -> bool:
    """Trains the cells that are not done yet, `jobs` side by side, and writes the table; whether all of them are.

    A cell that failed, because its loss became infinite or its process was killed, is tried again the next time. The
    table has all columns, methods and seeds that its folder has, those of earlier commands included. Worker processes
    are spawned: a script calls this under `if __name__ == "__main__":`.

    Raises:
        Interrupted: stopped by the user, with everything saved.
        L2TError: bad settings, missing data, a folder of something else or in use, a source that cannot be trained.
    """
    for flag, value in (("jobs", config.jobs), ("threads", config.threads)):
        if value is not None and value < 1:
            raise L2TError(f"--{flag} {value} is too small: give at least 1.")
    folder, config = _open(config)
    runs = columns(config)
    device = cells.find_device(config.device)
    console.print(f"{len(runs)} x {len(config.method)} x {len(config.seeds)} cells, on {device}", highlight=False)
    for of in runs.values():
        _check_folder(folder, of, device)
    problems = {name: _check(of, console) for name, of in runs.items()}
    sources, trainings = _tasks(folder, runs, problems, device)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = 1 if device.type == "cuda" else max(1, min(cores // (config.threads or 1), len(trainings)))
    jobs = config.jobs or most
    threads = config.threads or max(1, cores // jobs)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        # The number of threads decides in which order sums are taken: a table keeps it.
        save_config(dataclasses.replace(config, threads=threads), folder / "table.json")
        for name, of in runs.items():
            _write_settings(folder, of)
            _write_problems(folder / name, of, problems[name])
        console.print(f"folder of the table: [bold]{folder}[/]; {jobs} side by side", highlight=False, soft_wrap=True)
        with Display(console) as display, StopSignal().listening(console) as stop:
            for task, why in workers.work_off([t for t in sources if not t.done], jobs, threads, display, stop):
                raise L2TError(f"{task.title}: {why}")
            waiting = [t for t in trainings if not t.done]
            start = perf_counter()
            failed = workers.work_off(waiting, jobs, threads, display, stop)
            session = {"cells": len(waiting), "seconds": round(perf_counter() - start, 1), "jobs": jobs}
            for cell, why in failed:
                problems[str(cell.config.name)].setdefault(cell.method, {})[str(cell.seed)] = why
        for name, of in runs.items():
            _write_problems(folder / name, of, problems[name])
        with (folder / "sessions.jsonl").open("a") as file:
            file.write(json.dumps({**session, "threads": threads, "device": device.type}) + "\n")
        _report(folder, console)
    return not failed


def _open(config: TableConfig) -> tuple[Path, TableConfig]:
    """The folder of the table, and its settings."""
    name = config.name or f"table-{'-'.join(config.dataset)}"
    folder, config = config.runs / name, dataclasses.replace(config, name=name)
    if not folder.exists() or not any(folder.iterdir()):
        return folder, config
    saved = load_table(folder / "table.json")
    if config.threads not in (None, saved.threads):
        raise L2TError(f"the table was made with --threads {saved.threads}, not {config.threads}: leave out --threads.")
    return folder, dataclasses.replace(config, threads=saved.threads)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuses a second command in the folder."""

    def occupied() -> bool:
        raise L2TError(f"another `l2t-fast table` works in {folder}: wait for it, or give another --name.")

    with workers.alone(folder, occupied):
        yield


def _check_folder(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """A column that is there already, and its source, were made with the same settings and files."""
    if config.optim.mode == "graph" and device.type != "cuda":
        raise L2TError(f"--mode graph needs a CUDA device, not {device}: leave it out.")
    column, of_source = folder / str(config.name), folder / "sources" / config.data.dataset
    for place, what, free in (
        (column, f"column {config.name}", _ROWS),
        (of_source, f"the source of {config.data.dataset}", (*_ROWS, *_OF_TARGETS)),
    ):
        if (place / "config.json").exists():
            saved = load_config(place / "config.json")
            ours = config if place == column else dataclasses.replace(config, target=saved.target)
            check_same(ours, saved, saved, what, (*ELSEWHERE, *free))
    if (column / "inputs.json").exists():
        inputs = json.loads((column / "inputs.json").read_text())
        for name, print_ in cells.fingerprints(config).items():
            if inputs.get(name, print_) != print_:
                raise L2TError(
                    f"column {config.name} was made with another --{name}: put that back, or give another --name."
                )


def _write_settings(folder: Path, config: TrainConfig) -> None:
    """config.json and inputs.json of a column, with all rows that it ever had, and of its source."""
    column = folder / str(config.name)
    places = [column]
    if cells.source_folders(config, column):
        places.append(folder / "sources" / config.data.dataset)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        path, full = place / "config.json", config
        if path.exists():
            saved = load_config(path)
            full = dataclasses.replace(
                config,
                method=_ordered([*(saved.method or ()), *(config.method or ())], list(METHODS)),
                seeds=tuple(sorted({*(saved.seeds or ()), *(config.seeds or ())})),
            )
        save_config(full, path)
        if place == column:
            save_text(column / "inputs.json", json.dumps(cells.fingerprints(full), indent=2) + "\n")


def _write_problems(column: Path, config: TrainConfig, found: Problems) -> None:
    """problems.json: those found now, and those of methods that this command does not have."""
    path = column / "problems.json"
    before: Problems = json.loads(path.read_text()) if path.exists() else {}
    others = {name: of for name, of in before.items() if name not in (config.method or ())}
    save_text(path, json.dumps(others | found, indent=2) + "\n")


def _ordered(names: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in order if name in names)


def _check(config: TrainConfig, console: Console) -> Problems:
    """Finds all that can be wrong before anything is trained; methods that do not fit the networks are left out."""
    methods, seeds = config.method or (), config.seeds or ()
    cpu = torch.device("cpu")
    data = load_data(config.data, seeds[0])
    sources = cells.build_sources(config)
    if cells.source_folders(config, Path()):
        cells.source_data(config)
    problems: Problems = {}
    for name in methods:
        optim = dataclasses.replace(config.optim, mode="eager")  # the device's own mode is not to be had here
        try:
            _, learner, start = cells.make_learner(config, name, seeds[0], sources, data, cpu)
            engine = cells.make_engine(dataclasses.replace(config, optim=optim), learner, 0, lambda text: None)
        except UnfitError as error:
            problems[name] = {str(seed): str(error) for seed in seeds}
            console.print(f"{config.name}: {name} is left out: {error}", highlight=False, soft_wrap=True, markup=False)
            continue
        cells.check_data(engine, config, data)
        console.print(cells.describe(config, name, data, learner, start), highlight=False, soft_wrap=True)
    if len(problems) == len(methods):
        raise L2TError(f"{config.name}: none of the methods can be had; {next(iter(problems[methods[0]].values()))}")
    return problems


@dataclass(frozen=True)
class _Source:
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

    def run(self, make_watch: cells.MakeWatch) -> str:
        if not self.done:
            cells.train_source(self.folder, self.config, self.index, torch.device(self.device), make_watch)
        return "trained"


@dataclass(frozen=True)
class _Training:
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

    def run(self, make_watch: cells.MakeWatch) -> str:
        if not self.done:
            data = _data(self.config.data, self.seed)
            networks = cells.build_sources(self.config, self.sources)
            cells.train_cell(
                self.folder, self.config, self.method, self.seed, networks, data, torch.device(self.device), make_watch
            )
        result = json.loads((self.folder / "result.json").read_text())
        return f"test {result['test_accuracy_last']:.1%} after {result['seconds']:.0f} s"


@functools.lru_cache(maxsize=1)
def _data(config: DataConfig, seed: int) -> Data:
    """Cells of one column and seed often come one after the other."""
    return load_data(config, seed)


def _tasks(
    folder: Path, runs: dict[str, TrainConfig], problems: dict[str, Problems], device: torch.device
) -> tuple[list[_Source], list[_Training]]:
    """What is to train: sources, one for all columns of a data set, and cells, a seed of all methods at a time."""
    sources: dict[Path, _Source] = {}
    trainings: list[_Training] = []
    for name, config in runs.items():
        folders = tuple(cells.source_folders(config, folder / "sources" / config.data.dataset))
        sources |= {path: _Source(path, config, s, device.type) for s, path in enumerate(folders)}
        trainings += [
            _Training(folder / name / method / f"seed-{seed}", config, method, seed, folders, device.type)
            for seed in config.seeds or ()
            for method in config.method or ()
            if method not in problems[name]
        ]
    # The long ones first, so that none of them is left alone at the end.
    trainings.sort(key=lambda t: (t.seed, not find_method(t.method).learns_weights))
    return list(sources.values()), trainings


def _report(folder: Path, console: Console) -> None:
    """Prints the table of all that the folder has, and writes it."""
    runs = [load_config(path) for path in sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_ctime)]
    methods = _ordered([name for of in runs for name in of.method or ()], list(METHODS))
    found = [
        read_column(folder / str(of.name), of, json.loads((folder / str(of.name) / "problems.json").read_text()))
        for of in runs
    ]
    title = found[0].title if len(found) == 1 else f"{folder.name}: accuracy on the test set (%)"
    for table in write_tables(folder, title, found, methods, meta_methods(methods)):
        console.print(table)
    console.print(f"table, numbers and pictures are in {folder}", highlight=False, soft_wrap=True)
