"""Looks for faster blocks of the Triton kernels, and prints the best for kernels/matching/blocks.py.

The blocks of an operator move to the fastest of their neighbours with which it is as exact as the ATen formulas, until
none is faster over all cases.

    TRITON_INTERPRET=1 python -m benchmarks tune --device cpu --cases minute

goes through the same motions without a GPU; its times say nothing.
"""

import argparse
import math
import statistics
from concurrent.futures import wait
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter

import torch

from benchmarks.contenders.operators import (
    TOLERANCE,
    compile_ahead,
    compilers,
    contender,
    error_ratio,
    errors,
    formulas,
    install,
    random_problem,
)
from benchmarks.measure import timing
from benchmarks.measure.capture import own_stream, ready
from benchmarks.measure.rates import set_precision
from benchmarks.rows import Row, add_row_arguments, append, begin, unavailable
from benchmarks.suites.operators import add_operator_arguments
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten, blocks
from l2t_fast.kernels.matching.blocks import Blocks, Table

# Values that are tried, one at a time.
VALUES = {
    "positions": (32, 64, 128),
    "channels": (16, 32, 64, 128),
    "step": (32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}

Key = tuple[bool, str]  # (adjoint, arithmetic), as in a `Table`


def neighbours(chosen: Blocks) -> list[Blocks]:
    """Blocks that differ in one value."""
    return [
        replace(chosen, **{name: value})
        for name, values in VALUES.items()
        for value in values
        if value != getattr(chosen, name)
    ]


def compile_candidates(
    candidates: dict[Key, list[Blocks]], cases: list[str], table: Table, index: int, seconds: float
) -> dict[tuple[Key, Blocks], str]:
    """Compiles all for all cases; why not, of those that could not be compiled (too large for the GPU, as a rule)."""
    with compilers() as pool:
        futures = {
            pool.submit(compile_ahead, case, precision_of(key), operator_of(key), index, table | {key: config}): (
                key,
                config,
            )
            for key, configs_of_key in candidates.items()
            for config in configs_of_key
            for case in cases
        }
        done, not_done = wait(futures, timeout=seconds)
        pool.shutdown(wait=False, cancel_futures=True)
    failed = {futures[future]: "no time left to compile" for future in not_done}
    return failed | {futures[future]: str(error) for future in done if (error := future.exception())}


def operator_of(key: Key) -> str:
    """What the blocks are judged by."""
    return "adjoint" if key[0] else "gradient"


def precision_of(key: Key) -> str:
    """The precision whose products are the key's arithmetic."""
    return "fp32" if key[1] == "ieee" else key[1]


def trials(
    key: Key,
    candidates: list[Blocks],
    failed: dict[tuple[Key, Blocks], str],
    table: Table,
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    """A row a candidate: the operator's time in each case with these blocks, the others as in `table`."""
    arch, operator, precision = launch.device_properties(device)[0], operator_of(key), precision_of(key)
    set_precision(precision)
    rows: list[Row] = [{"kind": "tune", "key": key, "blocks": asdict(candidate), "ms": {}} for candidate in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        if (key, candidate) in failed:
            row["unavailable"] = failed[key, candidate]
    for case in arguments.cases:
        problem = random_problem(case, precision, device)
        exact = formulas(aten, problem.double(), operator)
        usual = errors(operator, formulas(aten, problem, operator), exact)
        contenders = {}
        for i, (row, candidate) in enumerate(zip(rows, candidates, strict=True)):
            if "unavailable" in row:
                continue
            install(arch, table | {key: candidate})
            try:
                one = ready(partial(contender, "triton", problem, operator), device)
            except Exception as error:  # one candidate's failure is its row
                row["unavailable"] = unavailable({}, error)["unavailable"]
                continue
            ratio = error_ratio(errors(operator, one.outputs, exact), usual)
            if ratio <= TOLERANCE:
                contenders[str(i)] = one
            else:
                row["unavailable"] = f"{case}: error {ratio:.2f} times ATen's"
        times = timing.milliseconds({name: one.timed for name, one in contenders.items()}, arguments.rounds, device)
        for name, t in times.items():
            rows[int(name)]["ms"][case] = statistics.median(t)
    install(arch, table)
    for row in rows:
        if "unavailable" not in row:
            row["ms_mean"] = statistics.geometric_mean(row["ms"].values())
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_operator_arguments(parser, ["imagenet", "cifar"])


def run(arguments: argparse.Namespace) -> None:
    """Moves the blocks of each operator to the fastest of their neighbours, until none is faster."""
    device = begin("tune", arguments)
    own_stream(device)
    start = perf_counter()
    arch, _ = launch.device_properties(device)
    table = dict(blocks.table(arch))
    tried: dict[Key, set[Blocks]] = {key: set() for key in table}
    for precision in arguments.precisions:
        arithmetic = "ieee" if precision == "fp32" else precision
        moving: list[Key] = [(adjoint, arithmetic) for adjoint in (False, True)]
        while moving and (left := arguments.limit - (perf_counter() - start)) > 0:
            candidates = {
                key: [table[key], *(c for c in neighbours(table[key]) if c not in tried[key])] for key in moving
            }
            cuda = device.type == "cuda"
            failed = compile_candidates(candidates, arguments.cases, table, device.index, left) if cuda else {}
            moving = []
            for key, configs_of_key in candidates.items():
                if perf_counter() - start > arguments.limit:
                    break
                tried[key].update(configs_of_key)
                rows = trials(key, configs_of_key, failed, table, arguments, device)
                for row in rows:
                    append(arguments.output, row)
                timed = [i for i, row in enumerate(rows) if "ms_mean" in row]
                best = min(timed, key=lambda i: rows[i]["ms_mean"], default=0)
                if best and rows[best]["ms_mean"] < 0.99 * rows[0].get("ms_mean", math.inf):
                    table[key] = configs_of_key[best]
                    moving.append(key)
                ms = {case: round(t, 4) for case, t in rows[best]["ms"].items()}
                print(f"{key}: {len(timed)} of {len(rows)} run; {table[key]}, {operator_of(key)} {ms} ms", flush=True)
    print("\n".join(f"    {key}: {config}," for key, config in table.items()))
