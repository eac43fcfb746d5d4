"""The contenders of the matching operators, and who of them is right.

triton     the fused operators (kernels/matching/triton_launch.py)
aten       their formulas in ATen, a batched product a layer (kernels/matching/aten.py)
eager      the plain loss, pair by pair, and autograd; the adjoint is the backward of its gradient, graph given
compiled   torch.compile of the plain loss; of the ATen formulas for the adjoint, as it has no double backward
"""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure.capture import Call, Outputs
from benchmarks.measure.rates import DTYPES, set_precision
from benchmarks.shapes import MATCHING_SHAPES, Features
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten, blocks, triton_launch
from l2t_fast.kernels.matching.blocks import Table

TOLERANCE = 1.2  # times the error of ATen in the same precision
ROUNDING = 1e-5  # relative, of float32 sums in whatever order
POOL = 14  # processes that compile

# Layout of the features. Everything else is float32, as an engine has it.
PRECISIONS = {"bf16": torch.channels_last, "tf32": torch.channels_last, "fp32": torch.contiguous_format}
OUTPUTS = {
    "gradient": ("g_T", "g_r", "g_bias"),
    "adjoint": ("v_T", "v_r", "v_bias", "v_a"),
    "first step": ("v_a",),
    "distances": ("E",),
}


