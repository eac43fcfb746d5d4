"""Times the matching operators on a GPU, beside PyTorch's own ways to the same.

    triton     the fused operators (kernels/triton_impl.py)
    aten       their formulas in ATen, a batched product a layer (kernels/torch_impl.py)
    eager      the plain loss, pair by pair, and autograd; the adjoint is the backward of its gradient, graph given
    compiled   torch.compile of the plain loss; of the ATen formulas for the adjoint, as it has no double backward

Every time stands behind a check against float64 of the very CUDA graph that is timed, and beside the time that memory
and arithmetic need at least, at the rates measured in the same run. Rows go to benchmarks/results/ as they come.
`--tune` times blocks of the Triton kernels instead and prints the best for kernels/configs.py.

    TRITON_INTERPRET=1 python -m benchmarks.suites.operators --device cpu --cases minute [--tune]

goes through the same motions without a GPU; its times say nothing.
"""

import argparse
import gc
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import rows as results
from benchmarks.measure import floors, timing
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, say, unavailable
from benchmarks.suites import aot
from l2t_fast.kernels.matching import aten as torch_impl
from l2t_fast.kernels.matching import blocks as configs
from l2t_fast.kernels.matching import plan
from l2t_fast.kernels.matching import triton_launch as triton_impl
from l2t_fast.kernels.matching.blocks import Config, Kernel, Table

TOLERANCE = 1.2  # times the error of ATen in the same precision
ROUNDING = 1e-5  # relative, of float32 sums in whatever order
POOL = 14  # processes that compile

_BATCH, _SOURCES, _TARGETS = aot.CASES["imagenet"]
# (batch, sources (C, H, W), targets (C, H, W)); all sources x all targets
CASES = {
    **aot.CASES,
    "four-source": (_BATCH, [*_SOURCES] * 4, _TARGETS),
    "tiny": (
        25,
        [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
        [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4), (128, 2, 2)],
    ),
    "minute": (3, [(3, 4, 4), (8, 2, 2)], [(4, 4, 4), (16, 2, 2)]),
}
# Layout of the features. Projections have their dtype, a is float32.
PRECISIONS = {"bf16": torch.channels_last, "tf32": torch.channels_last, "fp32": torch.contiguous_format}
OUTPUTS = {
    "gradient": ("g_T", "g_r", "g_bias"),
    "adjoint": ("v_T", "v_r", "v_bias", "v_a"),
    "first step": ("v_a",),
    "distances": ("E",),
}
COMPILED = ("gradient", "adjoint")

