"""An iteration on 1 to 1,024 GPUs: what goes over the wire, how long that takes, and what breaks first.

A model. Exact data parallelism averages ∇θ of the real step, of each of the T matching steps and of the step on L_org,
and dL_meta/dθ, and in the sweep back the cotangent of θ of each simulated step but the first, then φ's gradient: 2T + 3
sets of gradients of θ and one of φ, each one flattened all-reduce, one after the other, as the next step needs the one
before. Nothing is overlapped: an upper bound. Sizes of the sets are those of the networks, in float32; compute is the
time of one GPU measured in a results file (of imagenet, whose iterations nobody has timed, its kernels' as profiled);
latencies and speeds of links are stated in `measure/links.py`. `weak`: every GPU has a whole batch of the case;
`strong`: they divide one, and compute is divided as if nothing were lost.

Beside it, all-reduces of these sets between 1 and 2 processes of this CPU, by gloo, with what the same kind of model
says from an empty and a large one; and, where the engine takes a `group`, whole iterations of the tiny case.
"""

import argparse
import inspect
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.measure.floors import Floors, floor
from benchmarks.measure.links import NETWORKS, AllReduce, join, turns
from benchmarks.report.markdown import write as write_report
from benchmarks.rows import RESULTS, Row, add_row_arguments, begin, read, say, unavailable, write
from l2t_fast import L2T, Engine

TIMES = "gpu_nvidia_h200_20261126T053000.jsonl"
GPUS = tuple(2**i for i in range(11))
EXACT = 1e-9  # relative, of the meta-gradient in float64
_LOST = 0.9  # efficiency below which something has broken
_LARGE = 2**24  # float32 of the all-reduce that tells the speed


def gradient_sets(learner: L2T, inner_steps: int) -> dict[str, list[int]]:
    """The all-reduces of an iteration: numbers of parameters in each, by what it averages."""
    target = [p for p in learner.target.parameters() if p.requires_grad]
    matched = _matched(learner, [*target, *learner.projections.parameters()])
    whole = _count(target)
    return {
        "real step": [whole + _count(learner.projections.parameters())],
        "matching steps": [matched] * inner_steps,
        "step on L_org": [whole],
        "L_meta": [whole],
        "sweep": [whole, *[matched] * (inner_steps - 1)],  # the first step's θ is no variable
        "φ": [_count(learner.what.parameters()) + _count(learner.where.parameters())],
    }


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _matched(learner: L2T, theta: list[nn.Parameter]) -> int:
    """Parameters that the matching loss reaches."""
    grads = torch.autograd.grad(learner.matching_loss(torch.randn(2, *learner.image_shape)), theta, allow_unused=True)
    return sum(p.numel() for p, g in zip(theta, grads, strict=True) if g is not None)


# The model


def compute(case: Case, precision: str, times: Path) -> Row:
    """Milliseconds of an iteration on one GPU, and how they are known."""
    _, rows = read(times)
    mine = [row for row in rows if row.get("case") == case.name and row.get("precision") == precision]
    mine = [row for row in mine if row["by"] == "engine" and row["mode"] == "graph" and row["batch"] == case.batch]
    for row in mine:
        if row["kind"] == "iteration" and row.get("correct"):
            return {"compute_ms": row["ms_median"], "compute_by": "iterations timed"}
    for row in mine:
        if row["kind"] == "breakdown":
            return {"compute_ms": sum(row["family_ms"].values()), "compute_by": "kernels profiled"}
    rates = next(row["rates"] for row in rows if row["kind"] == "rates")
    least = floor(Floors(case, precision).iteration, rates, precision, 1.0)["floor_ms"]
    return {"compute_ms": least, "compute_by": "floor: no time was measured"}


def model_rows(case: Case, sizes: Sequence[int], found: Row) -> Iterator[Row]:
    """A row for each network, algorithm, way to scale and number of GPUs; then where each first loses a tenth."""
    for network, speed in NETWORKS.items():
        for by in ("ring", "tree"):
            for scaling in ("weak", "strong"):
                gpus = [n for n in GPUS if scaling == "weak" or n <= case.batch]
                curve = [_modelled(case, AllReduce(by, n, speed), network, scaling, sizes, found) for n in gpus]
                yield from curve
                yield _breaks(curve)


