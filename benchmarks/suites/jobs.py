"""Trainings with one, two, ... side by side on one device: in processes, or by turns in one process.

Processes: a table of digits (`l2t-fast table`), all its cells anew for each number of jobs, the CPU threads divided
among them; the source is trained once, beforehand, and the processes' start counts. Tells `--jobs` what is faster.

With `--replicas R ...` instead: iterations a second of R engines of a case that take turns in one process, each on a
stream of its own on a GPU, behind a check that each ends where it ends alone: to the bit on a CPU, on a GPU as near as
one engine to itself. Tells `--replicas` what is faster.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case
from benchmarks.rows import Row, add_row_arguments, begin, say, write
from l2t_fast import Engine
from l2t_fast.runs.replicas import HandOver, side_by_side
from l2t_fast.settings.options import OptimConfig, TableConfig

_WARM_UP = 6  # iterations not timed; in the fourth a GPU captures


def job_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each number of jobs and round, turn by turn."""
    from rich.console import Console  # what is measured on a GPU does without

    from l2t_fast.runs import table

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


def replica_rows(case: Case, counts: Sequence[int], rounds: int, steps: int, device: torch.device) -> Iterator[Row]:
    """A row for each number of replicas and round, turn by turn."""
    precision = "tf32" if device.type == "cuda" else "fp32"
    batches = [case.images(i, device, torch.float32) for i in range(4)]

    def train(seed: int, start: Any, hand_over: HandOver) -> tuple[Tensor, Engine]:
        """(θ at the end, the engine): it goes on where `start` ended."""
        engine = start
        if engine is None:
            engine = Engine(
                case.learner(device, torch.float32, case.warm_state(device)),
                lr=0.01 * (seed + 1),
                inner_steps=case.inner_steps,
                precision=precision,
                mode="graph" if device.type == "cuda" else "eager",
                say=lambda text: None,
            )
        for i in range(_WARM_UP if start is None else steps):
            engine.step(*batches[i % len(batches)])
            hand_over()
        return torch.cat([p.detach().flatten() for p in engine.learner.target.parameters()]), engine

    def run(count: int, starts: Sequence[Any]) -> list[Any]:
        ends = side_by_side([partial(train, seed, start) for seed, start in enumerate(starts)], device)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return ends

    most = max(counts)
    alone = [train(seed, None, lambda: None)[0] for seed in range(most)]
    again = train(0, None, lambda: None)[0]
    noise = (again - alone[0]).norm() / alone[0].norm()  # 0 on a CPU
    engines: dict[int, list[Any]] = {}
    errors: dict[int, float] = {}
    for count in counts:
        ends = run(count, [None] * count)
        engines[count] = [engine for _, engine in ends]
        errors[count] = max(
            ((theta - wanted).norm() / wanted.norm()).item() for (theta, _), wanted in zip(ends, alone, strict=False)
        )
    for i in range(rounds):
        for count in counts:
            start = perf_counter()
            run(count, engines[count])
            seconds = perf_counter() - start
            yield {
                "kind": "replicas",
                "case": case.name,
                "batch": case.batch,
                "inner_steps": case.inner_steps,
                "precision": precision,
                "by": "engine",
                "replicas": count,
                "round": i,
                "iterations": count * steps,
                "seconds": seconds,
                "iterations_per_second": count * steps / seconds,
                "error": errors[count],
                "correct": errors[count] <= 2 * noise.item(),
            }


def show(row: Row) -> None:
    """One line of the table."""
    if row["kind"] == "replicas":
        right = [] if row["correct"] else ["INEXACT"]
        said = f"{row['case']}: {row['replicas']} by turns"
        say(said, [f"{row['iterations_per_second']:.2f} iterations a second", *right])
        return
    say(f"{row['jobs']} side by side, {row['threads']} threads each", [f"{row['trainings_per_minute']:.1f} a minute"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers to compare (default 1 2)")
    parser.add_argument("--methods", nargs="+", default=["scratch", "fm-one-to-one", "l2t-ww"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--replicas", type=int, nargs="+", help="numbers to compare, instead of jobs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["tiny"], help="of replicas (default tiny)")
    parser.add_argument("--steps", type=int, default=20, help="iterations of each replica and round (default 20)")


def run(arguments: argparse.Namespace) -> None:
    """One table for each number of jobs, or engines by turns for each number of replicas."""
    device = begin("jobs", arguments)
    if arguments.replicas:
        for case in (CASES[name] for name in arguments.cases):
            counts, rounds, steps = arguments.replicas, arguments.rounds, arguments.steps
            write(arguments.output, replica_rows(case, counts, rounds, steps, device), show)
        return
    write(arguments.output, job_rows(arguments, device), show)
