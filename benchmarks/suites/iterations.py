"""Times whole iterations of the reference, the official code and the engine: benchmarks/contenders/ways.py.

Every contender's meta-gradient, taken from a step like the one that is timed, is first compared with float64 on
several batches (benchmarks/contenders/judge.py). A contender that fails is timed, but gets no speedup.
"""

import argparse
import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, add_case_arguments, chosen_cases
from benchmarks.contenders.judge import EXACT, Judge, first_algorithms, gradient_error
from benchmarks.contenders.libraries import higher_meta_gradient, torchopt_meta_gradient
from benchmarks.contenders.ways import (
    BASELINES,
    CUDA_WARM_UP,
    MODES,
    PRECISIONS,
    REFERENCE,
    Contender,
    Gradient,
    Way,
    contender,
    ways_of,
)
from benchmarks.measure import floors, timing
from benchmarks.measure.rates import device_rates, rates_row
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, add_row_arguments, append, begin, contender_name, say, unavailable, write
from l2t_fast import Engine
from l2t_fast.choices import Mode
from l2t_fast.engine.counts import count

BY = ("reference", "official", "engine")
SWEEP_BATCH = (0.5, 2)  # of the case's own
SWEEP_ROUNDS = 3
REPEAT = 2  # iterations in a row that a turn on a GPU times
ENERGY_SECONDS = 1.0  # that joules are counted for


def iteration_rows(
    case: Case,
    ways: Sequence[Way],
    rates: dict[str, float],
    rounds: int,
    device: torch.device,
    judge: Judge,
    checkout: Path | None = None,
) -> Iterator[Row]:
    """A row for each way, with its speedup over what came before it of the reference and the official code.

    On a CPU all take turns. On a GPU one comes after the other, as their memory would not fit together.
    """
    telemetry = Telemetry(device)
    x, y = case.images(0, device, torch.float32)
    baselines: dict[str, list[float]] = {}  # times of those that are correct
    for group in [ways] if device.type == "cpu" else [[way] for way in ways]:
        ready: list[Contender] = []
        calls: dict[Way, Callable[[], Any]] = {}
        rows: dict[Way, Row] = {}
        for way in group:
            row: Row = {"kind": "iteration", "case": case.name, "batch": case.batch, "inner_steps": case.inner_steps}
            row |= asdict(way)
            try:
                row |= judge.verdict(way, checkout)
                before = _reserved(device)
                one = contender(way, case, judge.state, device, False, checkout)
                ready.append(one)
                if way.by == "engine" and way.mode != "eager":
                    found = judge.replay(way, one, case)
                    row |= found | {"correct": row["correct"] and found["correct"]}
                call = functools.partial(one.step, x, y)
                rows[way] = row | _memory(way, call, before, device)
                calls[way] = call
            except Exception as error:  # one contender's failure is its row
                yield unavailable(row, error)
            finally:
                one = call = None  # so that nothing but `ready` and `calls` keeps them
        by_name = {str(way): call for way, call in calls.items()}
        times = timing.milliseconds(by_name, rounds, device, cold=False, repeat=REPEAT)
        for way, row in rows.items():
            mine = times[str(way)]
            # The official code that was right in float32 is the same code in TF32.
            if way in BASELINES and (row["correct"] or "official" in baselines):
                baselines[BASELINES[way]] = mine
        for way, row in rows.items():
            mine = times[str(way)]
            row |= timing.summary(mine) | {"images_per_second": 1e3 * case.batch / statistics.median(mine)}
            row |= floors.floor(floors.Floors(case, way.precision).iteration, rates, way.precision, row["ms_median"])
            for by, theirs in baselines.items():
                if row["correct"] and by != BASELINES.get(way):
                    found = timing.speedup(theirs, mine).items()
                    row |= {f"{field}_over_{by}": value for field, value in found}
            row |= _energy(calls[way], row["ms_median"], case.batch, telemetry, device)
            yield row
        for one in ready:
            one.close()
        del ready, calls, by_name  # their memory is the next one's


def _reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU when it holds nothing that it could give back."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def _memory(way: Way, call: Callable[[], Any], before: int, device: torch.device) -> Row:
    """Most bytes that an iteration holds; on a CPU counted, with the FLOPs. Also the warm-up.

    The official code runs in a thread of its own, into which the counters do not see: of it nothing is counted.
    """
    if device.type == "cpu":
        if way.by == "official":
            call()
            return {}
        return asdict(count(call))
    _reserved(device)  # what the check held is no iteration's
    for _ in range(CUDA_WARM_UP):
        call()
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_reserved(device) - before}


def _energy(call: Callable[[], Any], ms: float, images: int, telemetry: Telemetry, device: torch.device) -> Row:
    """Telemetry of this contender alone, for about a second."""
    iterations = 1 if telemetry.absent else max(3, math.ceil(1e3 * ENERGY_SECONDS / ms))
    with telemetry.watch(iterations, iterations * images) as row:
        if not telemetry.absent:
            for _ in range(iterations):
                call()
            torch.cuda.synchronize(device)
    return row


