"""What waiting costs where others work too: an iteration beside single-threaded processes that keep every core busy.

Threads that spin while they wait (`OMP_WAIT_POLICY=active`, what most builds of OpenMP do for a while) take the core
of those they wait for; `l2t-fast` lets them sleep (`passive`) unless told otherwise. Turn by turn, each in a process of
its own, since the policy is read when torch is loaded.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter

import torch

from benchmarks.cases import CASES
from benchmarks.rows import Row, add_row_arguments, begin, say, write
from l2t_fast import Engine

POLICIES = ("active", "passive")


def busy_rows(case: str, threads: int, iterations: int, rounds: int) -> Iterator[Row]:
    """A row for each policy and round."""
    start = multiprocessing.get_context("spawn")
    before = os.environ.get("OMP_WAIT_POLICY")
    neighbours = [start.Process(target=_work_alone, daemon=True) for _ in range(threads)]
    try:
        for neighbour in neighbours:
            neighbour.start()
        for i in range(rounds):
            for policy in POLICIES:
                os.environ["OMP_WAIT_POLICY"] = policy
                ours, theirs = start.Pipe(duplex=False)
                process = start.Process(target=_iterate, args=(theirs, case, threads, iterations), daemon=True)
                process.start()
                theirs.close()
                seconds = ours.recv()
                process.join()
                yield {
                    "kind": "busy",
                    "case": case,
                    "policy": policy,
                    "round": i,
                    "threads": threads,
                    "neighbours": len(neighbours),
                    "ms_median": 1e3 * median(seconds),
                    "ms": [round(1e3 * s, 1) for s in seconds],
                }
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()
        os.environ.pop("OMP_WAIT_POLICY")
        if before is not None:
            os.environ["OMP_WAIT_POLICY"] = before


def _work_alone() -> None:
    """One thread that is busy as long as there is a parent."""
    torch.set_num_threads(1)
    parent, x = multiprocessing.parent_process(), torch.randn(256, 256)
    while parent is not None and parent.is_alive():
        x = (x @ x).clamp(-1, 1)


def _iterate(connection: Connection, case: str, threads: int, iterations: int) -> None:
    """Sends the seconds of each iteration."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    engine = Engine(CASES[case].learner(cpu, torch.float32), mode="eager")
    x, y = CASES[case].images(0, cpu, torch.float32)
    engine.step(x, y)
    seconds: list[float] = []
    for _ in range(iterations):
        start = perf_counter()
        engine.step(x, y)
        seconds.append(perf_counter() - start)
    connection.send(seconds)


def show(row: Row) -> None:
    """One line of the table."""
    say(f"{row['case']}, waiting threads {row['policy']}", [f"{row['ms_median']:.0f} ms"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Each policy in turn."""
    begin("busy", arguments)
    cores = len(os.sched_getaffinity(0))
    write(arguments.output, busy_rows(arguments.case, cores, arguments.iterations, arguments.rounds), show)