@dataclass(frozen=True)
class Problem:
    """Random inputs of the operators; see `l2t_fast.kernels.matching.ops`."""

    targets: list[Tensor]  # [B, C_t, H, W] a target layer
    sources: list[Tensor]  # [B, C_s, h, w] a source layer
    projections: list[Tensor]  # [C_s, C_t, 1, 1] a pair
    biases: list[Tensor]  # [C_s] a pair
    coefficients: list[Tensor]  # [B, C_s] a pair
    u_targets: list[Tensor]
    u_projections: list[Tensor]
    u_biases: list[Tensor]
    source_of: list[int]
    target_of: list[int]

    @property
    def primal(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.targets, self.sources, self.projections, self.biases

    @property
    def direction(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.u_targets, self.u_projections, self.u_biases

    @property
    def indices(self) -> tuple[list[int], list[int]]:
        return self.source_of, self.target_of

    def double(self) -> "Problem":
        """The same numbers in float64."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_of")}
        return replace(self, **{name: [t.double() for t in tensors] for name, tensors in lists.items()})


def random_problem(case: str, precision: str, device: torch.device) -> Problem:
    """In the shapes of a case; always the same numbers."""
    batch, sources, targets = MATCHING_SHAPES[case]
    dtype, layout = DTYPES[precision], PRECISIONS[precision]
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def features(shapes: Features) -> list[Tensor]:
        return [randn(batch, *shape).to(dtype).contiguous(memory_format=layout) for shape in shapes]

    pairs = [(m, n) for n in range(len(targets)) for m in range(len(sources))]

    def projections() -> list[Tensor]:
        return [randn(sources[m][0], targets[n][0], 1, 1) / math.sqrt(targets[n][0]) for m, n in pairs]

    def biases() -> list[Tensor]:
        return [randn(sources[m][0]) for m, _ in pairs]

    return Problem(
        targets=features(targets),
        sources=features(sources),
        projections=projections(),
        biases=biases(),
        coefficients=[randn(batch, sources[m][0]).abs() / batch for m, _ in pairs],
        u_targets=features(targets),
        u_projections=projections(),
        u_biases=biases(),
        source_of=[m for m, _ in pairs],
        target_of=[n for _, n in pairs],
    )


def formulas(module: Any, problem: Problem, operator: str) -> Outputs:
    """By the functions of `aten`, or others of their signatures."""
    a = problem.coefficients
    if operator == "distances":
        return [module.matching_distances(*problem.primal, *problem.indices)]
    if operator == "gradient":
        return list(module.matching_gradient(*problem.primal, a, *problem.indices, False)[1:])
    full = operator == "adjoint"
    v = module.matching_adjoint(*problem.primal, a, *problem.direction, *problem.indices, full)
    return list(v if full else v[3:])


def plain_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    projections: Sequence[Tensor],
    biases: Sequence[Tensor],
    source_of: Sequence[int],
    target_of: Sequence[int],
) -> list[Tensor]:
    """E, a [B, C_s] for each pair, as anyone would write it."""
    E = []
    for r, bias, m, n in zip(projections, biases, source_of, target_of, strict=True):
        T, S = targets[n], sources[m]
        if S.shape[2:] != T.shape[2:]:
            S = F.interpolate(S, size=T.shape[2:], mode="bilinear", align_corners=False)
        E.append((F.conv2d(T, r.to(T.dtype), bias.to(T.dtype)) - S).square().mean((2, 3)))
    return E


def plain_loss(a: Sequence[Tensor], *problem: Any) -> Tensor:
    """Σ a E."""
    products = [(a_p * E_p).sum() for a_p, E_p in zip(a, plain_distances(*problem), strict=True)]
    return torch.stack(products).sum()


def by_autograd(loss: Callable[..., Tensor], problem: Problem, operator: str) -> Call:
    """All but the distances, by differentiating `loss` once or twice."""
    T, r, bias, a = (
        [t.detach().requires_grad_() for t in tensors]
        for tensors in (problem.targets, problem.projections, problem.biases, problem.coefficients)
    )
    primal = [*T, *r, *bias]
    lengths = [len(T), len(r), len(bias), len(a)]

    def value() -> Tensor:
        return loss(a, T, problem.sources, r, bias, *problem.indices)

    if operator == "gradient":
        return lambda: split(torch.autograd.grad(value(), primal), lengths[:3])
    g = torch.autograd.grad(value(), primal, create_graph=True)
    u = [t for tensors in problem.direction for t in tensors]
    inputs, counts = ([*primal, *a], lengths) if operator == "adjoint" else (a, lengths[3:])
    return lambda: split(torch.autograd.grad(g, inputs, u, retain_graph=True), counts)


def split(tensors: Iterable[Tensor], lengths: Iterable[int]) -> Outputs:
    """Lists of these lengths."""
    rest = iter(tensors)
    return [[next(rest) for _ in range(length)] for length in lengths]


def contender(implementation: str, problem: Problem, operator: str) -> Call:
    """A call that computes the operator, made ready as far as its user would have it ready."""
    if implementation == "triton":
        return partial(formulas, triton_launch, problem, operator)
    if implementation == "aten":
        return partial(formulas, aten, problem, operator)
    if implementation == "eager":
        if operator == "distances":
            return lambda: [plain_distances(*problem.primal, *problem.indices)]
        return by_autograd(plain_loss, problem, operator)
    # Without what was compiled before, neither shapes turn dynamic nor recompilations reach their limit.
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    if operator == "gradient":
        return by_autograd(compiled(plain_loss), problem, operator)
    adjoint = compiled(aten.matching_adjoint)
    return partial(formulas, SimpleNamespace(matching_adjoint=adjoint), problem, operator)


# Correctness


def errors(operator: str, outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Of each output, the root mean square over its tensors of ‖x − exact‖ / ‖exact‖."""

    def relative(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() - y).norm() / y.norm()

    return {
        name: torch.stack([relative(x, y) for x, y in zip(xs, ys, strict=True)]).square().mean().sqrt().item()
        for name, xs, ys in zip(OUTPUTS[operator], outputs, exact, strict=True)
    }


def error_ratio(error: dict[str, float], usual: dict[str, float]) -> float:
    """The largest ratio to ATen's error (NaN if any is)."""
    return torch.tensor([error[name] / usual[name] for name in usual]).max().item()


def is_correct(precision: str, error: dict[str, float], usual: dict[str, float]) -> bool:
    """No further from float64 than ATen in the same precision, or than float32 sums in another order may be."""
    return error_ratio(error, usual) <= TOLERANCE or (precision == "fp32" and max(error.values()) <= ROUNDING)


# Compiling ahead


def compilers() -> ProcessPoolExecutor:
    """Processes that fill Triton's cache on disk."""
    return ProcessPoolExecutor(min(POOL, os.cpu_count() or 1), multiprocessing.get_context("spawn"))


def compile_ahead(case: str, precision: str, operator: str, index: int, table: Table | None) -> None:
    """In a process of its own: runs the operator once, with the blocks of `table` if there is one."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    if table is not None:
        install(launch.device_properties(device)[0], table)
    set_precision(precision)
    formulas(triton_launch, random_problem(case, precision, device), operator)
    torch.cuda.synchronize()


def install(arch: str, table: Table) -> None:
    """Lets an architecture run with the blocks of `table`."""
    blocks.BLOCKS[arch] = table
