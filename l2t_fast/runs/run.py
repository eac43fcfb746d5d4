"""One run: source networks, then methods x seeds on one target, a table and pictures, in one folder.

runs/NAME/config.json                       the settings, all of them
          source/                           the training of the source, where there was one
          METHOD/seed-K/                    a cell, as `cells.py` has it
          table.md, table.csv, ...          what came out
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from l2t_fast.data.images import load_data
from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError
from l2t_fast.reports.column import read_column
from l2t_fast.reports.table import write_tables
from l2t_fast.runs import build
from l2t_fast.runs.cell import train_cell, train_source
from l2t_fast.runs.progress import Display, StopSignal, TrainingWatch
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, TrainConfig
from l2t_fast.settings.stored import check_same, load_config, save_config


def run(config: TrainConfig, console: Console, complete: Callable[[TrainConfig], TrainConfig] = resolve) -> Path:
    """Trains what `config` asks for and returns the folder of the run.

    complete: fills in what a new run's settings leave out.

    Raises:
        Interrupted: stopped by the user, with everything saved.
        L2TError: bad settings, missing data, a folder that exists already, a training that diverged.
    """
    folder, config = _open(config, complete)
    seeds, methods = config.seeds or (), config.method or ()
    # Everything that can be wrong with the settings is found before the folder is made.
    data = load_data(config.data, seeds[0])
    device = build.find_device(config.device)
    sources = build.build_sources(config)
    folders = build.source_folders(config, folder)
    if folders:
        build.source_data(config)
    for name in methods:
        _, learner, start = build.make_learner(config, name, seeds[0], sources, data, device)
        build.check_data(build.make_engine(config, learner, 0, lambda text: None), config, data)
        line = build.describe(config, name, data, learner, start)
        console.print(f"{line}; {device}", highlight=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.json")
    console.print(f"folder of the run: [bold]{folder}[/]", highlight=False, soft_wrap=True)

    with Display(console) as display, StopSignal().listening(console) as stop:
        make_watch = functools.partial(TrainingWatch, display, stop)
        for s, of_source in enumerate(folders):
            if not (of_source / "source.pt").exists():
                train_source(of_source, config, s, device, make_watch)
        sources = build.build_sources(config, folders)
        for seed in seeds:
            data = load_data(config.data, seed)
            for name in methods:
                cell = folder / name / f"seed-{seed}"
                if not (cell / "result.json").exists():
                    train_cell(cell, config, name, seed, sources, data, device, make_watch)
    found = read_column(folder, config, {})
    for table in write_tables(folder, found.title, [found], methods):
        console.print(table)
    console.print(f"table, curves and pictures are in {folder}", highlight=False, soft_wrap=True)
    return folder


def _open(config: TrainConfig, complete: Callable[[TrainConfig], TrainConfig]) -> tuple[Path, TrainConfig]:
    """The folder of the run, and its complete settings."""
    if not config.resume:
        name = config.name or f"{config.data.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = config.runs / name
        if folder.exists():
            raise L2TError(
                f"the run folder {folder} exists already: give another --name, or go on with it by --resume."
            )
        return folder, complete(dataclasses.replace(config, name=name))
    if config.name is None:
        made = [path.parent for path in config.runs.glob("*/config.json")]
        if not made:
            raise L2TError(f"there is no run under {config.runs} to resume: start one without --resume.")
        folder = max(made, key=lambda path: (path / "config.json").stat().st_mtime)
    else:
        folder = config.runs / config.name
        if not folder.exists():
            raise L2TError(f"there is no run folder {folder} to resume: start it without --resume.")
    saved = load_config(folder / "config.json")
    check_same(config, saved, TrainConfig())
    # Where the data lie and what computes may have changed since.
    data = dataclasses.replace(saved.data, **_given(config.data, DataConfig(), ("data_root", "workers", "download")))
    optim = dataclasses.replace(saved.optim, **_given(config.optim, OptimConfig(), ("mode", "memory")))
    return folder, dataclasses.replace(saved, data=data, optim=optim, **_given(config, TrainConfig(), ("device",)))


def _given(config: Any, usual: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}
