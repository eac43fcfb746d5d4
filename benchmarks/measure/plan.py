"""What the Triton path of the matching operators is going to do, counted without a GPU and without memory.

The operators run on FakeTensors; their own kernels are noted instead of launched. Done are the products that would be
computed, of our kernels in whole tiles with their padding (cuBLAS has some of its own); at least, those of
measure/floors.py, without any. Beside them the products of the gradient where layers whose Gram form pays are in it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from math import ceil, prod
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.contenders.operators import formulas, random_problem
from benchmarks.measure import floors
from benchmarks.measure.rates import DTYPES
from benchmarks.rows import Row
from benchmarks.shapes import MATCHING_SHAPES, Features
from l2t_fast.engine.counts import count
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import gram, triton_launch

DEVICE = "sm_90", 132  # architecture and multiprocessors that the launches are planned for


def plan(case: str, precision: str, operator: str) -> Row:
    """FLOPs done and at least, launches, and the bytes alive at most beside the inputs."""
    batch, sources, targets = MATCHING_SHAPES[case]
    own: list[int] = []  # FLOPs of each launch of our kernel

    def noted(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *_: Any) -> None:
        own.append(prod(grid) * _of_a_program(arguments))

    replaced = [
        (launch, "launch", noted),
        (launch, "device_properties", lambda device: DEVICE),
        (triton_launch, "_precision", lambda dtype: "tf32" if precision == "tf32" else "ieee"),
        (triton_launch, "_table", triton_launch._table.__wrapped__),  # nothing fake is kept
    ]
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(FakeTensorMode())
        problem = random_problem(case, precision, torch.device("cpu"))
        counts = count(lambda: formulas(triton_launch, problem, operator))
    pairs = list(zip(problem.source_of, problem.target_of, strict=True))
    done = counts.flops + sum(own)
    least = floors.matching(operator, batch, sources, targets, pairs, DTYPES[precision].itemsize).flops
    return {
        "kind": "plan",
        "case": case,
        "precision": precision,
        "operator": operator,
        "flops": done,
        "flops_least": least,
        "done_over_least": done / least,
        "flops_with_gram": _with_gram(batch, sources, targets) if operator == "gradient" else None,
        "launches": counts.launches + len(own),
        "peak_bytes": counts.peak_bytes,
    }


def _of_a_program(arguments: Mapping[str, Any]) -> int:
    """FLOPs: d, and in a direction the two products of H as well."""
    steps = ceil(arguments["C"] / arguments["STEP"]) * arguments["STEP"]
    return (3 if arguments["ADJOINT"] else 1) * 2 * arguments["BP"] * arguments["BS"] * steps


def _with_gram(batch: int, sources: Features, targets: Features) -> int:
    """FLOPs of the gradient, each layer in the form that the engine gives it on a CPU."""
    S = [(batch, *shape) for shape in sources]
    layers = [(batch, *shape) for shape in targets]
    return sum(gram.flops(T, S) if gram.pays(T, S) else gram.direct_flops(T, S) for T in layers)