def _modelled(case: Case, reduce: AllReduce, network: str, scaling: str, sizes: Sequence[int], found: Row) -> Row:
    share = reduce.gpus if scaling == "strong" else 1
    compute_ms = found["compute_ms"] / share
    latency = 1e3 * len(sizes) * reduce.latency
    transfer = 1e3 * sum(reduce.transfer(4 * size) for size in sizes)
    return {
        "kind": "scaling",
        "case": case.name,
        "batch": case.batch // share,
        "inner_steps": case.inner_steps,
        "by": reduce.by,
        "network": network,
        "scaling": scaling,
        "gpus": reduce.gpus,
        **found,
        "compute_ms": compute_ms,
        "all_reduces": len(sizes),
        "wire_bytes": sum(reduce.wire(4 * size) for size in sizes),
        "latency_ms": latency,
        "transfer_ms": transfer,
        "efficiency": compute_ms / (compute_ms + latency + transfer),
    }


def _breaks(curve: Sequence[Row]) -> Row:
    """Where the efficiency first falls below nine tenths, and by what."""
    row = {name: curve[0][name] for name in ("case", "inner_steps", "by", "network", "scaling")}
    row |= {"kind": "scaling breaks", "most_gpus": curve[-1]["gpus"], "efficiency": curve[-1]["efficiency"]}
    first = next((point for point in curve if point["efficiency"] < _LOST), None)
    if first is not None:
        latency, transfer = first["latency_ms"], first["transfer_ms"]
        row |= {"gpus": first["gpus"], "what": "latency" if latency > transfer else "bytes"}
        row |= {"latency_ms": latency, "transfer_ms": transfer}
    return row


# Measured


