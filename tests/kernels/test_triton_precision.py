"""How exact the Triton operators are in lower precision: as exact as those in ATen."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast.kernels.matching import aten, triton_launch
from l2t_fast.kernels.matching.triton_kernels import _rounded
from tests.kernels.triton_shared import DEVICE, INTERPRETED, gradient_and_adjoint, in_float64, laid_out, problem

pytestmark = pytest.mark.core

TOLERANCE = 1.2  # times ATen's error
TF32 = 2**-11  # of an operand, relative: what rounding to TF32 does at most
ORDER = 2**-22  # relative, of float32 sums in another order
KINDS = ("E", "g_T", "g_r", "g_bias", "v_T", "v_r", "v_bias", "v_a")

_CIFAR = MATCHING_SHAPES["cifar"][1:]
SHAPES = {
    "small": ([(12, 5, 5), (20, 3, 3)], [(24, 5, 5), (40, 3, 3)], [(0, 0), (1, 1)]),
    "aligned": ([(16, 8, 8), (32, 4, 4)], [(24, 8, 8), (40, 4, 4)], [(0, 0), (1, 1), (1, 0)]),
    "cifar": (*_CIFAR, list(itertools.product(*(range(len(features)) for features in _CIFAR)))),
}


@triton.jit
def _round_kernel(x, out):
    o = tl.arange(0, 16)
    tl.store(out + o, _rounded(tl.load(x + o), "rounded"))


@pytest.fixture
def rounding_of_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter is less exact than a GPU: it cuts float32 to bfloat16, and adds a column one by one."""
    if not INTERPRETED:
        return
    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.tensor(x).bfloat16().view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    def pairwise(self: Any, x: tl.tensor) -> tl.tensor:
        rows = np.ascontiguousarray(np.moveaxis(x.handle.data, self.axis, -1))
        return self.to_tensor(rows.sum(-1), x.dtype)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", pairwise)


@pytest.fixture
def tf32() -> Iterator[None]:
    """As a user asks for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def mean_errors(shapes: tuple, batch: int, draws: int, layout: str, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
    """(ours, ATen's) of every output of gradient and adjoint, whose inputs are of these `dtypes` of `problem`.

    Error: the difference to float64 on the same inputs, as a Frobenius norm relative to the output's; the root mean
    square of several draws.
    """
    ours, atens = [], []
    for seed in range(draws):
        inputs, u = problem(shapes, batch, seed, *dtypes)
        inputs = laid_out(inputs, [layout], [layout])
        exact = in_float64(inputs, u)
        results = [gradient_and_adjoint(implementation, inputs, u) for implementation in (triton_launch, aten)]
        assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
        for result, errors in zip(results, (ours, atens), strict=True):
            errors.append([((x.double() - y).norm() / y.norm()).item() for x, y in zip(result, exact, strict=True)])
    our, theirs = (torch.tensor(errors).square().mean(0).sqrt() for errors in (ours, atens))
    return our, theirs


def of_kinds(errors: Tensor, shapes: tuple) -> dict[str, float]:
    """The same of each of `KINDS`: the root mean square over its tensors."""
    _, targets, pairs = shapes
    counts = [len(targets) if kind in ("g_T", "v_T") else len(pairs) for kind in KINDS]
    means = [part.square().mean().sqrt().item() for part in errors.split(counts)]
    return dict(zip(KINDS, means, strict=True))


@pytest.mark.parametrize(
    ("features", "parameters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16 and fp32"],
)
def test_precision(features: torch.dtype, parameters: torch.dtype, rounding_of_hardware: None) -> None:
    """The error of every output is at most 1.2 times ATen's in the same dtypes, or of float32 a few last bits."""
    our, theirs = mean_errors(SHAPES["small"], 4, 6, "contiguous", features, parameters)
    bound = (TOLERANCE * theirs).clamp(min=ORDER if features == torch.float32 else 0.0)
    assert (our <= bound).all(), our / theirs


@pytest.mark.skipif(not INTERPRETED, reason="what hardware does is shown on hardware")
def test_operands_of_tf32_are_rounded(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that cut their operands to TF32, as Hopper's do, err no more than rounded ones may.

    Of d and H, from which all outputs come; what cuBLAS makes of these is float32 here.
    """

    def cut(x: np.ndarray) -> np.ndarray:
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_cut(self: Any, x: Any, y: Any, total: Any, *rest: Any) -> Any:
        x, y = (interpreter.TensorHandle(cut(np.ascontiguousarray(t.data)), t.dtype) for t in (x, y))
        return multiply(self, x, y, total, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply_cut)

    def found() -> dict[str, float]:
        return of_kinds(mean_errors(SHAPES["small"], 4, 2, "channels last", torch.float32)[0], SHAPES["small"])

    rounded = found()
    monkeypatch.setattr(triton_launch, "_of_products", lambda arch, precision: precision)
    cut_off = found()
    assert max(rounded.values()) < TF32, rounded
    assert all(cut_off[kind] > 2 * rounded[kind] for kind in KINDS), (rounded, cut_off)


def test_rounding_to_tf32() -> None:
    """To the nearest of 10 bits, ties away from zero, and what is not finite stays so."""
    ulp = 2.0**-10
    numbers = [1.0, 1 + 0.49 * ulp, 1 + 0.5 * ulp, 1 + 1.49 * ulp, -1 - 0.5 * ulp, -ulp, 0.0, torch.inf, -torch.inf]
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000, 0x7F801000, 0x7FFFF000]).int()
    x = torch.cat([torch.tensor(numbers), nan.view(torch.float32)]).to(DEVICE)
    out = torch.empty_like(x)
    _round_kernel[(1,)](x, out)
    expected = [1.0, 1.0, 1 + ulp, 1 + ulp, -1 - ulp, -ulp, 0.0, torch.inf, -torch.inf]
    assert out.tolist()[: len(expected)] == expected
    assert out[len(expected) :].isnan().all()


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
@pytest.mark.parametrize("shapes", ["aligned", "cifar"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_tensor_cores(precision: str, shapes: str, layout: str, request: pytest.FixtureRequest) -> None:
    """The error of each kind of output, the distances' by themselves too, is at most 1.2 times PyTorch's.

    Or below TF32's rounding of one operand: cuBLAS may make small products without tensor cores.
    """
    if precision == "tf32":
        request.getfixturevalue("tf32")
    features = torch.float32 if precision == "tf32" else torch.bfloat16
    batch, draws = (16, 1) if shapes == "cifar" else (4, 6)
    found = mean_errors(SHAPES[shapes], batch, draws, layout, features, torch.float32)
    our, theirs = (of_kinds(errors, SHAPES[shapes]) for errors in found)
    least = TF32 if precision == "tf32" else 0.0
    worse = {kind: (our[kind], theirs[kind]) for kind in KINDS if our[kind] > max(TOLERANCE * theirs[kind], least)}
    assert not worse, f"(ours, ATen's) {worse}"
    inputs, _ = problem(SHAPES[shapes], batch, 0, features, torch.float32)
    inputs = laid_out(inputs, [layout], [layout])
    E, *_ = triton_launch.matching_gradient(*inputs, True)
    alone = triton_launch.matching_distances(*inputs[:4], *inputs[5:])
    for x, y in zip(alone, E, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
