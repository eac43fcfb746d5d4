"""Where the time of an iteration goes, by family of kernels.

On a GPU by the kernels that ran, with the fraction of wall time that some kernel ran, host synchronisations and
launches; on a CPU by the operations, where what a registered operator calls belongs to it.
"""

import argparse
import functools
import gc
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, add_case_arguments, chosen_cases
from benchmarks.contenders.ways import CUDA_WARM_UP, MODES, PRECISIONS, REFERENCE, Way, contender
from benchmarks.rows import Row, add_row_arguments, begin, say, unavailable, write

STEPS = 2  # that are profiled

# The first family whose pattern is found in the name of a kernel or operation.
FAMILIES = {
    "matching": r"l2t::matching|difference_kernel",
    "optimizer": r"l2t::sgd|^(step|adjoint)_kernel|_foreach_|_fused_adam|multi_tensor_apply|Optimizer",
    "normalisation": r"batch_?norm|bn_fw|bn_bw|::bn|welford|^(sums|coefficients|combine)_kernel",
    "pooling": r"max_pool|avg_pool|pooling|MaxPool|AvgPool",
    "activation": r"relu|threshold|clamp",
    "convolution": r"conv|cudnn|implicit_gemm|wgrad|dgrad|fprop|winograd|nchwToNhwc|nhwcToNchw|mkldnn",
    "products": r"gemm|gemv|cublas|splitk|xmma|cutlass|aten::(mm|bmm|addmm|baddbmm)$",
    "sums": r"CUDAFunctor_add|aten::(add|sub)_?$",
    "copies": r"copy|memcpy|memset|fill",
}
LONGEST, NAME = 25, 160  # kernels that a row names, letters of a name
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


@functools.cache
def family(name: str) -> str:
    """Of a kernel or an operation."""
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def breakdown(call: Callable[[], Any], device: torch.device) -> Row:
    """Profiles a few calls; all numbers are of one."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    events = list(profiled.events() or ())
    microseconds: dict[str, float] = defaultdict(float)
    if not cuda:
        for event in events:
            microseconds[_family_of_operation(event)] += event.self_cpu_time_total
        return {"family_ms": {name: t / STEPS / 1e3 for name, t in microseconds.items()}, "longest": []}
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and event.name != "Context Sync"]
    by_name: Counter[str] = Counter()  # microseconds
    for kernel in kernels:
        by_name[kernel.name] += kernel.time_range.elapsed_us()
    for name, t in by_name.items():
        microseconds[family(name)] += t
    runs = Counter(kernel.name for kernel in kernels)
    spans = [(kernel.time_range.start, kernel.time_range.end) for kernel in kernels]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    host = [event.name for event in events if event.device_type == DeviceType.CPU]
    return {
        "family_ms": {name: t / STEPS / 1e3 for name, t in microseconds.items()},
        "busy_fraction": busy(spans) / wall,
        # The last synchronisation is the profiler's own.
        "host_synchronisations": (sum(name in SYNCHRONISATIONS for name in host) - 1) / STEPS,
        "launches": sum(name in LAUNCHES for name in host) / STEPS,
        "kernels": len(kernels) / STEPS,
        "longest": [
            {"kernel": name[:NAME], "runs": runs[name] / STEPS, "ms": t / STEPS / 1e3}
            for name, t in by_name.most_common(LONGEST)
        ],
    }


def _family_of_operation(event: Any) -> str:
    """That of the outermost operation which has one: what `l2t::matching_gradient` calls is matching."""
    found = "rest"
    while event is not None:
        found, event = (family(event.name) if family(event.name) != "rest" else found), event.cpu_parent
    return found


def breakdown_row(case: Case, way: Way, device: torch.device) -> Row:
    """Of one way to run an iteration."""
    row: Row = {"kind": "breakdown", "case": case.name, "batch": case.batch, **asdict(way)}
    if device.type == "cuda":  # what the engine before held; it and its graphs refer to each other
        gc.collect()
        torch.cuda.empty_cache()
    try:
        one = contender(way, case, case.warm_state(device), device, False, None)
        call = functools.partial(one.step, *case.images(0, device, torch.float32))
        for _ in range(CUDA_WARM_UP if device.type == "cuda" else 1):
            call()
        return row | breakdown(call, device)
    except Exception as error:  # one way's failure is its row
        return unavailable(row, error)


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} {row['by']} {row['mode']} {row['precision']}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    longest = "".join(
        f"\n{kernel['ms']:9.3f} ms {kernel['runs']:5.0f} x {kernel['kernel']}" for kernel in row["longest"]
    )
    families = sorted(row["family_ms"].items(), key=lambda item: -item[1])
    return say(title, [*(f" {name} {ms:.2f}" for name, ms in families), longest])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_case_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the engine, on a GPU")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="on a GPU")


def run(arguments: argparse.Namespace) -> None:
    """The engine in each mode and precision, and the reference."""
    device = begin("breakdown", arguments)
    ways = [Way(), REFERENCE]
    if device.type == "cuda":
        ways = [*(Way(mode=mode, precision=p) for p in arguments.precisions for mode in arguments.modes), REFERENCE]
    cases = chosen_cases(arguments)
    write(arguments.output, (breakdown_row(case, way, device) for case in cases for way in ways), show)
