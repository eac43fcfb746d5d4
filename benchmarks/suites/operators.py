"""Times the matching operators, beside PyTorch's own ways to the same: benchmarks/contenders/operators.py.

Every time stands behind a check against float64 of the very CUDA graph that is timed, and beside the time that memory
and arithmetic need at least, at the rates measured in the same run. Ends with an error where a Triton kernel has run
out of registers.

    TRITON_INTERPRET=1 python -m benchmarks operators --device cpu --cases minute

goes through the same motions without a GPU; its times say nothing.

    python -m benchmarks operators --plan

counts instead, on any machine: products done and at least, launches, memory (measure/plan.py).
"""

import argparse
import gc
import itertools
import math
import os
from concurrent.futures import wait
from functools import partial
from time import perf_counter
from typing import Any
from unittest import mock

import torch

from benchmarks.contenders.operators import (
    OUTPUTS,
    PRECISIONS,
    compile_ahead,
    compilers,
    contender,
    error_ratio,
    errors,
    formulas,
    is_correct,
    random_problem,
)
from benchmarks.measure import floors, timing
from benchmarks.measure.capture import Call, Ready, launches, own_stream, ready, size
from benchmarks.measure.plan import plan
from benchmarks.measure.rates import DTYPES, device_rates, rates_row, set_precision
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, add_row_arguments, append, begin, say, unavailable
from benchmarks.shapes import MATCHING_SHAPES
from benchmarks.suites.aot import ASIDE
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten

COMPILED = ("gradient", "adjoint")


def operator_rows(
    case: str,
    precision: str,
    operator: str,
    implementations: dict[str, str],
    rates: dict[str, float],
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """A row an implementation; `implementations` maps each to why it is not to be had, or to nothing."""
    set_precision(precision)
    problem = random_problem(case, precision, device)
    exact = formulas(aten, problem.double(), operator)
    contenders: dict[str, Ready] = {}
    rows: dict[str, Row] = {}
    for name, missing in implementations.items():
        row = {"kind": "operator", "case": case, "precision": precision, "operator": operator, "by": name}
        rows[name] = unavailable(row, missing) if missing else row
        if not missing:
            try:
                contenders[name] = ready(partial(contender, name, problem, operator), device)
            except Exception as error:  # one contender's failure is its row
                rows[name] = unavailable(row, error)
    error_of = {name: errors(operator, one.outputs, exact) for name, one in contenders.items()}
    with Telemetry(device).watch() as telemetry:
        times = timing.milliseconds({name: one.timed for name, one in contenders.items()}, rounds, device)
    pairs = list(zip(problem.source_of, problem.target_of, strict=True))
    work = floors.matching(operator, *MATCHING_SHAPES[case], pairs, DTYPES[precision].itemsize)
    for name, one in contenders.items():
        ratio = error_ratio(error_of[name], error_of["aten"]) if "aten" in error_of else math.nan
        correct = "aten" in error_of and is_correct(precision, error_of[name], error_of["aten"])
        summary = timing.summary(times[name])
        rows[name] |= {
            "correct": correct,
            "error": error_of[name],
            "error_over_aten": ratio,
            **summary,
            "captured": one.captured,
            **floors.floor(work, rates, precision, summary["ms_median"]),
            **{
                f"{field}_over_{other}": value
                for other in ("eager", "compiled", "aten")
                if correct and other in times and other != name
                for field, value in timing.speedup(times[other], times[name]).items()
            },
            "memory_over_T": one.memory / size([problem.targets]) if device.type == "cuda" else None,
            "launches": launches(one.call) if device.type == "cuda" else None,
            "spills": spills(one.call) if name == "triton" else None,
            "first_call_seconds": one.first_seconds,
            **telemetry,
        }
    return list(rows.values())


def spills(call: Call) -> int:
    """Bytes of a thread that a kernel of the call spills at most, by the rule of `aot`; 0 in the interpreter."""
    kernels = []

    def record(*arguments: Any, **options: Any) -> None:
        kernels.append(launched(*arguments, **options))

    launched = launch.launch
    with mock.patch.object(launch, "launch", record):
        call()
    spilled = [(kernel.n_regs, 4 * kernel.n_spills) for kernel in kernels if hasattr(kernel, "n_spills")]
    return max((size for registers, size in spilled if size > (ASIDE if registers < 255 else 0)), default=0)


SHOWN = {  # of what is shown: title, field, format
    "ms": ("ms_median", ".4f"),
    "floor": ("floor_ms", ".4f"),
    "of floor": ("floor_fraction", ".0%"),
    "x eager": ("speedup_over_eager", ".2f"),
    "x compiled": ("speedup_over_compiled", ".2f"),
    "error/ATen": ("error_over_aten", ".2f"),
    "memory/T": ("memory_over_T", ".2f"),
    "launches": ("launches", "d"),
}


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} {row['precision']} {row['operator']} {row['by']}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    cells = ["-" if row.get(name) is None else format(row[name], form) for name, form in SHOWN.values()]
    complaints = [*([] if row["correct"] else ["inexact"]), *([f"spills {row['spills']}"] if row["spills"] else [])]
    return say(title, [*cells, *complaints])