def meta_gradient_rows(
    case: Case, rates: dict[str, float], rounds: int, device: torch.device, judge: Judge
) -> Iterator[Row]:
    """The meta-gradient alone: the engine, the reference, and other libraries that can compute it."""
    ready: dict[str, Callable[[Tensor, Tensor], Gradient]] = {}
    rows: dict[str, Row] = {}
    makers: dict[str, Callable[[Case, torch.dtype], Callable[[Tensor, Tensor], Gradient]]] = {
        "reference": lambda case, dtype: case.reference(device, dtype, judge.state).meta_gradient,
        "engine": lambda case, dtype: (
            Engine(case.learner(device, dtype, judge.state), inner_steps=case.inner_steps).meta_gradient
        ),
        "higher": lambda case, dtype: higher_meta_gradient(case.reference(device, dtype, judge.state)),
        "torchopt": lambda case, dtype: torchopt_meta_gradient(case.reference(device, dtype, judge.state)),
    }
    batch = judge.images(0, torch.float64)
    exact: Gradient = {}
    for name, make in makers.items():
        row = {"kind": "meta-gradient", "case": case.name, "batch": case.batch, "inner_steps": case.inner_steps}
        row |= {"by": name, "precision": "fp32"}
        try:
            with first_algorithms(device):
                gradient = make(judge.case, torch.float64)(*batch)
            exact = exact or gradient
            error = gradient_error(gradient, exact)
            rows[name] = {**row, "error_float64": error, "correct": error <= EXACT}
            ready[name] = make(case, torch.float32)
        except Exception as error:  # not installed, not able: a row says so
            yield unavailable(row, error)
    x, y = case.images(0, device, torch.float32)
    calls = {name: functools.partial(call, x, y) for name, call in ready.items()}
    for call in calls.values():
        call()
    times = timing.milliseconds(calls, rounds, device, cold=False)
    least = floors.Floors(case, "fp32")
    for name, row in rows.items():
        row |= timing.summary(times[name])
        row |= floors.floor(least.source + least.meta_gradient, rates, "fp32", row["ms_median"])
        if row["correct"] and name != "reference":
            found = timing.speedup(times["reference"], times[name]).items()
            row |= {f"{field}_over_reference": value for field, value in found}
        yield row


def sweep_rows(
    case: Case, steps: Sequence[int], rates: dict[str, float], device: torch.device, judge: Judge
) -> Iterator[Row]:
    """The same over T, those of `steps` but the case's own, and over the number of images."""
    mode: Mode = "graph" if device.type == "cuda" else "eager"
    ways = [REFERENCE, Way(mode=mode), Way(mode=mode, memory="recompute")]
    for T in steps:
        if case.inner_steps != T:
            other = replace(case, inner_steps=T)
            yield from iteration_rows(other, ways, rates, SWEEP_ROUNDS, device, Judge(other, device, batches=1))
    for share in SWEEP_BATCH:
        other = replace(case, batch=int(share * case.batch))
        yield from iteration_rows(other, ways, rates, SWEEP_ROUNDS, device, judge)


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} B={row['batch']} T={row['inner_steps']} {contender_name(row)}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    speedup = row.get("speedup_over_reference")
    cells = [f"{row['ms_median']:.1f} ms", f"{row['floor_fraction']:.0%}", f"{speedup:.2f}x" if speedup else "-"]
    return say(title, [*cells, *([] if row["correct"] else ["inexact"])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_case_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the engine, on a GPU")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="a CPU has no TF32"
    )
    parser.add_argument("--by", nargs="+", choices=BY, default=list(BY), help="whose iterations (default: all)")
    parser.add_argument(
        "--others", action="store_true", help="also the meta-gradient alone, by higher and TorchOpt too"
    )
    parser.add_argument("--sweep", nargs="+", type=int, metavar="T", help="also over these T, and over batch sizes")
    parser.add_argument("--official", type=Path, help="a checkout of alinlab/L2T-ww, to be timed beside")


def run(arguments: argparse.Namespace) -> None:
    """Each case in turn."""
    device = begin("iterations", arguments)
    torch.backends.cudnn.benchmark = True  # as the official code has it; for all alike
    rates = device_rates(("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"), device)
    append(arguments.output, rates_row(rates))
    for case in chosen_cases(arguments):
        start = perf_counter()
        judge = Judge(case, device)
        say(f"{case.name}: the judge was ready after {perf_counter() - start:.0f} s")
        ways = ways_of(device, arguments.official, arguments.modes, arguments.precisions)
        ways = [way for way in ways if way.by in arguments.by]
        timed = iteration_rows(case, ways, rates, arguments.rounds, device, judge, arguments.official)
        write(arguments.output, timed, show)
        if arguments.others:
            write(arguments.output, meta_gradient_rows(case, rates, arguments.rounds, device, judge), show)
        if arguments.sweep:
            write(arguments.output, sweep_rows(case, arguments.sweep, rates, device, judge), show)
