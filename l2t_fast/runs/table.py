"""A table: methods x targets x seeds, in one folder that the same command goes on with.

runs/NAME/table.json                      the settings, all of them
          sources/DATASET/source/         the trainings of sources, where there were any
          COLUMN/METHOD/seed-K/           a cell, as `cell.py` has it; COLUMN is DATASET-TARGET, or DATASET-TARGET-SIZE
          table.md, table.csv, ...        what came out
          sessions.jsonl                  a line a command that ran to its end: cells trained, and how long it took
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from l2t_fast.errors import Interrupted, L2TError
from l2t_fast.files import check_there, writing
from l2t_fast.methods import find_method
from l2t_fast.ranks import refuse
from l2t_fast.reports.column import Problems, read_table
from l2t_fast.reports.table import write_tables
from l2t_fast.runs import workers
from l2t_fast.runs.folder import (
    check_column,
    only_command,
    open_table,
    shared_sources,
    write_problems,
    write_settings,
)
from l2t_fast.runs.launchers.chosen import cells_device, choose
from l2t_fast.runs.machine import note_machine
from l2t_fast.runs.preflight import list_skipped, preflight
from l2t_fast.runs.progress import Display, StopSignal
from l2t_fast.runs.tasks import CellTask, SourceTask, cells_of, column_tasks, replicated
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import check_flag
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import save_config


def run(config: TableConfig, console: Console) -> bool:
    """Trains the cells that are not done yet, `jobs` side by side, and writes the table; whether all of them are.

    A cell that failed, because its loss became infinite or its process was killed, is tried again the next time. The
    table has all columns, methods and seeds that its folder has, those of earlier commands included. Worker processes
    are spawned: a script calls this under `if __name__ == "__main__":`.

    Raises:
        Interrupted: stopped by the user, with everything saved.
        L2TError: bad settings, missing data, a folder of something else or in use, a source that cannot be trained; a
            launcher that cannot be had.
    """
    refuse("table")
    for flag in ("jobs", "threads", "replicas", "gpus-per-cell"):
        if (value := getattr(config, flag.replace("-", "_"))) is not None:
            check_flag(flag, value)
    folder, config = open_table(config)
    columns = column_configs(config)
    device = cells_device(config)
    console.print(f"{len(columns)} x {len(config.method)} x {len(config.seeds)} cells, on {device}", highlight=False)
    for column in columns.values():
        check_column(folder, column)
    problems = {name: _check(column, device, console) for name, column in columns.items()}
    sources, cells = _tasks(folder, columns, problems, device)
    launcher, jobs, threads = choose(config, folder, len(replicated(cells, config.replicas)), device)
    with only_command(folder, columns.values()):
        # The number of threads decides in which order sums are taken: a table keeps it.
        save_config(dataclasses.replace(config, threads=threads), folder / "table.json")
        note_machine(folder, device, threads=threads, jobs=jobs)
        for name, column in columns.items():
            write_settings(folder, column)
            list_skipped(folder / name, column)
            write_problems(folder / name, column, problems[name])
        named = Text.assemble("folder of the table: ", (str(folder), "bold"), f"; {jobs} side by side")
        console.print(named, soft_wrap=True)
        with Display(console) as display, StopSignal().listening(console) as stop:
            missing = [t for t in sources if not t.done]
            for source, why in workers.work_off(missing, jobs, threads, display, stop, launcher):
                raise L2TError(f"{source.title}: {why}")
            waiting = [t for t in cells if not t.done]
            start = perf_counter()
            try:
                tasks = replicated(waiting, config.replicas)
                failed = workers.work_off(tasks, jobs, threads, display, stop, launcher)
            except Interrupted:
                _report(folder, console)  # of what there is
                raise
            session: dict[str, Any] = {"cells": len(waiting), "seconds": round(perf_counter() - start, 1), "jobs": jobs}
            session |= {"threads": threads, "device": device.type, "launcher": config.launcher}
            for cell, why in ((cell, why) for task, why in failed for cell in cells_of(task) if not cell.done):
                problems[str(cell.config.name)].setdefault(cell.method, {})[str(cell.seed)] = why
        check_there(folder / "table.json")
        for name, column in columns.items():
            write_problems(folder / name, column, problems[name])
        sessions = folder / "sessions.jsonl"
        with writing(sessions), sessions.open("a") as file:
            file.write(json.dumps(session) + "\n")
        _report(folder, console)
    return not failed


def _check(config: TrainConfig, device: torch.device, console: Console) -> Problems:
    """The preflight of one column; methods that do not suit its networks are left out, but not all of them."""
    methods, seeds = config.method or (), config.seeds or ()
    unfit = preflight(config, device, console)
    for method, error in unfit.items():
        console.print(f"{config.name}: {method} is left out: {error}", highlight=False, soft_wrap=True, markup=False)
    if len(unfit) == len(methods):
        raise L2TError(f"{config.name}: none of the methods can be had; {unfit[methods[0]]}")
    return {method: {str(seed): str(error) for seed in seeds} for method, error in unfit.items()}


def _tasks(
    folder: Path, columns: Mapping[str, TrainConfig], problems: Mapping[str, Problems], device: torch.device
) -> tuple[list[SourceTask], list[CellTask]]:
    """What is to train: sources, one for all columns of a data set, and cells, a seed of all columns at a time."""
    sources: dict[Path, SourceTask] = {}
    cells: list[CellTask] = []
    for name, config in columns.items():
        methods = [method for method in config.method or () if method not in problems[name]]
        before, then = column_tasks(folder / name, shared_sources(folder, config), config, methods, device)
        sources |= {task.folder: task for task in before}
        cells += then
    # The long ones first, so that none of them is left alone at the end.
    cells.sort(key=lambda task: (task.seed, not find_method(task.method).learns_weights))
    return list(sources.values()), cells


def _report(folder: Path, console: Console) -> None:
    """Prints the table of all that the folder has, and writes it."""
    title, columns, methods = read_table(folder)
    for table in write_tables(folder, title, columns, methods):
        console.print(table)
    console.print(f"table, numbers and pictures are in {folder}", highlight=False, soft_wrap=True, markup=False)