def add_operator_arguments(parser: argparse.ArgumentParser, cases: list[str]) -> None:
    """Options of both `operators` and `tune`; `cases` by default."""
    parser.add_argument(
        "--cases", nargs="+", choices=MATCHING_SHAPES, default=cases, help=f"default: {' '.join(cases)}"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timed turns of each contender (default 30)")
    parser.add_argument("--limit", type=float, default=280, help="seconds after which nothing new begins (default 280)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_operator_arguments(parser, ["imagenet", "cifar", "four-source"])
    parser.add_argument(
        "--compile-seconds", type=float, default=90, help="after which torch.compile begins no more (default 90)"
    )
    parser.add_argument("--plan", action="store_true", help="count what the Triton path would do; nothing is timed")
    parser.add_argument("--no-compile", dest="compile_seconds", action="store_const", const=0, help="no torch.compile")


def show_plan(arguments: argparse.Namespace) -> None:
    """A line, and a row, for each case, precision of tensor cores and operator."""
    say("of the Triton path, a count", ["GFLOP", "least", "done/least", "Gram", "launches", "peak MB"])
    for case, precision, operator in itertools.product(arguments.cases, arguments.precisions, OUTPUTS):
        if precision != "fp32":  # in which ATen computes
            row = plan(case, precision, operator)
            append(arguments.output, row)
            flops = [
                row["flops"] / 1e9,
                row["flops_least"] / 1e9,
                row["done_over_least"],
                (row["flops_with_gram"] or 0) / 1e9,
            ]
            numbers = [
                *(f"{x:.2f}" if x else "-" for x in flops),
                str(row["launches"]),
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
            say(f"{case} {precision} {operator}", numbers)


def run(arguments: argparse.Namespace) -> int:
    """All cases, precisions, operators and implementations; whether a Triton kernel spills."""
    device = begin("operators", arguments)
    if arguments.plan:
        show_plan(arguments)
        return 0
    own_stream(device)
    start = perf_counter()
    rates = device_rates(arguments.precisions, device)
    append(arguments.output, rates_row(rates))
    work = [(case, p, operator) for p in arguments.precisions for case in arguments.cases for operator in OUTPUTS]
    # The case of many pairs takes longest: it comes last, where it may be cut off.
    work.sort(key=lambda job: job[0] == "four-source")
    if device.type == "cuda":
        with compilers() as pool:
            wait([pool.submit(compile_ahead, *job, device.index, None) for job in work])
        say(f"compiled the kernels in {perf_counter() - start:.0f} s")
    triton_runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    compile_left, spilled = arguments.compile_seconds, False
    say("", list(SHOWN))
    for case, precision, operator in work:
        if perf_counter() - start > arguments.limit:
            say(f"stopped after {arguments.limit:.0f} s")
            break
        if operator not in COMPILED:
            not_compiled = "only gradient and adjoint are compiled"
        else:
            not_compiled = "" if compile_left > 0 else "torch.compile is off, or its time is used up"
        no_triton = "" if triton_runs else "the Triton kernels need a GPU, or TRITON_INTERPRET=1"
        implementations = {"triton": no_triton, "aten": "", "eager": "", "compiled": not_compiled}
        for row in operator_rows(case, precision, operator, implementations, rates, arguments.rounds, device):
            if row["by"] == "compiled":
                compile_left -= row.get("first_call_seconds", 0.0)
            spilled |= bool(row.get("spills"))
            append(arguments.output, row)
            show(row)
        gc.collect()  # autograd's graphs
    return spilled
