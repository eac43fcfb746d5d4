"""Compiles the engine's own Triton kernels side by side, so that no iteration waits for them one by one; needs a GPU.

Of each case and precision a process runs one iteration on a few images and one on all, launch by launch, notes what
its kernels are launched with and launches none of those that an iteration launches. Then as many processes as there are
cores compile what was noted, each kernel once, into Triton's cache on disk, where every later process finds it.
"""

import argparse
import functools
import gc
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.contenders.judge import CHECK_BATCH, first_algorithms
from benchmarks.rows import Row, add_row_arguments, begin, say, unavailable, write
from l2t_fast import Engine
from l2t_fast.errors import L2TError
from l2t_fast.kernels import launch

PRECISIONS = ("bf16", "tf32", "fp32", "fp64")  # the last as contenders are judged in, on a few images
ALIGNED = 16  # bytes

Job = tuple[str, str]  # case, precision


@dataclass(frozen=True)
class Pointer:
    """All that a kernel is compiled for of a tensor."""

    dtype: torch.dtype
    aligned: bool

    def tensor(self, device: torch.device) -> Tensor:
        """A small one like it."""
        return torch.empty(64, dtype=self.dtype, device=device)[0 if self.aligned else 1 :]


@dataclass(frozen=True)
class Launch:
    """A kernel and all that it is compiled for."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def noted(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Launch:
    """What a launch of `kernel` asks to be compiled."""
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    described = ((name, value if name in constants else _described(value)) for name, value in arguments.items())
    return Launch(kernel.fn.__module__, kernel.fn.__name__, tuple(described), tuple(options.items()))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % ALIGNED == 0)
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    if type(value) is int and 1 < value < 2**31:  # Triton looks whether 16 divides it
        return 16 if value % 16 == 0 else 17
    return value


def launches(job: Job) -> list[Launch]:
    """Those of an iteration, each once; in a process of its own."""
    name, precision = job
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    case, dtype = CASES[name], torch.float64 if precision == "fp64" else torch.float32
    found: dict[Launch, None] = {}
    with first_algorithms(device):
        options: dict[str, Any] = {"precision": "fp32" if precision == "fp64" else precision}
        options |= {"mode": "eager", "memory": "recompute"}  # the same kernels, and room for all jobs side by side
        engine = Engine(case.learner(device, dtype), inner_steps=case.inner_steps, **options)
        for batch in (CHECK_BATCH["cuda"], *([] if precision == "fp64" else [case.batch])):
            with mock.patch.object(launch, "launch", functools.partial(_note, found)):
                engine.step(*replace(case, batch=batch).images(0, device, dtype))
    del engine
    gc.collect()
    torch.cuda.empty_cache()  # this process goes on to compile
    return list(found)


def _note(
    found: dict[Launch, None],
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    place: Tensor,
    warps: int,
    stages: int = 3,
) -> None:
    """Instead of `launch.launch`."""
    found[noted(kernel, arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True})] = None


def compiled(one: Launch, device: torch.device | None = None) -> Any:
    """As its launch would compile it; in a process of its own."""
    device = device or torch.device("cuda", 0)
    kernel = getattr(importlib.import_module(one.module), one.kernel)
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    arguments = {name: value if name in constants else _real(value, device) for name, value in one.arguments}
    return kernel.warmup(**arguments, grid=(1,), **dict(one.options))


def _real(value: Any, device: torch.device) -> Any:
    if isinstance(value, Pointer):
        return value.tensor(device)
    return tuple(_real(v, device) for v in value) if isinstance(value, tuple) else value


def _compile(one: Launch) -> float:
    start = perf_counter()
    compiled(one)
    return perf_counter() - start


def precompile_rows(jobs: Iterable[Job], processes: int) -> Iterator[Row]:
    """A row a job, and a row a kernel that it found first."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        finding = {pool.submit(launches, job): job for job in jobs}
        compiling: dict[Future[float], Row] = {}
        seen: set[Launch] = set()
        for future in as_completed(finding):
            case, precision = finding[future]
            row: Row = {"kind": "launches", "case": case, "precision": precision}
            if error := future.exception():
                yield unavailable(row, error)
                continue
            new = [one for one in future.result() if one not in seen]
            yield row | {"launches": len(future.result()), "new": len(new)}
            seen.update(new)
            for one in sorted(new, key=lambda one: "matching" not in one.module):  # those that take long first
                described = {"case": case, "precision": precision, "kernel": one.kernel}
                compiling[pool.submit(_compile, one)] = {"kind": "precompile", **described}
        for done in as_completed(compiling):
            error = done.exception()
            yield unavailable(compiling[done], error) if error else compiling[done] | {"seconds": done.result()}


def show(row: Row) -> None:
    """One line."""
    title = f"{row['case']} {row['precision']} {row.get('kernel', '')}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    return say(title, [f"{row['seconds']:.1f} s"] if "seconds" in row else [f"{row['new']} new kernels"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    cases = ["cifar", "imagenet"]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=cases, help=f"default: {' '.join(cases)}")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")


def run(arguments: argparse.Namespace) -> None:
    """All cases and precisions."""
    start = perf_counter()
    device = begin("precompile", arguments)
    if device.type != "cuda":
        raise L2TError("there is no GPU here whose kernels could be compiled: `python -m benchmarks aot` needs none.")
    jobs = [(case, precision) for precision in arguments.precisions for case in arguments.cases]
    write(arguments.output, precompile_rows(jobs, arguments.jobs), show)
    say(f"compiled in {perf_counter() - start:.0f} s")
