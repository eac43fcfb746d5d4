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


def test_bytes_of_matching() -> None:
    """Features in their dtype; r, bias and a, and what has their shapes, in float32."""
    features, source, r_and_bias, a = 2 * 8 * 5 * 5, 2 * 6 * 3 * 3, 6 * 8 + 6, 2 * 6  # numbers
    point = 2 * (features + source) + 4 * r_and_bias
    direction = 2 * features + 4 * r_and_bias
    expected = {
        "distances": point + 4 * a,
        "gradient": point + 4 * a + direction,
        "first step": point + direction + 4 * a,
        "adjoint": point + 4 * a + 2 * direction + 4 * a,
    }
    found = {name: floors.matching(name, 2, [(6, 3, 3)], [(8, 5, 5)], [(0, 0)], 2).bytes for name in floors.UNITS}
    assert found == expected
