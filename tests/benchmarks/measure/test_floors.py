"""The least work of an iteration."""

from dataclasses import replace

import pytest

from benchmarks.cases import CASES
from benchmarks.measure import floors
from benchmarks.shapes import MATCHING_SHAPES
from benchmarks.suites import gate
from tests.shared import SMALL_CASE


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_floor_of_an_iteration_is_just_below_what_the_engine_computes(inner_steps: int) -> None:
    case = replace(SMALL_CASE, inner_steps=inner_steps)
    least, found = floors.Floors(case, "fp32").iteration.flops, gate.engine_counts(case)["flops"]
    assert 0.999 * found <= least <= found


def test_shapes_of_the_operators_are_those_of_the_networks() -> None:
    assert CASES["tiny"].shapes() == MATCHING_SHAPES["tiny"]
    assert CASES["cifar"].shapes() == MATCHING_SHAPES["cifar"]
