"""What the Triton path is going to do, counted."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.contenders.operators import formulas, random_problem
from benchmarks.measure.plan import plan
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import triton_launch


@pytest.mark.parametrize(("case", "most"), [("imagenet", 1.1), ("cifar", 1.1)])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("operator", ["gradient", "adjoint"])
def test_hardly_more_products_than_the_least(case: str, most: float, precision: str, operator: str) -> None:
    row = plan(case, precision, operator)
    assert 1 <= row["done_over_least"] <= most


def test_its_launches_are_those_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the interpreter's small blocks on both sides."""
    monkeypatch.setattr("benchmarks.measure.plan.DEVICE", ("interpreter", 8))
    grids = []

    def noted(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], *_: Any) -> None:
        grids.append((grid, arguments["BP"], arguments["BS"]))

    problem = random_problem("minute", "bf16", torch.device("cpu"))
    with mock.patch.object(launch, "launch", noted):
        formulas(triton_launch, problem, "gradient")
    assert len(grids) == 2  # one a target layer
    least = sum(2 * grid[0] * grid[1] * BP * BS for grid, BP, BS in grids) * 32  # T has 4 and 16 channels, 32 at a time
    row = plan("minute", "bf16", "gradient")
    products = 2 * row["flops_least"] / 3  # of g_T and g_r, without padding
    assert row["flops"] == least + products
    assert row["launches"] > len(grids)