# Values that --tune tries, one at a time.
BLOCKS = {
    "chunk": (64, 128, 256),
    "tile": (32 * 128, 64 * 128, 128 * 128),
    "positions": (32, 64, 128),
    "channels": (16, 32, 64, 128),
    "step": (32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "waves": (1, 2, 4),
}

Outputs = list[list[Tensor]]  # of each name in OUTPUTS, tensors of each target layer or pair
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Problem:
    """Random inputs of the operators; see `l2t_fast.kernels.matching.ops`."""

    targets: list[Tensor]  # [B, C_t, H, W] a target layer
    sources: list[Tensor]  # [B, C_s, h, w] a source layer
    weights: list[Tensor]  # [C_s, C_t, 1, 1] a pair
    biases: list[Tensor]  # [C_s] a pair
    cotangents: list[Tensor]  # [B, C_s] a pair
    u_targets: list[Tensor]
    u_weights: list[Tensor]
    u_biases: list[Tensor]
    source_of: list[int]
    target_of: list[int]

    @property
    def primal(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.targets, self.sources, self.weights, self.biases

    @property
    def direction(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.u_targets, self.u_weights, self.u_biases

    @property
    def of(self) -> tuple[list[int], list[int]]:
        return self.source_of, self.target_of

    def double(self) -> "Problem":
        """The same numbers in float64."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_of")}
        return replace(self, **{name: [t.double() for t in tensors] for name, tensors in lists.items()})


def random_problem(case: str, precision: str, device: torch.device) -> Problem:
    batch, sources, targets = CASES[case]
    dtype, layout = floors.DTYPES[precision], PRECISIONS[precision]
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def features(shapes: Iterable[tuple[int, int, int]]) -> list[Tensor]:
        return [randn(batch, *shape).to(dtype).contiguous(memory_format=layout) for shape in shapes]

    pairs = [(m, n) for n in range(len(targets)) for m in range(len(sources))]

    def projections() -> list[Tensor]:
        return [
            (randn(sources[m][0], targets[n][0], 1, 1) / math.sqrt(targets[n][0])).to(dtype).contiguous()
            for m, n in pairs
        ]

    def biases() -> list[Tensor]:
        return [randn(sources[m][0]).to(dtype) for m, _ in pairs]

    return Problem(
        targets=features(targets),
        sources=features(sources),
        weights=projections(),
        biases=biases(),
        cotangents=[randn(batch, sources[m][0]).abs() / batch for m, _ in pairs],
        u_targets=features(targets),
        u_weights=projections(),
        u_biases=biases(),
        source_of=[m for m, _ in pairs],
        target_of=[n for _, n in pairs],
    )


# The contenders


def formulas(module: Any, problem: Problem, operator: str) -> Outputs:
    """By the functions of `torch_impl`, or others of their signatures."""
    a = problem.cotangents
    if operator == "distances":
        return [module.matching_distances(*problem.primal, *problem.of)]
    if operator == "gradient":
        return list(module.matching_gradient(*problem.primal, a, *problem.of, False)[1:])
    full = operator == "adjoint"
    v = module.matching_adjoint(*problem.primal, a, *problem.direction, *problem.of, full)
    return list(v if full else v[3:])


def plain_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E, a [B, C_s] for each pair, as anyone would write it."""
    E = []
    for r, bias, m, n in zip(weights, biases, source_of, target_of, strict=True):
        T, S = targets[n], sources[m]
        if S.shape[2:] != T.shape[2:]:
            S = F.interpolate(S, size=T.shape[2:], mode="bilinear", align_corners=False)
        E.append((F.conv2d(T, r, bias) - S).square().mean((2, 3)))
    return E


def plain_loss(a: Sequence[Tensor], *problem: Any) -> Tensor:
    """Σ a E."""
    products = [(a_p * E_p).sum() for a_p, E_p in zip(a, plain_distances(*problem), strict=True)]
    return torch.stack(products).sum()


def by_autograd(loss: Callable[..., Tensor], problem: Problem, operator: str) -> Call:
    """All but the distances, by differentiating `loss` once or twice."""
    T, r, bias, a = (
        [t.detach().requires_grad_() for t in tensors]
        for tensors in (problem.targets, problem.weights, problem.biases, problem.cotangents)
    )
    primal = [*T, *r, *bias]
    lengths = [len(T), len(r), len(bias), len(a)]

    def value() -> Tensor:
        return loss(a, T, problem.sources, r, bias, *problem.of)

    if operator == "gradient":
        return lambda: split(torch.autograd.grad(value(), primal), lengths[:3])
    g = torch.autograd.grad(value(), primal, create_graph=True)
    u = [t for tensors in problem.direction for t in tensors]
    inputs, counts = ([*primal, *a], lengths) if operator == "adjoint" else (a, lengths[3:])
    return lambda: split(torch.autograd.grad(g, inputs, u, retain_graph=True), counts)


def split(tensors: Iterable[Tensor], lengths: Iterable[int]) -> Outputs:
    rest = iter(tensors)
    return [[next(rest) for _ in range(length)] for length in lengths]


def contender(implementation: str, problem: Problem, operator: str) -> Call:
    """A call that computes the operator, made ready as far as its user would have it ready."""
    if implementation == "triton":
        return partial(formulas, triton_impl, problem, operator)
    if implementation == "aten":
        return partial(formulas, torch_impl, problem, operator)
    if implementation == "eager":
        if operator == "distances":
            return lambda: [plain_distances(*problem.primal, *problem.of)]
        return by_autograd(plain_loss, problem, operator)
    # Without what was compiled before, neither shapes turn dynamic nor recompilations reach their limit.
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    if operator == "gradient":
        return by_autograd(compiled(plain_loss), problem, operator)
    adjoint = compiled(torch_impl.matching_adjoint)
    return partial(formulas, SimpleNamespace(matching_adjoint=adjoint), problem, operator)


# Measuring


@dataclass(frozen=True)
class Ready:
    """A contender that has run."""

    call: Call  # also keeps alive what `timed` reads
    timed: Callable[[], Any]  # a replay of the call's CUDA graph, or the call
    outputs: Outputs  # of `timed`
    captured: bool | str  # or why not
    first_seconds: float  # of the first call, compilation included
    memory: int  # bytes at the peak beyond inputs and outputs


def ready(make: Callable[[], Call], device: torch.device) -> Ready:
    """Warms a contender up, measures its memory and captures it."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    start = perf_counter()
    call = make()
    call()
    if cuda:
        torch.cuda.synchronize()
    first_seconds = perf_counter() - start
    if not cuda:
        return Ready(call, call, call(), "no CUDA", first_seconds, 0)
    call()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before - size(outputs)
    del outputs
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            outputs = call()
    except Exception as error:  # a row says so
        torch.cuda.synchronize()
        return Ready(call, call, call(), unavailable({}, error)["unavailable"], first_seconds, memory)
    for tensors in outputs:
        for t in tensors:
            t.fill_(math.nan)  # a replay must write all of it
    graph.replay()
    torch.cuda.synchronize()
    return Ready(call, graph.replay, outputs, True, first_seconds, memory)


def launches(call: Call) -> int | None:
    """Kernels, copies and fills of one call on the device; None where the profiler cannot see them."""
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        events = profiled.events() or ()
    except (AssertionError, RuntimeError):  # no CUPTI, say: the times count for more
        return None
    # The synchronization is an event of its own.
    return len([e for e in events if e.device_type == DeviceType.CUDA and e.name != "Context Sync"]) or None


def errors(operator: str, outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Of each output, the root mean square over its tensors of ‖x − exact‖ / ‖exact‖."""

    def relative(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() - y).norm() / y.norm()

    return {
        name: torch.stack([relative(x, y) for x, y in zip(xs, ys, strict=True)]).square().mean().sqrt().item()
        for name, xs, ys in zip(OUTPUTS[operator], outputs, exact, strict=True)
    }


def error_ratio(error: dict[str, float], aten: dict[str, float]) -> float:
    """The largest ratio to ATen's error (NaN if any is)."""
    return torch.tensor([error[name] / aten[name] for name in aten]).max().item()


def is_correct(precision: str, error: dict[str, float], aten: dict[str, float]) -> bool:
    """No further from float64 than ATen in the same precision, or than float32 sums in another order may be."""
    return error_ratio(error, aten) <= TOLERANCE or (precision == "fp32" and max(error.values()) <= ROUNDING)


def size(lists: Iterable[Iterable[Tensor]]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for tensors in lists for t in tensors)


# Rows


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
    floors.set_precision(precision)
    problem = random_problem(case, precision, device)
    exact = formulas(torch_impl, problem.double(), operator)
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
    work = floors.matching(operator, *CASES[case], pairs, floors.DTYPES[precision].itemsize)
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
            "first_call_seconds": one.first_seconds,
            **telemetry,
        }
    return list(rows.values())


COLUMNS = {
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
    cells = ["-" if row.get(name) is None else format(row[name], form) for name, form in COLUMNS.values()]
    return say(title, [*cells, *([] if row["correct"] else ["inexact"])])


def compare(arguments: argparse.Namespace, device: torch.device) -> None:
    """The table of all cases, precisions, operators and implementations."""
    start = perf_counter()
    rates = floors.rates(arguments.precisions, device)
    results.append(arguments.output, {"kind": "rates", "rates": rates})
    work = [(case, p, operator) for p in arguments.precisions for case in arguments.cases for operator in OUTPUTS]
    # The case of many pairs takes longest: it comes last, where it may be cut off.
    work.sort(key=lambda job: job[0] == "four-source")
    if device.type == "cuda":
        with compilers() as pool:
            wait([pool.submit(compile_ahead, *job, device.index, None) for job in work])
        say(f"compiled the kernels in {perf_counter() - start:.0f} s")
    triton_runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    compile_left = arguments.compile_seconds
    say("", list(COLUMNS))
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
            results.append(arguments.output, row)
            show(row)
        gc.collect()  # autograd's graphs


# Compiling and tuning the kernels

Key = tuple[Kernel, bool, str]  # (kernel, adjoint, arithmetic), as in configs.Table


def compilers() -> ProcessPoolExecutor:
    """Processes that fill Triton's cache on disk."""
    return ProcessPoolExecutor(min(POOL, os.cpu_count() or 1), multiprocessing.get_context("spawn"))


def compile_ahead(case: str, precision: str, operator: str, index: int, table: Table | None) -> None:
    """In a process of its own: runs the operator once, with the blocks of `table` if there is one."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    if table is not None:
        install(triton_impl.device_properties(device)[0], table)
    floors.set_precision(precision)
    formulas(triton_impl, random_problem(case, precision, device), operator)
    torch.cuda.synchronize()


def install(arch: str, table: Table) -> None:
    configs.CONFIGS[arch] = table
    plan.position_launch.cache_clear()
    plan.channel_launch.cache_clear()


def neighbours(kernel: Kernel, config: Config) -> list[Config]:
    """Configurations that differ in one value."""
    unread = {"waves"} if kernel == "position" else set()
    names = [f.name for f in fields(Config) if f.name in BLOCKS and f.name not in unread]
    return [
        replace(config, **{name: value}) for name in names for value in BLOCKS[name] if value != getattr(config, name)
    ]


def compile_candidates(
    candidates: dict[Key, list[Config]], cases: list[str], table: Table, index: int, seconds: float
) -> dict[tuple[Key, Config], str]:
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
    """What a kernel's blocks are judged by."""
    return "adjoint" if key[1] else "gradient"


def precision_of(key: Key) -> str:
    """The precision whose products are the key's arithmetic."""
    return "fp32" if key[2] == "ieee" else key[2]


def trials(
    key: Key,
    candidates: list[Config],
    failed: dict[tuple[Key, Config], str],
    table: Table,
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    """A row a candidate: the operator's time in each case with these blocks of one kernel, the others as in `table`."""
    arch, operator, precision = triton_impl.device_properties(device)[0], operator_of(key), precision_of(key)
    floors.set_precision(precision)
    rows: list[Row] = [{"kind": "tune", "key": key, "blocks": asdict(candidate), "ms": {}} for candidate in candidates]
    for row, candidate in zip(rows, candidates, strict=True):
        if (key, candidate) in failed:
            row["unavailable"] = failed[key, candidate]
    for case in arguments.cases:
        problem = random_problem(case, precision, device)
        exact = formulas(torch_impl, problem.double(), operator)
        aten = errors(operator, formulas(torch_impl, problem, operator), exact)
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
            ratio = error_ratio(errors(operator, one.outputs, exact), aten)
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


def tune(arguments: argparse.Namespace, device: torch.device) -> None:
    """Moves each kernel's blocks to the fastest of their neighbours, until none is faster."""
    start = perf_counter()
    arch, _ = triton_impl.device_properties(device)
    table = dict(configs.table(arch))
    kernels: tuple[Kernel, ...] = ("position", "channel")
    tried: dict[Key, set[Config]] = {key: set() for key in table}
    for precision in arguments.precisions:
        arithmetic = "ieee" if precision == "fp32" else precision
        moving: list[Key] = [(kernel, adjoint, arithmetic) for adjoint in (False, True) for kernel in kernels]
        while moving and (left := arguments.limit - (perf_counter() - start)) > 0:
            candidates = {
                key: [table[key], *(c for c in neighbours(key[0], table[key]) if c not in tried[key])] for key in moving
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
                    results.append(arguments.output, row)
                timed = [i for i, row in enumerate(rows) if "ms_mean" in row]
                best = min(timed, key=lambda i: rows[i]["ms_mean"], default=0)
                if best and rows[best]["ms_mean"] < 0.99 * rows[0].get("ms_mean", math.inf):
                    table[key] = configs_of_key[best]
                    moving.append(key)
                ms = {case: round(t, 4) for case, t in rows[best]["ms"].items()}
                print(f"{key}: {len(timed)} of {len(rows)} run; {table[key]}, {operator_of(key)} {ms} ms", flush=True)
    print("\n".join(f"    {key}: {config}," for key, config in table.items()))


# The command


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: imagenet cifar, and four-source")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timed turns of each contender (default 30)")
    parser.add_argument("--limit", type=float, default=280, help="seconds after which nothing new begins (default 280)")
    parser.add_argument(
        "--compile-seconds", type=float, default=90, help="after which torch.compile begins no more (default 90)"
    )
    parser.add_argument("--no-compile", dest="compile_seconds", action="store_const", const=0, help="no torch.compile")
    parser.add_argument("--tune", action="store_true", help="look for faster blocks of the Triton kernels")
    arguments = parser.parse_args()
    device = results.device(arguments)
    if device.type == "cuda":
        # One stream for all: autograd's backward runs where its forward ran, and a graph is captured from one.
        torch.cuda.set_stream(torch.cuda.Stream(device))
        # The first product of a thread, autograd's too, allocates a workspace that stays: no contender's own.
        x = torch.ones(16, 16, device=device, requires_grad=True)
        (x @ x).sum().backward()
    arguments.cases = arguments.cases or ["imagenet", "cifar", *([] if arguments.tune else ["four-source"])]
    results.start("tune" if arguments.tune else "operators", arguments, device)
    (tune if arguments.tune else compare)(arguments, device)


if __name__ == "__main__":
    main()