def all_reduce_rows(sizes: dict[str, list[int]], processes: Sequence[int], rounds: int) -> Iterator[Row]:
    """The sets of each case between processes of this CPU, beside a model from an empty and a large all-reduce."""
    for count in processes:
        empty, large, *cases = turns([[1], [_LARGE], *sizes.values()], count, rounds)
        start, whole = (statistics.median(turn.seconds for turn in some) for some in (empty, large))
        speed = 4 * _LARGE / (whole - start) if count > 1 and whole > start else None  # alone it sends nothing
        for (case, mine), some in zip(sizes.items(), cases, strict=True):
            ms = sorted(1e3 * turn.seconds for turn in some)
            yield {
                "kind": "all-reduce",
                "case": case,
                "by": "gloo",
                "processes": count,
                "all_reduces": len(mine),
                "wire_bytes": sum(AllReduce("ring", count, 1.0).wire(4 * size) for size in mine),
                "rounds": rounds,
                "correct": all(turn.correct for turn in some),
                "ms_median": statistics.median(ms),
                "ms_p20": ms[len(ms) // 5],
                "ms_p80": ms[-1 - len(ms) // 5],
                "model_ms": 1e3 * (len(mine) * start + (4 * sum(mine) / speed if speed else 0)),
                "empty_ms": 1e3 * start,
                "bytes_per_second": speed,
                "load": os.getloadavg()[0],
            }


def engine_rows(processes: Sequence[int], rounds: int) -> Iterator[Row]:
    """Iterations of the tiny case, its batch divided among processes, behind the meta-gradient of the whole batch."""
    row: Row = {"kind": "iteration of ranks", "case": "tiny", "by": "engine", "mode": "eager"}
    if "group" not in inspect.signature(Engine).parameters:
        yield unavailable(row, "this engine takes no group: all-reduces were measured alone")
        return
    import torch.multiprocessing as mp

    for count in processes:
        with TemporaryDirectory() as folder:
            mp.spawn(_engine_rank, (count, folder, rounds), nprocs=count)
            ranks: list[tuple[list[float], float]] = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]
        ms = sorted(1e3 * max(turn) for turn in zip(*(times for times, _ in ranks), strict=True))
        error = max(error for _, error in ranks)
        yield {
            **row,
            "batch": _TINY.batch,
            "inner_steps": _TINY.inner_steps,
            "processes": count,
            "rounds": rounds,
            "error_float64": error,
            "correct": error < EXACT,
            "ms_median": statistics.median(ms),
            "ms_p20": ms[len(ms) // 5],
            "ms_p80": ms[-1 - len(ms) // 5],
            "load": os.getloadavg()[0],
        }


_TINY = replace(CASES["tiny"], batch=24)


def _engine_rank(rank: int, processes: int, folder: str, rounds: int) -> None:
    group = join(rank, processes, folder)
    cpu = torch.device("cpu")

    def engine(dtype: torch.dtype, group: Any) -> Engine:
        learner = _TINY.learner(cpu, dtype)
        # By running statistics: with those of a batch, parts of it are another problem than the whole.
        for norm in (m for m in learner.target.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
        more = {} if group is None else {"group": group}
        return Engine(learner, lr=0.05, inner_steps=_TINY.inner_steps, mode="eager", say=lambda text: None, **more)

    def part(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = _TINY.images(0, cpu, dtype)
        return x.tensor_split(processes)[rank], y.tensor_split(processes)[rank]

    exact = engine(torch.float64, None).meta_gradient(*_TINY.images(0, cpu, torch.float64))
    found = engine(torch.float64, group).meta_gradient(*part(torch.float64))
    wanted = torch.cat([g.flatten() for g in exact.values()])
    error = (torch.cat([found[name].flatten() for name in exact]) - wanted).norm() / wanted.norm()
    timed, (x, y), times = engine(torch.float32, group), part(torch.float32), []
    for i in range(1 + rounds):
        torch.distributed.barrier()
        start = perf_counter()
        timed.step(x, y)
        if i:
            times.append(perf_counter() - start)
    torch.save((times, error.item()), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def show(row: Row) -> None:
    """One line of the table; of the model the ends of its curves."""
    if row["kind"] == "scaling breaks":
        first = f"< 90 % at {row['gpus']}, {row['what']}" if "gpus" in row else "never < 90 %"
        title = f"{row['case']} {row['scaling']} {row['by']} {row['network']}"
        say(f"{title:<55}", [first, f"   {row['efficiency']:.0%} at {row['most_gpus']}"])
    elif "ms_median" in row:
        model = [f"model {row['model_ms']:.1f}"] if "model_ms" in row else []
        say(f"{row['kind']} {row['case']}, {row['processes']} processes", [f"{row['ms_median']:.1f} ms", *model])
    elif "unavailable" in row:
        say(f"{row['kind']}: {row['unavailable']}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["cifar", "imagenet"])
    parser.add_argument("--precision", choices=("bf16", "tf32"), default="bf16", help="of the times of one GPU")
    parser.add_argument("--times", default=TIMES, metavar="FILE", help="of results/ (default: that of an H200)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the CPU, measured (default 1 2)")
    parser.add_argument("--rounds", type=int, default=7)


def run(arguments: argparse.Namespace) -> None:
    """The model, what was measured beside it, and the report."""
    begin("scaling", arguments)
    sizes: dict[str, list[int]] = {}
    for case in (CASES[name] for name in arguments.cases):
        sets = gradient_sets(case.learner(torch.device("cpu"), torch.float32), case.inner_steps)
        sizes[case.name] = [size for some in sets.values() for size in some]
        found = {**compute(case, arguments.precision, RESULTS / arguments.times), "precision": arguments.precision}
        write(arguments.output, model_rows(case, sizes[case.name], found), show)
    write(arguments.output, all_reduce_rows(sizes, arguments.processes, arguments.rounds), show)
    write(arguments.output, engine_rows(arguments.processes, arguments.rounds), show)
    say(f"the report is {write_report(arguments.output)}")
