"""Trainings a minute with one, two, ... side by side on one device.

A table of digits (`l2t-fast table`), all its cells anew for each number of jobs, the CPU threads divided among them;
the source is trained once, beforehand, and the processes' start counts. Tells `--jobs` what is faster.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from benchmarks.rows import Row, add_row_arguments, begin, say, write
from l2t_fast.runs import table
from l2t_fast.settings.options import OptimConfig, TableConfig


def job_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each number of jobs and round, turn by turn."""
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(file=(Path(folder) / "log").open("w"))

        def run(methods: list[str], jobs: int) -> float:
            config = TableConfig(
                name=f"jobs-{jobs}",  # a table keeps its number of threads
                runs=Path(folder),
                method=tuple(methods),
                seeds=tuple(range(arguments.seeds)),
                jobs=jobs,
                threads=max(1, cores // jobs),
                device="cuda" if device.type == "cuda" else "cpu",
                optim=OptimConfig(epochs=arguments.epochs),
            )
            start = perf_counter()
            table.run(config, quiet)
            return perf_counter() - start

        for jobs in arguments.jobs:
            run(["fm-single"], jobs)  # and with it the source
        trainings = len(arguments.methods) * arguments.seeds
        for i in range(arguments.rounds):
            for jobs in arguments.jobs:
                for cell in Path(folder).glob(f"jobs-{jobs}/digits-*/*/seed-*"):
                    shutil.rmtree(cell)
                seconds = run(arguments.methods, jobs)
                yield {
                    "kind": "side by side",
                    "dataset": "digits",
                    "jobs": jobs,
                    "threads": max(1, cores // jobs),
                    "round": i,
                    "trainings": trainings,
                    "seconds": seconds,
                    "trainings_per_minute": 60 * trainings / seconds,
                }


def show(row: Row) -> None:
    """One line of the table."""
    say(f"{row['jobs']} side by side, {row['threads']} threads each", [f"{row['trainings_per_minute']:.1f} a minute"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers to compare (default 1 2)")
    parser.add_argument("--methods", nargs="+", default=["scratch", "fm-one-to-one", "l2t-ww"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)


def run(arguments: argparse.Namespace) -> None:
    """One table for each number of jobs."""
    device = begin("jobs", arguments)
    write(arguments.output, job_rows(arguments, device), show)
