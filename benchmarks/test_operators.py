"""The matching operators: gradient and adjoint, by every implementation, in every precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.contenders import operators
from benchmarks.measure.capture import ready
from benchmarks.measure.rates import set_precision
from l2t_fast.kernels.matching import aten

CUDA = torch.cuda.is_available()
NAMES = ["cifar", "imagenet", "four-source"] if CUDA else ["tiny"]
BY = ["triton", "aten", "eager", "compiled"] if CUDA else ["aten", "eager"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("precision", operators.PRECISIONS)
@pytest.mark.parametrize("operator", ["gradient", "adjoint"])
@pytest.mark.parametrize("name", NAMES)
def test_operator(
    name: str, operator: str, precision: str, by: str, device: torch.device, timed: Callable[..., Any]
) -> None:
    if precision == "tf32" and not CUDA:
        pytest.skip("a CPU has no TF32")
    set_precision(precision)
    problem = operators.random_problem(name, precision, device)
    exact = operators.formulas(aten, problem.double(), operator)
    usual = operators.errors(operator, operators.formulas(aten, problem, operator), exact)
    one = ready(partial(operators.contender, by, problem, operator), device)
    assert operators.is_correct(precision, operators.errors(operator, one.outputs, exact), usual)
    timed(one.timed, cold=True)
