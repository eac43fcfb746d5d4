"""A table: methods x targets x seeds, in one folder that the same command goes on with.

runs/NAME/table.json                      the settings, all of them
          sources/DATASET/source/         the trainings of sources, where there were any
          COLUMN/METHOD/seed-K/           a cell, as `build.py` has it; COLUMN is DATASET-TARGET, or DATASET-TARGET-SIZE
          table.md, table.csv, ...        what came out
          sessions.jsonl                  a line a command that ran to its end: cells trained, and how long it took
"""

import dataclasses
import json
import os
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from l2t_fast.data.images import load_data
from l2t_fast.errors import L2TError, UnfitError
from l2t_fast.methods import METHODS
from l2t_fast.reports.column import Problems, read_column
from l2t_fast.reports.table import write_tables
from l2t_fast.runs import build, workers
from l2t_fast.runs.folder import check_column, only_command, open_table, ordered, write_problems, write_settings
from l2t_fast.runs.progress import Display, StopSignal
from l2t_fast.runs.tasks import list_tasks
from l2t_fast.settings.columns import columns
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, save_config


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
    folder, config = open_table(config)
    runs = columns(config)
    device = build.find_device(config.device)
    console.print(f"{len(runs)} x {len(config.method)} x {len(config.seeds)} cells, on {device}", highlight=False)
    for of in runs.values():
        check_column(folder, of, device)
    problems = {name: _check(of, console) for name, of in runs.items()}
    sources, trainings = list_tasks(folder, runs, problems, device)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = 1 if device.type == "cuda" else max(1, min(cores // (config.threads or 1), len(trainings)))
    jobs = config.jobs or most
    threads = config.threads or max(1, cores // jobs)
    folder.mkdir(parents=True, exist_ok=True)
    with only_command(folder):
        # The number of threads decides in which order sums are taken: a table keeps it.
        save_config(dataclasses.replace(config, threads=threads), folder / "table.json")
        for name, of in runs.items():
            write_settings(folder, of)
            write_problems(folder / name, of, problems[name])
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
            write_problems(folder / name, of, problems[name])
        with (folder / "sessions.jsonl").open("a") as file:
            file.write(json.dumps({**session, "threads": threads, "device": device.type}) + "\n")
        _report(folder, console)
    return not failed


def _check(config: TrainConfig, console: Console) -> Problems:
    """Finds all that can be wrong before anything is trained; methods that do not fit the networks are left out."""
    methods, seeds = config.method or (), config.seeds or ()
    cpu = torch.device("cpu")
    data = load_data(config.data, seeds[0])
    sources = build.build_sources(config)
    if build.source_folders(config, Path()):
        build.source_data(config)
    problems: Problems = {}
    for name in methods:
        optim = dataclasses.replace(config.optim, mode="eager")  # the device's own mode is not to be had here
        try:
            _, learner, start = build.make_learner(config, name, seeds[0], sources, data, cpu)
            engine = build.make_engine(dataclasses.replace(config, optim=optim), learner, 0, lambda text: None)
        except UnfitError as error:
            problems[name] = {str(seed): str(error) for seed in seeds}
            console.print(f"{config.name}: {name} is left out: {error}", highlight=False, soft_wrap=True, markup=False)
            continue
        build.check_data(engine, config, data)
        console.print(build.describe(config, name, data, learner, start), highlight=False, soft_wrap=True)
    if len(problems) == len(methods):
        raise L2TError(f"{config.name}: none of the methods can be had; {next(iter(problems[methods[0]].values()))}")
    return problems


def _report(folder: Path, console: Console) -> None:
    """Prints the table of all that the folder has, and writes it."""
    runs = [load_config(path) for path in sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_ctime)]
    methods = ordered([name for of in runs for name in of.method or ()], list(METHODS))
    found = [
        read_column(folder / str(of.name), of, json.loads((folder / str(of.name) / "problems.json").read_text()))
        for of in runs
    ]
    title = found[0].title if len(found) == 1 else f"{folder.name}: accuracy on the test set (%)"
    for table in write_tables(folder, title, found, methods):
        console.print(table)
    console.print(f"table, numbers and pictures are in {folder}", highlight=False, soft_wrap=True)
